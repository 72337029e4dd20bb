"""The zoo: every ``dg_*`` model that timm knows, and the static networks that timm lacks."""

from dg_timm.models import cifar_resnet, randwire, registry
from dg_timm.models.registry import BUNDLED, STATIC_MODELS, register

__all__ = ["BUNDLED", "STATIC_MODELS", "cifar_resnet", "randwire", "register", "registry"]
