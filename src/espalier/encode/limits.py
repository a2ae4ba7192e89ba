"""What a file may ask for: checked on the header, before anything is allocated."""

from __future__ import annotations

import math

import numpy as np

from espalier.core.errors import Corrupt, LimitExceeded
from espalier.core.representation import DTYPES
from espalier.encode.header import Header

PART_DTYPES = {
    name: np.dtype(name)
    for name in (
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    )
}
UNCHECKED = 1 << 26  # decoded bytes below which no ratio is suspicious


def check_limits(header: Header, length: int, max_elements: int, max_bytes: int, max_ratio: int) -> None:
    """Raise ``LimitExceeded`` for too many elements or bytes, ``Corrupt`` for an unknown dtype."""
    elements = size = 0
    for tensor in header.tensors:
        if tensor.dtype not in DTYPES:
            raise Corrupt(f"tensor {tensor.name!r} names the dtype {tensor.dtype!r}; known: {', '.join(DTYPES)}")
        numel = math.prod(tensor.shape)
        elements += numel
        size += numel * np.dtype(DTYPES[tensor.dtype]).itemsize
        for part in tensor.parts:
            if part.dtype not in PART_DTYPES:
                raise Corrupt(f"part {part.name!r} names the dtype {part.dtype!r}; known: {', '.join(PART_DTYPES)}")
            elements += math.prod(part.shape)
            size += math.prod(part.shape) * PART_DTYPES[part.dtype].itemsize
    size += sum(blob[0] for blob in (header.graph, header.plans) if blob)
    if elements > 2 * max_elements:
        raise LimitExceeded(
            f"the file holds {elements // 2} elements; at most {max_elements} are read. Raise max_elements."
        )
    if size > max_bytes:
        raise LimitExceeded(f"the file would take {size} bytes of memory; at most {max_bytes} are. Raise max_bytes.")
    if size > max(UNCHECKED, max_ratio * length):
        raise LimitExceeded(
            f"the file of {length} bytes would become {size}, more than {max_ratio} times as much. "
            "Raise max_ratio if you trust it."
        )
