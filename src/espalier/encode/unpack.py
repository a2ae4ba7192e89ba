"""An .espalier file as plain safetensors, written by hand: eight bytes of length, JSON, values."""

from __future__ import annotations

import json
import os
from typing import Any

from espalier.core.files import write_atomic
from espalier.core.representation import float32_to_bfloat16
from espalier.encode.archive import Source, open_file
from espalier.encode.writer import canonical_bytes

_SAFETENSORS = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def unpack(source: Source, out: str | os.PathLike[str], **limits: int) -> None:
    """Write all tensors and aliases as a plain safetensors file; errors as :func:`open_file`, and ``RunError``."""
    head: dict[str, dict[str, Any]] = {}
    blobs: list[bytes] = []
    at = 0
    with open_file(source, **limits) as archive:
        for name in [*archive.keys(), *archive.aliases]:
            values, dtype = archive.get(name), archive.dtype(name)
            blob = canonical_bytes(float32_to_bfloat16(values) if dtype == "bfloat16" else values)
            head[name] = {
                "dtype": _SAFETENSORS[dtype],
                "shape": list(values.shape),
                "data_offsets": [at, at + len(blob)],
            }
            blobs.append(blob)
            at += len(blob)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(out, len(text).to_bytes(8, "little") + text + b"".join(blobs))
