"""What scripts outside the package read data by: the rows of each split of a folder, a file or a data set."""

from dg_timm.training.data.sources import Splits, load_splits
from dg_timm.training.data.splits import Split

__all__ = ["Split", "Splits", "load_splits"]
