"""What every room shares: files that are whole or not there, modes, tables, hardware, errors."""

import platform
import stat
import threading

import pytest
import torch
from torch import nn

import dg_timm
from dg_timm import _errors, _hardware
from dg_timm._files import atomic_path, atomic_write, put_in_place
from dg_timm._modes import evaluating
from dg_timm._tables import markdown_table


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_utf8(tmp_path):
    atomic_write(tmp_path / "new" / "card.md", "é ☃")
    assert (tmp_path / "new" / "card.md").read_bytes() == "é ☃".encode()
    assert names(tmp_path / "new") == ["card.md"]


def test_bytes_are_written_as_they_are(tmp_path):
    atomic_write(str(tmp_path / "data"), b"\xff\r\n")
    assert (tmp_path / "data").read_bytes() == b"\xff\r\n"


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "table.csv"
    atomic_write(target, "old")

    def interrupted() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["table.csv"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    def failing() -> None:
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            atomic_write(temporary / "config.json", "{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert names(tmp_path) == []


def test_a_folder_appears_at_once(tmp_path):
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        atomic_write(temporary / "config.json", "{}")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path / "model") == ["config.json"]


def test_the_temporary_path_keeps_the_suffix_and_lies_beside(tmp_path):
    with atomic_path(tmp_path / "wiring.png") as temporary:
        assert (temporary.suffix, temporary.parent) == (".png", tmp_path)
        temporary.write_bytes(b"")


def test_others_can_read_what_the_umask_lets_them(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    atomic_write(tmp_path / "atomic", b"")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_reader_never_meets_half_a_file(tmp_path):
    target = tmp_path / "status"
    texts = {letter * 100_000 for letter in "ab"}
    atomic_write(target, "a" * 100_000)
    writer = threading.Thread(target=lambda: [atomic_write(target, text) for _ in range(100) for text in sorted(texts)])
    writer.start()
    met = {target.read_text(encoding="utf-8") for _ in range(200)}
    writer.join()
    assert met <= texts
    assert names(tmp_path) == ["status"]


def test_put_in_place_replaces_a_file(tmp_path):
    for name in ("old", "new"):
        atomic_write(tmp_path / name, name)
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text(encoding="utf-8") == "new"
    assert names(tmp_path) == ["old"]


def test_every_module_gets_its_own_mode_back():
    first, second = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), nn.Dropout().eval()
    first[1].eval()  # frozen norms in a network that trains

    def failing() -> None:
        with evaluating(first, second):
            assert not any(module.training for module in (*first.modules(), *second.modules()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert [module.training for module in (*first.modules(), *second.modules())] == [True, True, False, False]


def test_a_table_escapes_what_would_end_a_cell():
    assert markdown_table(["model", "top-1"], [["a|b", None], [1, 0.5]]) == (
        "| model | top-1 |\n|---|---|\n| a\\|b |  |\n| 1 | 0.5 |"
    )


def test_a_table_without_rows_keeps_its_header():
    assert markdown_table(["model"], []) == "| model |\n|---|"


def test_the_hardware_is_named_with_versions():
    text = _hardware.describe_hardware()
    assert _hardware.processor_name() in text
    assert f"({torch.get_num_threads()} of " in text
    assert text.endswith(f"torch {torch.__version__}, Python {platform.python_version()}")


def test_a_system_without_a_list_of_processors_still_has_a_name(monkeypatch):
    def missing(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(_hardware.Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert _hardware.processor_name() == platform.machine()
    assert platform.machine().encode() in _hardware.processor_features()


def test_a_device_is_named():
    assert _hardware.device_name(torch.device("cpu")) == "cpu"
    assert _hardware.device_name(torch.device("meta")) == "meta"


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [("BadValue", ValueError), ("BadType", TypeError), ("BadState", RuntimeError), ("MissingPackage", ImportError)],
)
def test_errors_that_a_user_can_mend_are_also_what_a_caller_expects(kind, builtin):
    error = getattr(_errors, kind)("the message")
    assert isinstance(error, builtin)
    assert isinstance(error, dg_timm.UserError)
    assert str(error) == "the message"
