"""Build a ``dg_*`` model: timm's static network, made dynamic, then loaded and wrapped as timm does it."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from timm.models import (
    FeatureDictNet,
    FeatureListNet,
    PretrainedCfg,
    build_model_with_cfg,
    model_entrypoint,
    resolve_pretrained_cfg,
)
from torch import nn

from dg_timm._compat import static_weights_filter
from dg_timm._errors import BadState, BadType
from dg_timm.budget.curve import BudgetPoint, keep_curve
from dg_timm.budget.fixed import leave_out
from dg_timm.conversion.convert import dynamize
from dg_timm.conversion.state_dict import check_fit, to_identity
from dg_timm.execution.cascade import set_cascade
from dg_timm.graph.stage import GATE_OPTIONS, GRAPH_OPTIONS, graph_stages
from dg_timm.hub.downloads import locate_weights
from dg_timm.hub.labeling import find_labeling
from dg_timm.hub.provenance import Provenance
from dg_timm.models.bundled import bundled_graph_options


def create_dynamic(static_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the dynamic graph network of a timm model; what ``timm.create_model("dg_...")`` calls.

    Without weights every node starts from the mean of its predecessors. A static checkpoint starts as the identity.

    Args:
        static_name: name of timm's static model, without a tag.
        pretrained: load the weights that the configuration names.
        **kwargs: options of the graph, as :func:`dg_timm.dynamize` takes them (``edge_scale``, ``block_shortcut``,
            ``instance_aware``, ``gates``, ``topology``, ``topology_seed``; of a network that ships, by default those
            that it was trained with), and what timm takes for the static model (``num_classes``, ``in_chans``,
            ``output_stride``).

    Returns:
        the model, or timm's wrapper for ``features_only``; ``model.provenance`` tells where the weights come from.

    Raises:
        BadType: for an option that neither the graph nor timm's model has.
        BadState: if the weights are damaged.
        DownloadError: if the weights can't be had.
    """
    name = f"dg_{static_name}"
    if kwargs.pop("pretrained_strict", True) is not True:  # a configuration from the Hub could ask for it
        raise BadType(f"{name}: pretrained_strict=False would leave parts of the network random; leave it out")
    cfg, overlay = kwargs.pop("pretrained_cfg", None), dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    source = resolve_pretrained_cfg(name, cfg, overlay)
    options = _graph_options(source if pretrained else None, kwargs)
    kwargs["feature_cfg"] = _feature_cfg(static_name, kwargs)
    try:
        located = locate_weights(source.to_dict(), kwargs.get("cache_dir")) if pretrained else {}
        model = build_model_with_cfg(
            _builder(static_name, options),
            name,
            pretrained,
            pretrained_cfg=cfg,
            pretrained_cfg_overlay={**overlay, **located},
            pretrained_filter_fn=_weights_filter(static_name),
            **kwargs,
        )
    except SafetensorError as error:
        raise BadState(
            f"the weights of {name} can't be read: {error}. The safetensors file is truncated or damaged; fetch it "
            "again"
        ) from error
    if isinstance(model, (FeatureListNet, FeatureDictNet)):
        model.register_load_state_dict_pre_hook(_flatten_names)
        set_cascade(model, None)  # features have no certainty: they are those of the whole budget
    _restore_source(model, {key: getattr(source, key) for key in located})
    from_hub = bool(located) and source.source != "local-dir"
    model.provenance = Provenance(not pretrained, source.hf_hub_id if from_hub else None)  # type: ignore[assignment]
    model.labeling = find_labeling(model)  # type: ignore[assignment]
    return model


def _graph_options(source: Optional[PretrainedCfg], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the graph out of the arguments, over those that the weights were trained with."""
    given = {key: kwargs.pop(key) for key in (*GRAPH_OPTIONS, *GATE_OPTIONS) if key in kwargs}
    return {**({} if source is None else bundled_graph_options(source)), **given}


def _feature_cfg(static_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Say how timm's feature wrappers are to look at the model."""
    # `blocks` of an EfficientNet is a Sequential of stages, which they must look into
    feature_cfg = {"flatten_sequential": True, **kwargs.pop("feature_cfg", {})}
    if kwargs.get("features_only") and "out_indices" not in kwargs:
        with torch.device("meta"):  # the levels that timm takes of this model are not always five
            static = model_entrypoint(static_name)(pretrained=False, features_only=True)
        feature_cfg["out_indices"] = static.feature_info.out_indices
    return feature_cfg


def _flatten_names(wrapper: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *unused: object) -> None:
    """A load hook of timm's feature wrapper, which has ``blocks_1`` where an EfficientNet of timm has ``blocks.1``."""
    for name in [name for name, _ in wrapper.named_children() if name.rpartition("_")[2].isdigit()]:
        container, _, index = name.rpartition("_")
        nested = f"{prefix}{container}.{index}."
        for key in [key for key in state_dict if key.startswith(nested)]:
            state_dict[f"{prefix}{name}.{key.removeprefix(nested)}"] = state_dict.pop(key)


def _builder(static_name: str, options: dict[str, Any]) -> Callable[..., nn.Module]:
    """Make the function that timm's factory calls for the bare network."""
    options = dict(options)

    def build(**model_kwargs: Any) -> nn.Module:
        try:
            static = model_entrypoint(static_name)(pretrained=False, **model_kwargs)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise BadType(
                f"dg_{static_name}: {error}. Its own options are {', '.join(GRAPH_OPTIONS)}, the others those of "
                f"timm's {static_name}; a model saved by a newer dg_timm may need that version"
            ) from error
        after = {key: options.pop(key) for key in GATE_OPTIONS if key in options}
        return _after_training(dynamize(static, identity=False, **options), **after)

    return build


def _after_training(
    model: nn.Module,
    budgets: Sequence[Mapping[str, Any]] = (),
    cascade: Optional[Mapping[str, Any]] = None,
    skipped_blocks: Optional[dict[str, list[int]]] = None,
) -> nn.Module:
    """Give a network what its gates were found to do: a curve of budgets, a cascade, or blocks that are left out."""
    if skipped_blocks:
        leave_out(model, skipped_blocks)
    keep_curve(model, [BudgetPoint(**point) for point in budgets])
    if cascade is not None and bool(model.num_classes):  # features have no certainty
        set_cascade(model, **cascade)
    return model


def _weights_filter(static_name: str) -> Callable[[dict[str, Any], nn.Module], dict[str, Any]]:
    """Make the function that turns the content of a weights file into a state dict of the dynamic network."""
    static_filter = static_weights_filter(model_entrypoint(static_name))

    def to_dynamic(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        state_dict = to_identity(model, static_filter(state_dict, model))
        # timm loads loosely when it adapts the classifier; what lies in a graph must fit all the same
        check_fit(model, state_dict, within=tuple(f"{name}." for name in graph_stages(model)))
        return state_dict

    return to_dynamic


def _restore_source(model: nn.Module, source: dict[str, Any]) -> None:
    """Make the configurations name the source that the user named, in place of the file that it was fetched to."""
    for part in model.modules():
        cfg = getattr(part, "pretrained_cfg", None)
        if isinstance(cfg, dict):
            for key, value in source.items():
                cfg.pop(key, None)
                if value is not None:
                    cfg[key] = value
