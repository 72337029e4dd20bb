"""What scripts outside the package read COCO files by."""

from dg_timm.detection.data.coco import read_coco

__all__ = ["read_coco"]
