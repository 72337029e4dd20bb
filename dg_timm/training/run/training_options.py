"""The options of a training: network, optimization and loss."""

import argparse

from dg_timm.hub.labeling import LOSSES
from dg_timm.training.loop.optimization import SCHEDULES
from dg_timm.training.run.option_types import (
    KeyValues,
    OptionGroup,
    flag,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)

# Of fine-tuning a converted network towards a cost: six short epochs at a small rate (docs/training.md)
COST_DEFAULTS = dict(
    epochs=6, opt="adamw", lr=2.5e-4, graph_lr_scale=0.1, weight_decay=0.05, warmup_epochs=0.25, smoothing=0.1
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the network."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="dg_resnet18",
        help="network: a timm or dg_* name, hf-hub:..., local-dir:..., or a folder; dg_ may stand before any timm "
        "model that dg_timm.dynamize takes",
    )
    flag(model, "--pretrained", False, "start from the published weights")
    model.add_argument(
        "--initial-checkpoint",
        help="safetensors file or folder with weights to start from, in place of the published ones; static weights "
        "are converted; by default none",
    )
    model.add_argument(
        "--model-kwargs",
        nargs="+",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="further arguments of the network, e.g. edge_scale=false block_shortcut=false; by default none",
    )
    model.add_argument(
        "--head-init-scale", type=non_negative_float, default=1.0, help="factor of the weights of a new classifier"
    )
    model.add_argument(
        "--drop", type=fraction, help="dropout probability before the classifier; by default the network's"
    )
    model.add_argument(
        "--drop-path", type=fraction, help="probability of dropping a residual path; by default the network's"
    )
    model.add_argument(
        "--freeze",
        choices=("none", "backbone", "all-but-graph"),
        default="none",
        help="parameters that do not learn: none, all but the classifier, or all but the graph",
    )
    flag(model, "--freeze-norm", False, "leave the statistics of norms as they are")


def add_optimization_options(parser: argparse.ArgumentParser) -> None:
    """Add length, batch, optimizer, schedule, clipping and averaging."""
    opt = parser.add_argument_group("optimization")
    opt.add_argument("--epochs", type=positive_int, default=10, help="number of epochs to train")
    opt.add_argument(
        "--updates", type=positive_int, help="number of updates to train; by default as many as --epochs has"
    )
    opt.add_argument(
        "--warmup-updates",
        type=non_negative_int,
        help="number of warm-up updates, with --updates and in place of --warmup-epochs; by default 0",
    )
    opt.add_argument(
        "--milestone-updates",
        type=positive_int,
        nargs="+",
        help="updates at which --sched multistep lowers the rate, with --updates and in place of --decay-milestones; "
        "by default the last one",
    )
    opt.add_argument(
        "--batch-size", type=positive_int, default=64, help="number of images in an update, over all processes"
    )
    opt.add_argument(
        "--micro-batch",
        type=positive_int,
        help="number of images that a process runs at a time, accumulating gradients; by default its whole share",
    )
    _add_optimizer_options(opt)
    _add_schedule_options(opt)


def _add_optimizer_options(opt: OptionGroup) -> None:
    opt.add_argument("--opt", default="sgd", help="name of any of timm's optimizers")
    opt.add_argument(
        "--opt-kwargs",
        nargs="+",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="further arguments of the optimizer; by default none",
    )
    opt.add_argument("--momentum", type=fraction, default=0.9, help="momentum of the optimizer")
    opt.add_argument(
        "--weight-decay",
        type=non_negative_float,
        default=5e-5,
        help="weight decay of all weights but biases, norms and the graph",
    )
    opt.add_argument(
        "--clip-grad", type=non_negative_float, help="bound of the gradients; by default they are not clipped"
    )
    opt.add_argument(
        "--clip-mode",
        choices=("norm", "value", "agc"),
        default="norm",
        help="what --clip-grad bounds: the norm of all gradients, each value, or each norm relative to its weight's",
    )
    opt.add_argument(
        "--ema-decay", type=fraction, help="decay of an average of the weights that is evaluated too; by default none"
    )
    flag(opt, "--ema-warmup", True, "let the decay of the average grow at the start")
    opt.add_argument(
        "--patience",
        type=positive_int,
        help="number of epochs without a better evaluation after which training stops; by default it goes on",
    )


