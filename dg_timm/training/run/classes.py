"""The classes of a network and those of the data: by name where both have names."""

from collections.abc import Callable, Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from dg_timm._errors import BadValue
from dg_timm.training.data.splits import Splits

_MAX_SHOWN = 5


def label_names_of(model: Any) -> list[str] | None:
    """Return the names of a network's classes in their order; None if it has none."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    return list(names) if names and len(names) == model.num_classes else None


def match_classes(name: str, model: Any, splits: Splits, source: str, num_classes: int | None) -> list[str]:
    """Return the names by which the labels of the data are looked up, in the order of the network's classes.

    Args:
        name: of the network, for messages.
        model: whose classes they are.
        splits: the data; their classes may be some of the network's.
        source: of the data, for messages.
        num_classes: with the network's number of classes, the user says that labels count its classes from 0.

    Raises:
        BadValue: the data have a class that the network does not, or another number of classes without names.
    """
    own = label_names_of(model) or _synsets(model, splits.label_names)
    named = splits.test.classes is not None or _are_names(splits.label_names)
    if own is not None and named:
        unknown = [one for one in splits.label_names if own.count(one) != 1] if own != splits.label_names else []
        if unknown:
            raise BadValue(
                f"{name} was trained on {own[:_MAX_SHOWN]}, {source} has {splits.label_names[:_MAX_SHOWN]}: "
                f"{unknown[:_MAX_SHOWN]} are none of its classes; give the network's names for the classes of the "
                "data, in the order of the data, with --label-names"
            )
        return own
    if model.num_classes not in (len(splits.label_names), num_classes):
        raise BadValue(
            f"{name} has {model.num_classes} classes, {source} has {len(splits.label_names)}; if its labels are among "
            f"those of the network all the same, say so with --num-classes {model.num_classes}"
        )
    return splits.label_names


def names_to_train(model: Any, label_names: Sequence[str], report: Callable[[str], object]) -> list[str]:
    """Return the names of the classes in the order in which a network is to learn them.

    A network that knows the same classes in another order keeps its own. ``report`` is told that a network's classes
    get other names.
    """
    own, names = label_names_of(model), list(label_names)
    if own is None or own == names:
        return names
    if sorted(own) == sorted(names):
        return own
    report(f"the network's classes {own[:_MAX_SHOWN]} are trained as {names[:_MAX_SHOWN]} from now on")
    return names


def _are_names(names: Sequence[str]) -> bool:
    """Whether names are more than the numbers of classes that have none."""
    return list(names) != [str(k) for k in range(len(names))]


def _synsets(model: Any, names: Sequence[str]) -> list[str] | None:
    """Return the WordNet numbers of timm's ImageNet classes, if the data name theirs so."""
    subset = infer_imagenet_subset(model)
    if not subset:
        return None
    synsets = ImageNetInfo(subset).label_names()
    return list(synsets) if names and set(names) <= set(synsets) else None
