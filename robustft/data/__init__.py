"""Data: labelled images in memory, and GlyphWorld, the benchmark that ships with the package."""

from robustft.data.images import ImageDataset

__all__ = ["ImageDataset"]
