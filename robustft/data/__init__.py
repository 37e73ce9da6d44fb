"""Data on disk and in memory: `open` finds out what lies at a path, `check` what is wrong with it; few-shot subsets,
splits, corrupted images to `stress` a model with, and GlyphWorld, the benchmark of the package."""

from robustft.data.checking import check
from robustft.data.corruptions import stress
from robustft.data.images import ImageDataset
from robustft.data.opening import Data, open
from robustft.data.paths import PathDataset
from robustft.data.splits import Split, few_shot, read_split

__all__ = ["Data", "ImageDataset", "PathDataset", "Split", "check", "few_shot", "open", "read_split", "stress"]