def _add_schedule_options(opt: OptionGroup) -> None:
    opt.add_argument("--lr", type=non_negative_float, default=0.05, help="learning rate")
    opt.add_argument(
        "--lr-base-batch",
        type=positive_int,
        help="batch size that --lr is for; the rate is scaled to --batch-size; by default it is not scaled",
    )
    opt.add_argument(
        "--lr-base-scale", choices=("linear", "sqrt"), default="linear", help="rule by which --lr is scaled"
    )
    opt.add_argument(
        "--graph-lr-scale",
        type=non_negative_float,
        default=1.0,
        help="factor of the learning rate of routers, edge scales and thresholds",
    )
    opt.add_argument(
        "--gate-lr-scale", type=non_negative_float, default=20.0, help="factor of the learning rate of gates"
    )
    opt.add_argument(
        "--layer-decay",
        type=fraction,
        help="factor of the learning rate for each layer from the classifier down; by default none",
    )
    opt.add_argument("--sched", choices=SCHEDULES, default="cosine", help="schedule of the learning rate")
    opt.add_argument("--warmup-epochs", type=non_negative_float, default=0.0, help="number of warm-up epochs")
    opt.add_argument(
        "--warmup-lr", type=non_negative_float, default=1e-6, help="learning rate at the start of the warm-up"
    )
    flag(opt, "--warmup-prefix", False, "warm up before --epochs instead of within")
    opt.add_argument("--min-lr", type=non_negative_float, default=0.0, help="learning rate at the end of the schedule")
    opt.add_argument(
        "--cooldown-epochs", type=non_negative_int, default=0, help="number of epochs at --min-lr after the schedule"
    )
    opt.add_argument(
        "--decay-rate",
        type=non_negative_float,
        default=0.1,
        help="factor by which --sched step and multistep lower the rate; power of poly",
    )
    opt.add_argument(
        "--decay-epochs",
        type=non_negative_float,
        help="number of epochs between steps of --sched step, or of the decay of wsd and rsqrt; by default 90, and a "
        "fifth of the training",
    )
    opt.add_argument(
        "--decay-milestones",
        type=positive_int,
        nargs="+",
        default=[90, 180, 270],
        help="epochs at which --sched multistep lowers the rate",
    )


def add_objective_options(parser: argparse.ArgumentParser) -> None:
    """Add the loss of a classification."""
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--smoothing",
        type=fraction,
        default=0.0,
        help="label smoothing: probability spread over classes; each of several labels moves towards 0.5",
    )
    loss.add_argument(
        "--loss",
        choices=tuple(dict.fromkeys(loss for losses in LOSSES.values() for loss in losses)),
        help="loss: cross-entropy, or binary cross-entropy of each class; of several labels also timm's asymmetric, "
        "Poly-1 and ZLPR losses; by default ce, and bce of several labels",
    )
    loss.add_argument(
        "--distill",
        nargs="?",
        const="static",
        metavar="TEACHER",
        help="network whose logits are learned; without a name, the static network that --model was converted from; "
        "none: no teacher; by default none, and with --target-cost the static network where its classifier is trained",
    )
    loss.add_argument(
        "--distill-weight", type=fraction, default=0.5, help="share of the distillation loss in the whole loss"
    )
    loss.add_argument(
        "--distill-temperature", type=positive_float, default=1.0, help="temperature of both softmaxes of distillation"
    )
    flag(
        loss, "--fix-thresholds", False, "leave the thresholds of the graph as they are; a fresh network closes no edge"
    )
    add_cost_options(loss)
    flag(
        loss,
        "--cascade",
        None,
        "with one --target-cost and classes that exclude each other: learn a range of budgets up to 1, and run the "
        "images that the network is unsure of a second time, so that the mean cost is the target; by default where a "
        "trained static network was converted. --no-cascade learns the target alone",
    )


def add_cost_options(loss: OptionGroup) -> None:
    """Add what ``--target-cost`` needs."""
    loss.add_argument(
        "--target-cost",
        type=fraction,
        nargs="+",
        metavar="COST",
        help="mean cost of an image, relative to the static network, that training aims at: gates learn which blocks "
        "each image skips. Two costs are a range of budgets that one network serves; by default cost plays no part",
    )
    loss.add_argument(
        "--cost-weight",
        type=non_negative_float,
        default=300.0,
        help="factor of the squared distance of the cost above the target",
    )
    loss.add_argument(
        "--cost-ramp", type=fraction, default=0.5, help="fraction of training over which the target comes down from 1"
    )
    loss.add_argument(
        "--cost-noise", type=non_negative_float, default=1.0, help="scale of the gate noise at the start of training"
    )
    loss.add_argument(
        "--cost-quiet", type=fraction, default=0.7, help="fraction of training after which the gate noise is zero"
    )
