"""Data: labelled images in memory, few-shot subsets and splits, and GlyphWorld, the benchmark of the package."""

from robustft.data.few_shot import PathDataset, Split, few_shot, read_split
from robustft.data.images import ImageDataset

__all__ = ["ImageDataset", "PathDataset", "Split", "few_shot", "read_split"]
