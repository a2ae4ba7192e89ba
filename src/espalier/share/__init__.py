"""Sharing: few distinct values, or one structure, for many weights."""

from espalier.core.registry import register
from espalier.share.kmeans import KMeans

METHODS = register("share", (KMeans,))

__all__ = ["KMeans"]
