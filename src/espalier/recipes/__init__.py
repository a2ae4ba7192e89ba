"""Named recipes: where methods meet."""

from espalier.core.registry import register
from espalier.recipes.deep_compression import DeepCompression

METHODS = register("recipes", (DeepCompression,))

__all__ = ["DeepCompression"]
