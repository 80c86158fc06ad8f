"""Data sources: named, split, preprocessed for a model."""

from toolchain.data.batches import batches
from toolchain.data.sources import SOURCES, DataSource, open_source
from toolchain.data.splits import Images

__all__ = ["SOURCES", "DataSource", "Images", "batches", "open_source"]
