"""COCO annotation files and the images that they name."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from dg_timm.detection.data.boxes import Categories, Checks, DetectionSplit, annotated, area_of


def annotation_file(folder: Path, split: Optional[str], usual: Sequence[str], given: Optional[str]) -> Optional[Path]:
    if given is not None:
        file = Path(given).expanduser()
        file = file if file.is_file() else folder / given
        if not file.is_file():
            raise FileNotFoundError(f"there is no annotation file {given}, nor {folder / given}{beside(folder)}")
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
    """JSON files in a folder, but for those of ``save_to_disk``: it is a COCO data set if it has any."""
    others = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
    if not folder.is_dir() or (folder / others[0]).exists() or (folder / others[1]).exists():
        return []
    found = [*folder.glob("*.json"), *folder.glob("annotations/*.json"), *folder.glob("*/_annotations.coco.json")]
    return sorted(str(file.relative_to(folder)) for file in found if file.name not in others)


def beside(folder: Path) -> str:
    found = annotation_files(folder)[:8]
    return f" (there are {', '.join(found)})" if found else ""


def read_coco(file: Path, folder: Path, image_folder: Optional[str], drop: bool) -> tuple[DetectionSplit, Categories]:
    content = _parse(file)
    categories = _coco_categories(content["categories"], file)
    label_of = {category: label for label, category in enumerate(categories.ids, start=1)}
    images: dict[Any, Any] = {}
    for image in content["images"]:
        if not isinstance(image, dict) or not isinstance(image.get("id"), (int, str)):
            raise ValueError(f"an image of {file} has no id: {image!r}")
        for key, kind in (("file_name", str), ("width", int), ("height", int)):
            if not isinstance(image.get(key), kind) or not image[key]:
                raise ValueError(f"image {image['id']} of {file} has the {key} {image.get(key)!r}")
        if image["id"] in images:
            raise ValueError(f"{file} has two images with the id {image['id']}")
        images[image["id"]] = image
    of_image: dict[Any, list[Any]] = {key: [] for key in images}
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict):
            raise ValueError(f"an annotation of {file} is {annotation!r}")
        owner = annotation.get("image_id")
        if not isinstance(owner, (int, str)) or owner not in of_image:
            raise ValueError(
                f"annotation {annotation.get('id')} of {file} is of image {owner!r}, which is not among its images"
            )
        of_image[owner].append(annotation)
    root = _image_root(file, folder, image_folder, [image["file_name"] for image in images.values()])
    checks = Checks(file.name, drop)
    rows = []
    for key, image in images.items():
        size = (image["height"], image["width"])
        boxes, areas, labels, crowds = [], [], [], []
        for annotation in of_image[key]:
            where = f"annotation {annotation.get('id')} of image {key} ({image['file_name']})"
            category, area = annotation.get("category_id"), annotation.get("area")
            label = label_of.get(category) if isinstance(category, int) else None
            if label is None:
                raise ValueError(
                    f"{where} in {file} has the category id {category!r}; the categories of the file are "
                    f"{categories.by_id}"
                )
            if area is not None and not isinstance(area, (int, float)):
                raise ValueError(f"{where} in {file} has the area {area!r}")
            box = checks.box(annotation.get("bbox"), "coco", size, where)
            if box is not None:
                boxes.append(box)
                areas.append(area or area_of(box))
                labels.append(label)
                crowds.append(bool(annotation.get("iscrowd", 0)))
        rows.append(annotated(key, str(root / image["file_name"]), size, boxes, labels, areas, crowds))
    return DetectionSplit(rows, f"{file.name} of {folder}", dropped=checks.finish()), categories


def _parse(file: Path) -> Any:
    if file.stat().st_size == 0:
        raise ValueError(f"the annotation file {file} is empty")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"the annotation file {file} is no JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} is no COCO annotation file: it has no list of {key}")
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f"the annotation file {file} has no {key}")
    return content


def _coco_categories(listed: list[Any], file: Path) -> Categories:
    try:
        by_id = {int(category["id"]): str(category["name"]) for category in listed}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a category of {file} has no id or name: {listed}") from error
    if len(by_id) != len(listed):
        raise ValueError(f"two categories of {file} have one id: {listed}")
    return Categories([by_id[key] for key in sorted(by_id)], sorted(by_id))


def _image_root(file: Path, folder: Path, given: Optional[str], names: list[str]) -> Path:
    stem = file.stem.removeprefix("instances_")
    places = [folder / "images", folder / "images" / stem, folder / stem, file.parent, folder]
    if given is not None:
        places = [place for root in (Path(given).expanduser(), folder / given) for place in (root, root / stem)]
    root = next((place for place in places if (place / names[0]).is_file()), None)
    if root is None:
        raise FileNotFoundError(
            f"image {names[0]} of {file} is in none of {', '.join(map(str, dict.fromkeys(places)))}; say where images "
            "are with --image-folder"
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images of {file} are not in {root}: {', '.join(missing[:8])}"
        )
    return root
