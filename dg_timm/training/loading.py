"""What scripts outside the package decode data by: images by their key."""

from dg_timm.training.data.images import Images
from dg_timm.training.data.samplers import SampleKey as Key

__all__ = ["Images", "Key"]
