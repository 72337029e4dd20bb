"""A pytest plugin that points timm's test_models.py at our models; ``run.py`` loads it with ``-p only_dg``.

timm's file asks timm's registry for the models to test while it is imported. Here the registry's listings are cut down
to the requested models before that, so that every item timm makes for one of them is collected, and collection takes
seconds instead of making 18 000 items. What is left besides are items that name a static model in the file itself.

The environment, set by ``run.py``: ``TIMM_SUITE_MODELS`` holds the names, separated by commas, ``TIMM_SUITE_SCRATCH``
a folder for the downloads.
"""

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MODELS = frozenset(os.environ["TIMM_SUITE_MODELS"].split(","))
# Each worker of pytest-xdist has its own, because it empties it
HF_HOME = Path(os.environ["TIMM_SUITE_SCRATCH"], f"hf-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}")

not_ours = 0  # items of static models; under pytest-xdist, in the controller, those of any one worker


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HOME"] = str(HF_HOME)  # read when huggingface_hub is imported, which importing timm does
    import timm

    timm.list_models = _only_ours(timm.list_models)
    timm.list_pretrained = _only_ours(timm.list_pretrained)


def _only_ours(listing: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def restricted(*args: Any, module: str | list[str] = "", **kwargs: Any) -> list[str]:
        # `module` selects families by the file that defines them. Ours come from another file, and are of those.
        return [name for name in listing(*args, **kwargs) if _is_ours(name)]

    return restricted


def _is_ours(value: object) -> bool:
    return isinstance(value, str) and value.partition(".")[0] in MODELS


def _models(item: pytest.Item) -> Iterator[str]:
    """Our models that this item is parametrised by."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return (value.partition(".")[0] for value in params if _is_ours(value))


@pytest.hookimpl(tryfirst=True)  # before -k, which may then select among ours
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global not_ours
    ours = [item for item in items if any(_models(item))]
    others = [item for item in items if not any(_models(item))]
    not_ours = len(others)
    missing = MODELS - {model for item in ours for model in _models(item)}
    if missing:
        raise pytest.UsageError(f"timm's test_models.py has no test for {', '.join(sorted(missing))}")
    config.hook.pytest_deselected(items=others)
    items[:] = ours


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Drop what the test downloaded: a copy for each tag would fill the disk."""
    shutil.rmtree(HF_HOME, ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_ours"] = not_ours


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    global not_ours
    not_ours = getattr(node, "workeroutput", {}).get("not_ours", not_ours)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Outcomes by test function."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            if isinstance(report, pytest.TestReport):
                counts[report.nodeid.rpartition("::")[2].partition("[")[0]][outcome] += 1
    terminalreporter.section(f"timm's tests of {len(MODELS)} dg_ models")
    for test, outcomes in counts.items():
        terminalreporter.line(f"{test}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}")
    terminalreporter.line(
        f"not run: {not_ours} items with the name of a static timm model in the file, or with no model"
    )
