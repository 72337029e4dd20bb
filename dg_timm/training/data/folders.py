"""Folders of images: the first level names splits or classes, and every file is read or counted.

Words inside the names of classes and files decide nothing.
"""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Features, Image

from dg_timm._errors import BadValue

SPLIT_FOLDERS = ("train", "val", "validation", "test")
IMAGE_SUFFIXES = (".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
                  ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff",
                  ".webp")  # fmt: skip
_LIKE_SPLITS = (*SPLIT_FOLDERS, "training", "valid", "dev", "testing", "eval")  # in any spelling
_MAX_SHOWN = 8

Files = dict[str, list[str]]  # paths of images, by class


class Tree(NamedTuple):
    """What lies below a folder.

    Attributes:
        root: the folder.
        folders: the paths of all images, by the folder of the first level that holds them.
        loose: images that lie in the folder itself.
        empty: folders of the first level that hold no image.
        side_files: how many files are no images, by their kind.
    """

    root: Path
    folders: Files
    loose: list[str]
    empty: list[str]
    side_files: Counter[str]

    @property
    def has_images(self) -> bool:
        """Whether there is an image anywhere below."""
        return bool(self.folders or self.loose)


def read_tree(root: Path) -> Tree:
    """List a folder and all that lies below it; links are followed.

    Raises:
        BadValue: a folder can't be listed.
    """
    tree = Tree(root, {}, [], [], Counter())
    for entry in _entries(root):
        if entry.is_dir() and not entry.name.startswith("."):
            found = list(_images(entry.path, (os.path.realpath(root),), tree.side_files))
            if found:
                tree.folders[entry.name] = found
            else:
                tree.empty.append(entry.name)
        else:
            tree.loose.extend(_images_of(entry, (os.path.realpath(root),), tree.side_files, hidden=False))
    return tree


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise BadValue(f"{folder} can't be listed: {error.strerror}") from error


def _images(folder: str, above: tuple[str, ...], others: Counter[str], hidden: bool = False) -> Iterator[str]:
    """Yield the images below a folder, and count all other files."""
    real = os.path.realpath(folder)
    if real in above:
        others["links to a folder around them"] += 1
        return
    for entry in _entries(folder):
        yield from _images_of(entry, (*above, real), others, hidden)


def _images_of(entry: os.DirEntry[str], above: tuple[str, ...], others: Counter[str], hidden: bool) -> Iterator[str]:
    hidden = hidden or entry.name.startswith(".")
    suffix = os.path.splitext(entry.name)[1].lower()
    if entry.is_dir():
        yield from _images(entry.path, above, others, hidden)
    elif hidden:
        others["hidden files"] += 1
    elif not entry.is_file():
        others["links to nothing"] += 1
    elif suffix not in IMAGE_SUFFIXES:
        others[f"{suffix} files" if suffix else "files without a suffix"] += 1
    elif not _is_text(entry.path):
        others["files whose names are not UTF-8"] += 1
    else:
        yield entry.path


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_image_folder(tree: Tree, asked: Collection[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Open the splits of a folder that has a folder for each class, or one for each split with those of the classes.

    A class is the folder below the folder of the split, or of the first level where there are no splits; images may
    lie deeper in it.

    Args:
        tree: what lies below the folder.
        asked: names that the user says are splits.

    Returns:
        a ``datasets.Dataset`` of undecoded images by the name of its split, and a remark for everything left out.

    Raises:
        BadValue: images lie in no class folder, or the first level can be read in two ways.
    """
    splits, left_out = _split_level(tree, asked), Counter(tree.side_files)
    empty = list(tree.empty)
    parts: dict[str, Files] = {}
    if splits:
        for name, files in tree.folders.items():
            if name in splits:
                parts[name], loose = _by_class(tree.root / name, files)
                left_out[f"images in {name}/ outside any class folder"] += len(loose)
                empty += [f"{name}/{one}" for one in _folders_of(tree.root / name) if one not in parts[name]]
            else:
                left_out[f"images in {name}/, beside the splits {', '.join(splits)}"] += len(files)
    else:
        parts["train"] = tree.folders
    left_out["images outside any class folder"] += len(tree.loose)
    remarks = [f"{count} {what}" for what, count in left_out.items() if count]
    if empty:
        shown = ", ".join(empty[:_MAX_SHOWN]) + (", ..." if len(empty) > _MAX_SHOWN else "")
        remarks.append(f"{len(empty)} empty folders ({shown})")
    return {name: _as_table(files) for name, files in parts.items() if files}, remarks


def _split_level(tree: Tree, asked: Collection[str]) -> list[str]:
    """Tell which folders of the first level are splits."""
    names, root = list(tree.folders), tree.root
    if not names:
        raise BadValue(f"{root} holds images and no class folders: put those of each class into a folder of its own")
    named = [name for name in names if name in SPLIT_FOLDERS or name in asked]
    deep = [name for name in names if _by_class(root / name, tree.folders[name])[0]]
    certain = [name for name in named if name in asked]
    if set(names) <= {*SPLIT_FOLDERS, *asked} and not deep:
        raise BadValue(f"{', '.join(names)} of {root} hold images and no class folders: put those of each class into a "
                       "folder of its own")  # fmt: skip
    splits = [name for name in named if name in deep or certain]
    others = [name for name in names if name not in named]
    if len(splits) == 1 and others and not certain:
        raise BadValue(
            f"{root} has the folder {splits[0]} beside {', '.join(others[:_MAX_SHOWN])}: as a split, it is named with "
            f"--train-split {splits[0]} (or --val-split); as a class, it holds images and no further folders"
        )
    if splits:
        return named
    _refuse_hidden_splits(tree, deep)
    return []


def _refuse_hidden_splits(tree: Tree, deep: Collection[str]) -> None:
    """Refuse what would silently become classes: splits in other words, or one folder around the splits."""
    names, root = list(tree.folders), tree.root
    if len(names) > 1 and set(names) == set(deep) and all(name.lower() in _LIKE_SPLITS for name in names):
        raise BadValue(
            f"{root} has the folders {', '.join(names)}, which would be classes: a folder for a split is named "
            f"{', '.join(SPLIT_FOLDERS)}, or by --train-split and --val-split"
        )
    inner = set(_by_class(root / names[0], tree.folders[names[0]])[0])
    if len(names) == 1 and inner and inner <= set(SPLIT_FOLDERS):
        raise BadValue(f"{root} has a single class folder, {names[0]}, with {', '.join(sorted(inner))} in it; "
                       f"give {root / names[0]}")  # fmt: skip


def _by_class(folder: Path, files: Iterable[str]) -> tuple[Files, list[str]]:
    """Sort images by the folder right below ``folder``; those in none come last."""
    classes: Files = {}
    loose = []
    start = len(str(folder)) + 1
    for file in files:
        name, _, rest = file[start:].partition(os.sep)
        if rest:
            classes.setdefault(name, []).append(file)
        else:
            loose.append(file)
    return classes, loose


def _folders_of(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]


def _as_table(files: Files) -> Dataset:
    names = sorted(files)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    paths = [path for name in names for path in files[name]]
    labels = [k for k, name in enumerate(names) for _ in files[name]]
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)
