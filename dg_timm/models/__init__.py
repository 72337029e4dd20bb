"""The zoo: every ``dg_*`` model that timm knows, and the static networks that timm lacks."""

from dg_timm.models import cifar_resnet, randwire, registry

__all__ = ["cifar_resnet", "randwire", "registry"]
