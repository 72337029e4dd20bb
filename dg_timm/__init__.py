"""Dynamic graph networks for timm.

Yuan et al., "Dynamic Graph: Learning Instance-aware Connectivity for Neural Networks".

Importing registers the zoo: ``timm.create_model("dg_resnet50", pretrained=True)``.
"""

from dg_timm import budget as budget
from dg_timm import zoo as zoo
from dg_timm.card import Accuracy, Card
from dg_timm.complexity import complexity
from dg_timm.convert import dynamize
from dg_timm.cost import cost
from dg_timm.hub import save_pretrained
from dg_timm.introspect import adjacency, fixed_wiring, set_execution, set_threshold
from dg_timm.publish import push_to_hub
from dg_timm.version import __version__
from dg_timm.wiring import draw_wiring

__all__ = [
    "Accuracy",
    "Card",
    "__version__",
    "adjacency",
    "complexity",
    "cost",
    "draw_wiring",
    "dynamize",
    "fixed_wiring",
    "push_to_hub",
    "save_pretrained",
    "set_execution",
    "set_threshold",
]
