"""Run timm's own tests/test_models.py, of exactly the installed timm and unedited, on the ``dg_`` models.

    python -m tests.timm_suite.run [MODEL ...] [-- PYTEST_ARGUMENT ...]

Without a MODEL, all of the registry. No test of these models is left out: the pretrained ones download from a loopback
server (``tests/helpers/loopback_hub``) that stands in for the Hub. timm's timeouts apply; ``TIMEOUT`` (seconds)
replaces those that it can.
"""

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tests.helpers.loopback_hub import HubServer, StaticTimmModels

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "timm-sdist"

# Variables that change what timm's file selects, what pytest runs of it, or where weights come from
FOREIGN = ("GITHUB_", "PYTEST_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TIMM_USE_OLD_CACHE")
BUILD_SECONDS = 120  # the server makes a file when it is asked for, within the client's timeout


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, pytest_arguments = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", help="for example dg_resnet18")
    models = requested_models(parser.parse_args(own).models)
    sdist = timm_sdist(version("timm"))
    with tempfile.TemporaryDirectory(prefix="timm-suite-") as folder:
        work, weights = Path(folder, "work"), Path(folder, "weights")
        weights.mkdir()
        copy_tests(sdist, work)
        with HubServer(StaticTimmModels(weights)) as hub:
            result = subprocess.run(
                # `-p timeout` fails where pytest-timeout is not installed, and timm's timeouts would be ignored
                [sys.executable, "-m", "pytest", "tests/test_models.py", "-p", "only_dg", "-p", "timeout"]
                + ["-p", "no:cacheprovider", "-q", *pytest_arguments],
                check=False,
                cwd=work,
                env=environment(models, hub.url, Path(folder)),
            )
        answers = Counter((request.method, request.status) for request in hub.requests)
    print(
        "loopback Hub:",
        ", ".join(f"{n} {method} -> {status}" for (method, status), n in answers.items()) or "not asked",
    )
    return result.returncode


def requested_models(names: list[str]) -> list[str]:
    """Check the names against the registry; all of it if there is none."""
    import timm

    import dg_timm

    registered = timm.list_models("dg_*")
    for name in names:
        if name not in registered:
            nearest = difflib.get_close_matches(name, registered, n=1, cutoff=0.0)
            raise SystemExit(f"unknown model {name!r} (nearest: {nearest[0]!r}); models have no tag here")
    print(f"timm {timm.__version__}, dg_timm {dg_timm.__version__} from {Path(dg_timm.__file__).parent}", flush=True)
    return names or registered


def timm_sdist(release: str) -> Path:
    """The folder with timm's sdist of this release and, unpacked, its content; downloaded the first time."""
    folder = CACHE / release
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{release}-", dir=CACHE) as parent:
        fresh = Path(parent, release)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", f"timm=={release}"]
        pip = subprocess.run([*command, "--dest", str(fresh)], check=False, capture_output=True, encoding="utf-8")
        if pip.returncode:
            raise SystemExit(
                f"can't get timm's tests: they are in its sdist only, and 'pip download --no-deps --no-binary timm "
                f"timm=={release}' failed. Run it once where a package index can be reached; later runs use {CACHE}.\n"
                f"pip says:\n{pip.stderr.strip()}"
            )
        with tarfile.open(_archive(fresh, release)) as archive:
            archive.extractall(fresh, filter="data")
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another run was faster
                raise
    return folder


def _archive(sdist: Path, release: str) -> Path:
    return sdist / f"timm-{release}.tar.gz"


def copy_tests(sdist: Path, work: Path) -> None:
    """Copy timm's tests to ``work``, with the pyproject.toml that registers their markers, and check them.

    timm itself is left behind: next to the tests it would be imported in place of the installed one.
    """
    release = sdist.name
    unpacked = sdist / f"timm-{release}"
    shutil.copytree(unpacked / "tests", work / "tests")
    shutil.copy(unpacked / "pyproject.toml", work)
    with tarfile.open(_archive(sdist, release)) as archive:
        published = {member.name: member for member in archive if member.isfile()}
        for path in (path for path in work.rglob("*") if path.is_file()):
            member = published.get(f"timm-{release}/{path.relative_to(work).as_posix()}")
            stream = archive.extractfile(member) if member else None
            if stream is None or stream.read() != path.read_bytes():
                raise SystemExit(f"{path.name} is not what timm {release} published; delete {sdist} and run this again")


def environment(models: list[str], endpoint: str, scratch: Path) -> dict[str, str]:
    """The environment of the tests: ours, less what would change the selection, with the loopback Hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCH_BACKEND": "dg_timm",
        "TORCH_HOME": str(scratch / "torch"),
        "TIMM_SUITE_MODELS": ",".join(models),
        "TIMM_SUITE_SCRATCH": str(scratch),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_ETAG_TIMEOUT": str(BUILD_SECONDS),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
