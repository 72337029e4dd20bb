"""Write a file or folder beside its place, then rename it: nobody meets a half-written one."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from dg_timm._errors import BadValue


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; rename it to ``target`` when the block ends without an exception.

    The temporary path keeps the suffix of ``target``, because writers choose a format by it. Parent folders are made.
    After an exception ``target`` is as it was, and nothing is left beside it.

    Raises:
        BadValue: if a parent of ``target`` is a file, or a file was written and ``target`` is a folder.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(parent for parent in target.parents if parent.exists() and not parent.is_dir())
        raise BadValue(f"{target} can't be written: {file} is a file, not a folder") from error
    temporary = target.with_name(f".{target.stem}-{uuid.uuid4().hex}{target.suffix}")
    try:
        yield temporary
        if target.is_dir() and temporary.is_file():
            raise BadValue(f"{target} is a folder; give the name of a file")
        put_in_place(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Make a folder if it is missing; after an exception in the block, one that was made and is empty goes again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # somebody put something there meanwhile
                folder.rmdir()
        raise


def atomic_write(target: str | Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes through :func:`atomic_path`."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def real_paths(paths: Iterable[str]) -> list[str]:
    """Write every path as the file system has it, so that two names of a file are one; asks once for each folder."""
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        place = os.path.join(folders[folder], name)
        found.append(os.path.realpath(place) if os.path.islink(place) or name == ".." else place)
    return found


def put_in_place(source: str | Path, target: str | Path) -> None:
    """Rename a file, folder or link on the same disk; a file or link at ``target`` is replaced in one step."""
    os.replace(source, target)
