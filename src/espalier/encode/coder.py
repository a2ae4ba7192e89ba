"""What every entropy coder offers, and what the encoder may tell it about the integers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt
from espalier.core.method import Method

Array = NDArray[Any]


@dataclass(frozen=True)
class Hint:
    """What codes mean: ``zero`` is the code of a pruned weight.

    ``negatives``, where given, says that code 0 stands first out of order: in value order it belongs
    after the ``negatives`` codes that follow it (a codebook ``[0, -2, -1, 1, 2]`` has two).
    """

    zero: int
    negatives: int | None = None


@dataclass(frozen=True, kw_only=True)
class Coder(Method):
    """Array -> bytes -> the same array. ``decode`` treats its bytes as hostile."""

    kind: ClassVar[str] = "coder"

    @abstractmethod
    def encode(self, values: Array, hint: Hint | None = None, /) -> bytes | None:
        """The blob for ``values`` (any shape), or None where this coder does not apply."""

    @abstractmethod
    def decode(self, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The array of ``shape`` and ``dtype``. The caller has bounded ``shape``; raises ``Corrupt``."""


def in_range(low: int, last: int, dtype: np.dtype[Any]) -> None:
    """Raise ``Corrupt`` unless the codes ``low .. low + last`` all fit ``dtype``."""
    least, most = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if low < least or low + last > most:
        raise Corrupt(f"codes {low} to {low + last} do not fit {dtype}")
