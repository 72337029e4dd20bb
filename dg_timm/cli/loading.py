"""The network that a command names, ready to predict, with the names of its classes."""

from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

from dg_timm.training.run import networks


def load_network(name: str, checkpoint: str | None = None, image_size: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Load a network with its weights, in eval mode.

    Args:
        name: any that :func:`dg_timm.training.run.networks.create` takes.
        checkpoint: weights in place of the published ones.
        image_size: height and width of images in pixels; by default the network's own.

    Returns:
        the network, and its preprocessing as timm describes it.

    Raises:
        BadValue: for a name or weights that can't be used.
    """
    published = checkpoint is None and not networks.implies_pretrained(name)
    model = networks.create(name, pretrained=published, initial_checkpoint=checkpoint).eval()
    given = {} if image_size is None else {"input_size": (model.in_chans, image_size, image_size)}
    return model, resolve_data_config(given, model=model)


def class_names(model: Any) -> list[str]:
    """Name the classes: those saved with the network, those of ImageNet, or their numbers."""
    own = model.pretrained_cfg.get("label_names")
    if own and len(own) == model.num_classes:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(k) for k in range(model.num_classes)]
    return [str(k) for k in range(model.num_classes)]
