"""Which columns of a data set hold the images and the labels, and how the labels are written."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from datasets import ClassLabel, Features, Image, IterableDataset, LargeList, List, Value

from dg_timm._errors import BadValue
from dg_timm.hub.labeling import SINGLE, Labeling
from dg_timm.training.data.label_forms import SEPARATOR, LabelForm

_SEVERAL = ("labels", "label")  # usual names of a column of several labels


class Asked(NamedTuple):
    """What the user says of images and labels.

    Attributes:
        image, label: names of the columns; ``a,b,c`` names a column for each class. None for the usual ones.
        separator: between the names in a text of several labels; None for the usual one.
        labeling: what the labels are for.
    """

    image: str | None = None
    label: str | None = None
    separator: str | None = None
    labeling: Labeling = SINGLE


class Columns(NamedTuple):
    """Where the images and the labels of a data set are, and how the labels are written.

    Attributes:
        image: name of a column.
        labels: name of a column, or of one for each class.
        form: of the labels.
        known: the classes that a column knows by name; None if it knows none.
    """

    image: str
    labels: tuple[str, ...]
    form: LabelForm
    known: ClassLabel | None

    def take(self, rows: Any) -> Any:
        """Give the rows of these columns alone, as ``image`` and ``label``; columns of classes become a list."""
        rows = rows.select_columns([self.image, *self.labels])
        if len(self.labels) == 1:
            names = {self.image: "image", self.labels[0]: "label"}
            return rows.rename_columns({old: new for old, new in names.items() if old != new})
        text = any("str" in rows.features[name].dtype for name in self.labels)  # a CSV's column of more than integers
        feature = List(Value("string" if text else "float64"))

        def join(values: Sequence[Any]) -> list[Any]:
            return [None if value is None else str(value) for value in values] if text else list(values)

        if not isinstance(rows, IterableDataset):
            table = rows.select_columns(list(self.labels))[:]
            labels = [join(values) for values in zip(*(table[name] for name in self.labels), strict=True)]
            images = rows.select_columns([self.image]).rename_columns({self.image: "image"})
            return images.add_column("label", labels, feature=feature)
        return rows.map(
            lambda row: {"image": row[self.image], "label": join([row[name] for name in self.labels])},
            features=Features(image=rows.features[self.image], label=feature),
            remove_columns=[name for name in (self.image, *self.labels) if name not in ("image", "label")],
        )


def find_columns(rows: Any, asked: Asked, source: str, usual: Columns | None = None) -> Columns:
    """Find the columns of images and of labels.

    Args:
        rows: of ``datasets``.
        asked: what the user says of them.
        source: of the rows, for messages.
        usual: the columns of another split of the data.

    Raises:
        BadValue: there is no such column, or it holds something else.
    """
    features = dict(rows.features or {})
    have = ", ".join(f"{name} ({feature})" for name, feature in features.items()) or "none"
    image_key, label_key = asked.image, asked.label
    if usual is not None:
        image_key = image_key or (usual.image if usual.image in features else None)
        label_key = label_key or (",".join(usual.labels) if set(usual.labels) <= set(features) else None)
    image = _find_image(features, image_key, source, have)
    if asked.labeling.task == "single":
        labels: tuple[str, ...] = (_find_label(features, label_key, source, have),)
    else:
        labels = _find_several({k: f for k, f in features.items() if k != image}, label_key, source, have)
    feature = features[labels[0]]
    item = feature.feature if isinstance(feature, (List, LargeList)) else feature
    known = item if isinstance(item, ClassLabel) else None
    return Columns(image, labels, _form_of(rows, labels, asked, source), known)


def _find_image(features: Mapping[str, Any], key: str | None, source: str, have: str) -> str:
    if key is not None and key not in features and isinstance(features.get("image"), Image):
        key = "image"  # the column of a table of files, which holds the images now
    _require(features, key, "--image-key", source, have)
    image = key or _prefer([k for k, f in features.items() if isinstance(f, Image)], "image")
    if image is None or not isinstance(features[image], Image):
        raise BadValue(f"{source} has no image column{' ' + image if image else ''}; its columns are {have}")
    return image


def _find_label(features: Mapping[str, Any], key: str | None, source: str, have: str) -> str:
    _require(features, key, "--label-key", source, have)
    label = key or _prefer([k for k, f in features.items() if isinstance(f, ClassLabel)], "label")
    label = label or next((k for k in ("label", "cls") if k in features), None)  # cls: webdataset's usual name
    if label is None:
        raise BadValue(f"{source} has no label column; name one with --label-key. Its columns are {have}")
    kind = features[label]
    is_label = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "str", "large_str"))
    if isinstance(kind, (List, LargeList)):
        raise BadValue(
            f"column {label} of {source} is {kind}; a row of several labels is for --task multilabel (or soft)"
        )
    if not isinstance(kind, ClassLabel) and not is_label:
        raise BadValue(f"column {label} of {source} is {kind}; labels must be integers or text")
    return label


def _find_several(features: Mapping[str, Any], key: str | None, source: str, have: str) -> tuple[str, ...]:
    """Find a column of lists or texts, or else a column for each class: all that there are."""
    if key is not None:
        names = (key,) if key in features else tuple(name.strip() for name in key.split(","))
        for name in names:
            _require(features, name, "--label-key", source, have)
        if len(set(names)) < len(names):
            raise BadValue(f"--label-key {key} names a column twice")
        return names
    lists = [name for name, feature in features.items() if isinstance(feature, (List, LargeList))]
    usual = [name for name in _SEVERAL if name in features]
    if usual or lists:
        return (usual or lists)[:1]  # type: ignore[return-value]
    others = tuple(name for name, feature in features.items() if isinstance(feature, Value))
    if len(others) < 2:
        raise BadValue(f"{source} has no column of labels; name it with --label-key. Its columns are {have}")
    return others


def _require(features: Mapping[str, Any], key: str | None, option: str, source: str, have: str) -> None:
    if key is not None and key not in features:
        raise BadValue(f"{option} {key}: {source} has no such column; its columns are {have}")


def _prefer(names: list[str], preferred: str) -> str | None:
    return preferred if preferred in names else next(iter(names), None)


def _form_of(rows: Any, labels: tuple[str, ...], asked: Asked, source: str) -> LabelForm:
    """Tell how the labels in some columns are written."""
    labeling = asked.labeling
    if labeling.task == "single":
        return LabelForm()
    if len(labels) > 1:
        return LabelForm(labeling, "vector", len(labels))
    (name,) = labels
    feature = rows.features[name]
    is_list = isinstance(feature, (List, LargeList))
    item = feature.feature if is_list else feature
    is_text = isinstance(item, Value) and "str" in item.dtype
    if is_list and isinstance(item, Value) and not is_text:
        return LabelForm(labeling, "vector", _width(rows.select_columns([name]), feature, source))
    if labeling.task == "multilabel" and (is_text or (is_list and isinstance(item, ClassLabel))):
        return LabelForm(labeling, "classes", 0, asked.separator or SEPARATOR)
    wanted = {
        "multilabel": "several labels are a list of names, of ClassLabels or of 0 and 1, a text of names with a "
        "character between them, or a column a class (--label-key a,b,c)",
        "soft": "soft labels are a list of numbers, or a column a class (--label-key a,b,c)",
    }
    raise BadValue(f"column {name} of {source} is {feature}; {wanted[labeling.task]}")


def _width(rows: Any, feature: Any, source: str) -> int:
    """How many numbers the lists of a column have: as its type says, or else as its first list."""
    length = getattr(feature, "length", -1)
    if length > 0:
        return int(length)
    (name,) = rows.features
    first: Sequence[Any] | None = next((row[name] for row in islice(rows, 1000) if row[name]), None)
    if not first:
        raise BadValue(f"column {name} of {source} has no numbers in its first 1000 rows")
    return len(first)
