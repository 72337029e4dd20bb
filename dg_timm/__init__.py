"""Dynamic graph networks for timm (Yuan et al., "Dynamic Graph: Learning Instance-aware Connectivity for Neural Networks").

Importing registers the zoo: ``timm.create_model("dg_resnet50", pretrained=True)``.
"""

from dg_timm import zoo as zoo
from dg_timm.convert import dynamize
from dg_timm.introspect import adjacency, set_threshold

__version__ = "0.1.0"
__all__ = ["__version__", "adjacency", "dynamize", "set_threshold"]
