"""Small copies of the layouts that public image-text data has, each with the rows that it should give."""

from tests.data_layouts import annotations, conversations, folders, tables  # noqa: F401 - they add to LAYOUTS
from tests.data_layouts.made import LAYOUTS, Expected, lines, parquet, pictures, put

__all__ = ["LAYOUTS", "Expected", "lines", "parquet", "pictures", "put"]
