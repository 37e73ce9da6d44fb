"""Data: labelled images in memory, few-shot subsets and splits, and GlyphWorld, the benchmark of the package."""

from robustft.data.images import ImageDataset
from robustft.data.splits import PathDataset, Split, few_shot, read_split

__all__ = ["ImageDataset", "PathDataset", "Split", "few_shot", "read_split"]
