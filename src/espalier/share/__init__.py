"""Sharing: few distinct values, or one structure, for many weights."""

from espalier.core.registry import register
from espalier.share.by_fft import by_fft
from espalier.share.circulant import Circulant
from espalier.share.hashed import Hashed
from espalier.share.kmeans import KMeans
from espalier.share.monarch import Monarch
from espalier.share.sharing import Sharing
from espalier.share.tied import Tied
from espalier.share.toeplitz import Toeplitz

METHODS = register("share", (KMeans, Circulant, Toeplitz, Monarch, Hashed, Tied))

__all__ = ["Circulant", "Hashed", "KMeans", "Monarch", "Sharing", "Tied", "Toeplitz", "by_fft"]
