"""Size: lengths of files. What the original would take as fp32 safetensors, and what a file takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from espalier.core.errors import ModelError
from espalier.core.parametrize import plain

# safetensors writes tensors by dtype in this order, then by name
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = list(_DTYPES)


def file_bytes(path: str | Path) -> int:
    """Length of a file in bytes."""
    return os.path.getsize(path)  # noqa: PTH202 - the length of the file, as the storage reference counts it


def fp32_safetensors_bytes(model: nn.Module) -> int:
    """Length in bytes of the file the plain model's state makes as safetensors with every float as fp32.

    Tied tensors count once, under their first name; integers and booleans keep their type; persistent buffers are
    state, other buffers are not. Extra state that is no tensor cannot stand in such a file and is left out.
    Raises ``ModelError`` for a dtype that safetensors does not know.
    """
    state = plain(model).state_dict(keep_vars=True)
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            distinct.setdefault(id(tensor), (name, tensor))
    return safetensors_bytes([(name, tuple(t.shape), _stored_dtype(name, t)) for name, t in distinct.values()])


def safetensors_bytes(tensors: list[tuple[str, tuple[int, ...], torch.dtype]]) -> int:
    """Length of a safetensors file: 8 bytes, a compact JSON header padded to a multiple of 8, the data.

    https://huggingface.co/docs/safetensors (format); ``tensors``: name, shape, dtype of each.
    """
    header, offset = {}, 0
    for name, shape, dtype in sorted(tensors, key=lambda t: (_ORDER.index(t[2]), t[0].encode())):
        count = 1
        for size in shape:
            count *= size
        end = offset + count * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + offset


def _stored_dtype(name: str, tensor: Tensor) -> torch.dtype:
    if tensor.is_floating_point():
        return torch.float32
    if tensor.is_complex():
        return torch.complex64
    if tensor.dtype not in _DTYPES:
        raise ModelError(
            f"{name} is {tensor.dtype}, which safetensors does not hold; convert it to a float or integer type first."
        )
    return tensor.dtype
