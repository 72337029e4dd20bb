"""COCO annotation files and the images that they name."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dg_timm._errors import BadValue
from dg_timm.detection.data.boxes import (
    BoxValidator,
    Categories,
    DetectionSplit,
    ImageAnnotations,
    box_area,
    make_annotations,
    read_area,
    read_crowd,
)

_NOT_ANNOTATIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # of save_to_disk
_MAX_FILES_SHOWN = 8


def annotation_file(folder: Path, split: str | None, usual: Sequence[str], given: str | None) -> Path | None:
    """Find the annotation file of a split; None if there is none.

    Args:
        folder: the folder of the data set.
        split: the name of the split; None takes the first of ``usual`` that has a file.
        given: a file that the user named, as a path or as a name in ``folder``; it wins.

    Raises:
        BadValue: ``given`` does not exist.
    """
    if given is not None:
        file = Path(given).expanduser()
        file = file if file.is_file() else folder / given
        if not file.is_file():
            raise BadValue(f"no such annotation file: {given}, nor {folder / given}{found_files_hint(folder)}")
        return file
    for name in [split] if split else usual:
        for pattern in (f"instances_{name}.json", f"instances_{name}20*.json", f"{name}.json",
                        f"{name}/_annotations.coco.json"):  # fmt: skip
            for place in (folder, folder / "annotations"):
                found = sorted(place.glob(pattern))
                if found:
                    return found[-1]
    return None


def annotation_files(folder: Path) -> list[str]:
    """List the JSON files of a folder that may be annotations: with any, the folder is a COCO data set."""
    saved = any((folder / name).exists() for name in _NOT_ANNOTATIONS[:2])
    if not folder.is_dir() or saved:
        return []
    found = [*folder.glob("*.json"), *folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json")]
    return sorted(str(file.relative_to(folder)) for file in found if file.name not in _NOT_ANNOTATIONS)


def found_files_hint(folder: Path) -> str:
    """A remark for messages: which annotation files the folder has; empty if it has none."""
    found = annotation_files(folder)[:_MAX_FILES_SHOWN]
    return f" (there are {', '.join(found)})" if found else ""


def read_coco(
    file: Path, folder: Path, image_folder: str | None, drop: bool, known: Categories | None = None
) -> tuple[DetectionSplit, Categories]:
    """Read a COCO annotation file; no image is decoded, but each must exist.

    Args:
        file: the annotation file.
        folder: the folder of the data set, in which images are looked for.
        image_folder: where images are, if not in one of the usual places.
        drop: leave bad boxes out instead of refusing them.
        known: classes that are learned already: those of the file are looked up among them by name.

    Returns:
        the images, and the classes: ``known``, or those of the file if it has one that is not known.

    Raises:
        BadValue: the file is empty, not valid JSON or not COCO's format, has bad boxes, or names a missing image.
    """
    content = _parse(file)
    categories = _categories(content["categories"], file)
    label_of = None if known is None else known.labels_of(categories.by_id)
    images = _images_by_id(content["images"], file)
    annotations = _annotations_by_image(content["annotations"], images, file)
    root = _image_root(file, folder, image_folder, [image["file_name"] for image in images.values()])
    reader = _Reader(file, categories, drop, label_of)
    rows = [reader.annotate(image, annotations[key], str(root / image["file_name"])) for key, image in images.items()]
    split = DetectionSplit(rows, f"{file.name} of {folder}", dropped=reader.validator.finish(), folder=root)
    return split, (categories if label_of is None or known is None else known)


def _parse(file: Path) -> Any:
    if file.stat().st_size == 0:
        raise BadValue(f"the annotation file {file} is empty")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise BadValue(f"the annotation file {file} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise BadValue(f"{file} is not a COCO annotation file: it has no list of {key}")
    for key in ("images", "categories"):
        if not content[key]:
            raise BadValue(f"the annotation file {file} has no {key}")
    return content


def _categories(listed: list[Any], file: Path) -> Categories:
    for category in listed:
        number, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(name, str) or not name.strip():
            raise BadValue(f"a category of {file} has no id or name: {category!r}; an id is an integer, a name a text")
    by_id = {category["id"]: category["name"] for category in listed}
    if len(by_id) != len(listed):
        raise BadValue(f"two categories of {file} have the same id: {listed}")
    return Categories([by_id[key] for key in sorted(by_id)], sorted(by_id))


def _images_by_id(listed: list[Any], file: Path) -> dict[Any, Any]:
    images: dict[Any, Any] = {}
    for image in listed:
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            raise BadValue(f"an image of {file} has no id: {image!r}")
        for key, kind in (("file_name", str), ("width", int), ("height", int)):
            if not isinstance(image.get(key), kind) or not image[key]:
                raise BadValue(f"image {image['id']} of {file} has the {key} {image.get(key)!r}")
        if image["id"] in images:
            raise BadValue(f"{file} has two images with the id {image['id']}")
        images[image["id"]] = image
    files = Counter(image["file_name"] for image in images.values())
    name, times = files.most_common(1)[0]
    if times > 1:
        raise BadValue(f"{times} images of {file} name the file {name}; give it once, with all of its boxes")
    return images


def _annotations_by_image(listed: list[Any], images: dict[Any, Any], file: Path) -> dict[Any, list[Any]]:
    by_image: dict[Any, list[Any]] = {key: [] for key in images}
    for annotation in listed:
        if not isinstance(annotation, dict):
            raise BadValue(f"an annotation of {file} is {annotation!r}")
        owner = annotation.get("image_id")
        if not isinstance(owner, (int, str)) or owner not in by_image:
            raise BadValue(
                f"annotation {annotation.get('id')} of {file} belongs to image {owner!r}, which is not among its images"
            )
        by_image[owner].append(annotation)
    return by_image


class _Reader:
    """Turns the annotations of one file into :class:`ImageAnnotations`, image by image."""

    def __init__(self, file: Path, categories: Categories, drop: bool, label_of: dict[int, int] | None) -> None:
        self.file, self.categories, self.validator = file, categories, BoxValidator(file.name, drop)
        self.label_of = label_of or {category: label for label, category in enumerate(categories.ids, start=1)}

    def annotate(self, image: dict[str, Any], annotations: list[Any], path: str) -> ImageAnnotations:
        size = (image["height"], image["width"])
        boxes, areas, labels, crowds = [], [], [], []
        for annotation in annotations:
            where = f"annotation {annotation.get('id')} of image {image['id']} ({image['file_name']})"
            category = annotation.get("category_id")
            is_number = isinstance(category, int) and not isinstance(category, bool)
            label = self.label_of.get(category) if is_number else None
            if label is None:
                raise BadValue(
                    f"{where} in {self.file} has the category id {category!r}; the categories of the file are "
                    f"{self.categories.by_id}"
                )
            area = read_area(annotation.get("area"), f"{where} in {self.file}")
            crowd = read_crowd(annotation.get("iscrowd"), f"{where} in {self.file}")
            box = self.validator.check(annotation.get("bbox"), "coco", size, where)
            if box is not None:
                boxes.append(box)
                areas.append(area or box_area(box))
                labels.append(label)
                crowds.append(crowd)
        return make_annotations(image["id"], path, size, boxes, labels, areas, crowds)


def _image_root(file: Path, folder: Path, given: str | None, names: list[str]) -> Path:
    stem = file.stem.removeprefix("instances_")
    places = [folder / "images", folder / "images" / stem, folder / stem, file.parent, folder]
    if given is not None:
        places = [place for root in (Path(given).expanduser(), folder / given) for place in (root, root / stem)]
    root = next((place for place in places if (place / names[0]).is_file()), None)
    if root is None:
        raise BadValue(
            f"image {names[0]} of {file} is in none of {', '.join(map(str, dict.fromkeys(places)))}; name the folder "
            "of the images with --image-folder"
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise BadValue(
            f"{len(missing)} of {len(names)} images of {file} are not in {root}: "
            f"{', '.join(missing[:_MAX_FILES_SHOWN])}"
        )
    return root
