"""Dynamic graph networks for timm.

Yuan et al., "Dynamic Graph: Learning Instance-aware Connectivity for Neural Networks".

Importing registers the zoo: ``timm.create_model("dg_resnet50", pretrained=True)``.
"""

from dg_timm import models as models  # registers the zoo with timm
from dg_timm._errors import UserError
from dg_timm._version import __version__
from dg_timm.analysis.counting import Complexity, complexity, cost
from dg_timm.analysis.plot import draw_wiring
from dg_timm.analysis.recorder import adjacency, majority_topology, record_adjacency, skipped_nodes
from dg_timm.budget.calibration import calibrate, threshold_curve
from dg_timm.budget.choice import BudgetChoice, choose_cascade
from dg_timm.budget.curve import BudgetPoint, budget_curve, keep_curve, measure_budgets, set_budget
from dg_timm.budget.fixed import to_fixed
from dg_timm.budget.norms import refit_norms
from dg_timm.conversion.convert import dynamize
from dg_timm.execution import kernels as kernels
from dg_timm.execution.cascade import set_cascade
from dg_timm.execution.settings import set_execution, set_threshold
from dg_timm.hub.card import Accuracy, Card
from dg_timm.hub.push import push_to_hub
from dg_timm.hub.save import save_pretrained

__all__ = [
    "Accuracy",
    "BudgetChoice",
    "BudgetPoint",
    "Card",
    "Complexity",
    "UserError",
    "__version__",
    "adjacency",
    "budget_curve",
    "calibrate",
    "choose_cascade",
    "complexity",
    "cost",
    "draw_wiring",
    "dynamize",
    "keep_curve",
    "kernels",
    "majority_topology",
    "measure_budgets",
    "models",
    "push_to_hub",
    "record_adjacency",
    "refit_norms",
    "save_pretrained",
    "set_budget",
    "set_cascade",
    "set_execution",
    "set_threshold",
    "skipped_nodes",
    "threshold_curve",
    "to_fixed",
]
