"""The first bytes of an .espalier file: fixed prefix, header, checksums - as data, both ways.

    0   8  magic 89 'E' 'S' 'P' 0D 0A 1A 0A        16  4  length of the header as JSON
    8   1  major version; 9 minor; 10 flags (2)    20  4  CRC-32 of bytes 0..20, 24..32 and the header
    12  4  length of the header as stored          24  8  length of the file
    32     header: canonical JSON, raw-deflated with a preset dictionary, then one CRC-32 per checked unit
    ..     blobs, contiguous, in header order, up to the end of the file

The JSON is ``[model, tensors, pools, aliases, graph, plans]``, empty ends left out, where

    tensor  [name, kind, shape, parts, dtype, meta]          dtype "float32" and meta {} left out
    part    [name, dtype, coder, bytes, shape]               a blob of its own; shape left out when the tensor's
            [name, dtype, shape]                             a slice of the pool of its dtype and last name
    pool    [dtype, name, coder, bytes]                      small parts of all tensors, coded together
    graph, plans   [bytes decoded, bytes stored]             deflated where that is smaller

A checked unit is: each tensor with blobs of its own, each pool, the graph, the plans. Its checksum runs over
the stored bytes and then over the decoded ones: damage and a decoder that errs are both noticed.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from espalier.core.errors import LimitExceeded
from espalier.encode.bits import deflate

MAGIC = b"\x89ESP\r\n\x1a\n"
MAJOR, MINOR = 1, 0
PREFIX = struct.Struct("<8sBBHIIIQ")
LARGEST_HEADER = 1 << 20
LONGEST_NAME = 512

DICTIONARY = (
    b'"float64""int32""int16""bfloat16","stored":"bfloat16"embed.tokensattention.key.query.value.proj.masked"inner.values"'
    b'[["mask","bool","adaptive",{"inner":{"kind":"codebook"}}["inner.indices","inner.centroids""running_mean""running_var"'
    b'"num_batches_tracked",[]],[["values","int64",[]]]],"int64",{"stored":"float16"}"planes","packed","huffman","rans",'
    b'layers.0.stages.1.blocks.2.downsample.0.conv2.weight"linear.classifier.features.0.fc3.bn1.norm.'
    b'"affine",[["codes","int8","adaptive",["scale","float32",["zero_point","int32",[]]],"float32",{"axis":0,"bits":8}],'
    b'["float32","centroids","planes",["float16","centroids","planes",["float32","values","planes",["float16","values",'
    b'"planes",.bias","dense",[10],[["values","float16"]],"float32",{"stored":"float16"}],["fc2.bias","dense",[100],'
    b'[["values","float32"]]],["layer1.0.conv1.weight","codebook",[300,64,3,3],[["indices","uint8","adaptive",'
    b'1234],["centroids","float16",[16]]]],["centroids","float32",[16]]]],["fc1.weight","codebook",[["indices","uint8",'
    b'"adaptive",'
)
"""What headers tend to say: deflate points into it instead of spelling it out. Part of the format: never change it."""


@dataclass(frozen=True)
class PartEntry:
    """One array of a representation; ``coder`` "" means it lies in a pool."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    coder: str = ""
    size: int = 0

    @property
    def pool(self) -> tuple[str, str]:
        """The pool this part lies in: its dtype and last name."""
        return self.dtype, self.name.rpartition(".")[2]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[PartEntry, ...]
    dtype: str = "float32"
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PoolEntry:
    """Small parts of all tensors, coded together."""

    dtype: str
    name: str
    coder: str
    size: int


@dataclass(frozen=True)
class Header:
    """All that stands before the blobs. ``graph`` and ``plans``: ``(bytes decoded, bytes stored)``."""

    model: str
    tensors: tuple[TensorEntry, ...]
    pools: tuple[PoolEntry, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    graph: tuple[int, int] | None = None
    plans: tuple[int, int] | None = None

    def sizes(self) -> list[int]:
        """Stored bytes of every blob, in file order."""
        own = [part.size for tensor in self.tensors for part in tensor.parts if part.coder]
        extra = [blob[1] for blob in (self.graph, self.plans) if blob is not None]
        return own + [pool.size for pool in self.pools] + extra

    def units(self) -> int:
        """Number of checksums."""
        owners = sum(any(part.coder for part in tensor.parts) for tensor in self.tensors)
        return owners + len(self.pools) + (self.graph is not None) + (self.plans is not None)

    def to_json(self) -> str:
        """The canonical JSON text."""
        tensors = [
            _trimmed(
                [t.name, t.kind, list(t.shape), [_part_row(part, t.shape) for part in t.parts], t.dtype, t.meta], 4
            )
            for t in self.tensors
        ]
        pools = [[pool.dtype, pool.name, pool.coder, pool.size] for pool in self.pools]
        rows = [self.model, tensors, pools, self.aliases, list(self.graph or ()), list(self.plans or ())]
        return dumps(_trimmed(rows, 1))


def dumps(value: Any) -> str:
    """Canonical JSON: no blanks, no NaN."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _trimmed(row: list[Any], least: int) -> list[Any]:
    while len(row) > least and row[-1] in ("float32", {}, [], ()):
        row.pop()
    return row


def _part_row(part: PartEntry, shape: tuple[int, ...]) -> list[Any]:
    row: list[Any] = [part.name, part.dtype, part.coder, part.size] if part.coder else [part.name, part.dtype]
    return row if part.shape == shape else [*row, list(part.shape)]


def pack_header(header: Header, checksums: list[int]) -> bytes:
    """Prefix and stored header of a file whose blobs have these ``checksums``; ``LimitExceeded`` when too long."""
    text = header.to_json().encode()
    if len(text) > LARGEST_HEADER:
        raise LimitExceeded(
            f"the header would be {len(text)} bytes; at most {LARGEST_HEADER} fit. Shorten names or meta."
        )
    stored = deflate(text, DICTIONARY) + b"".join(struct.pack("<I", checksum) for checksum in checksums)
    total = PREFIX.size + len(stored) + sum(header.sizes())
    head = PREFIX.pack(MAGIC, MAJOR, MINOR, 0, len(stored), len(text), 0, total)
    return head[:20] + struct.pack("<I", header_checksum(head, stored)) + head[24:] + stored


def header_checksum(head: bytes, stored: bytes) -> int:
    """CRC-32 of the prefix without this checksum, and of the stored header."""
    return zlib.crc32(stored, zlib.crc32(head[24:32], zlib.crc32(head[:20])))
