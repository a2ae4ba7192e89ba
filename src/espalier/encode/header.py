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
from typing import Any, NoReturn

from espalier.core.errors import Corrupt, LimitExceeded, NotOurFile, UnsupportedVersion
from espalier.encode.bits import deflate, inflate_prefix

MAGIC = b"\x89ESP\r\n\x1a\n"
MAJOR, MINOR = 1, 0
PREFIX = struct.Struct("<8sBBHIIIQ")
LARGEST_HEADER = 1 << 20
LONGEST_NAME = 512
LARGEST_RANK = 8
LARGEST_DIM = 1 << 31
DEEPEST = 16

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
            _trimmed([t.name, t.kind, list(t.shape), [_part_row(part, t.shape) for part in t.parts], t.dtype, t.meta], 4)
            for t in self.tensors
        ]
        pools = [[pool.dtype, pool.name, pool.coder, pool.size] for pool in self.pools]
        rows = [self.model, tensors, pools, self.aliases, list(self.graph or ()), list(self.plans or ())]
        return _dumps(_trimmed(rows, 1))


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _trimmed(row: list[Any], least: int) -> list[Any]:
    while len(row) > least and row[-1] in ("float32", {}, [], ()):
        row.pop()
    return row


def _part_row(part: PartEntry, shape: tuple[int, ...]) -> list[Any]:
    row: list[Any] = [part.name, part.dtype, part.coder, part.size] if part.coder else [part.name, part.dtype]
    return row if part.shape == shape else [*row, list(part.shape)]


def pack_header(header: Header, checksums: list[int]) -> bytes:
    """Prefix and stored header of a file whose blobs have these ``checksums``. Raises ``LimitExceeded`` when too long."""
    text = header.to_json().encode()
    if len(text) > LARGEST_HEADER:
        raise LimitExceeded(f"the header would be {len(text)} bytes; at most {LARGEST_HEADER} fit. Shorten names or meta.")
    stored = deflate(text, DICTIONARY) + b"".join(struct.pack("<I", checksum) for checksum in checksums)
    total = PREFIX.size + len(stored) + sum(header.sizes())
    head = PREFIX.pack(MAGIC, MAJOR, MINOR, 0, len(stored), len(text), 0, total)
    return head[:20] + struct.pack("<I", _checksum(head, stored)) + head[24:] + stored


def _checksum(head: bytes, stored: bytes) -> int:
    return zlib.crc32(stored, zlib.crc32(head[24:32], zlib.crc32(head[:20])))


def read_prefix(head: bytes, length: int) -> tuple[int, int]:
    """``(stored, decoded)`` header length out of the first 32 bytes of a file of ``length`` bytes.

    Raises ``NotOurFile``, ``UnsupportedVersion``, ``Corrupt`` or ``LimitExceeded``.
    """
    if head[:8] != MAGIC:
        raise NotOurFile(f"the file starts with {head[:8]!r}, an .espalier file with {MAGIC!r}")
    if len(head) < PREFIX.size:
        raise Corrupt(f"the file ends after {len(head)} bytes, within its prefix of {PREFIX.size}")
    _, major, _, flags, stored, decoded, _, total = PREFIX.unpack(head)
    if major != MAJOR or flags:
        raise UnsupportedVersion(
            f"the file has version {major}, flags {flags:#06x}; this reader knows version {MAJOR} without flags. "
            "Update espalier."
        )
    if total != length:
        raise Corrupt(f"the file says it has {total} bytes and has {length}: truncated or with something appended")
    if stored > LARGEST_HEADER or decoded > LARGEST_HEADER:
        raise LimitExceeded(f"a header of {max(stored, decoded)} bytes; at most {LARGEST_HEADER} are read")
    if PREFIX.size + stored > length:
        raise Corrupt(f"a header of {stored} bytes does not fit in a file of {length}")
    return stored, decoded


def unpack_header(head: bytes, stored: bytes, decoded: int) -> tuple[Header, list[int]]:
    """``(header, checksums)`` from the prefix and the stored header, every field checked."""
    if _checksum(head, stored) != PREFIX.unpack(head)[6]:
        raise Corrupt("the header's checksum does not match: the file is damaged")
    text, tail = inflate_prefix(stored, decoded, DICTIONARY)
    header = parse(text)
    if len(tail) != 4 * header.units():
        raise Corrupt(f"{len(tail)} bytes of checksums for {header.units()} checked units of 4")
    return header, list(struct.unpack(f"<{header.units()}I", tail))


def _refuse(what: object) -> NoReturn:
    raise Corrupt(f"the header is not as the format says: {what}")


def parse(text: bytes) -> Header:
    """The header out of hostile JSON: canonical, no duplicate keys, no floats, no deep nesting; else ``Corrupt``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            _refuse("a key stands twice")
        return dict(pairs)

    try:
        rows = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=_refuse, parse_float=_refuse)
        if _dumps(rows).encode() != text:
            _refuse("JSON that is not in canonical form")
    except (ValueError, RecursionError, OverflowError) as error:
        raise Corrupt(f"the header is no JSON: {type(error).__name__}") from error
    _check_depth(rows, 0)
    return _header(rows)


def _check_depth(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        _refuse(f"nested deeper than {DEEPEST}")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, depth + 1)


def _row(value: Any, *types: type, least: int) -> list[Any]:
    """``value`` as a list whose first ``least`` or more entries have ``types``; bool is not an int here."""
    if not isinstance(value, list) or not least <= len(value) <= len(types):
        _refuse(f"{str(value)[:80]!r} is not a row of {least} to {len(types)}")
    for item, kind in zip(value, types, strict=False):
        if not isinstance(item, kind) or isinstance(item, bool):
            _refuse(f"{str(item)[:80]!r} is no {kind.__name__}")
    return value


def check_name(name: object) -> str:
    """``name`` if it may name a tensor: 1 to 512 characters, no NUL, valid Unicode; else ``Corrupt``."""
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or "\0" in name:
        _refuse(f"the name {str(name)[:80]!r} is not 1 to {LONGEST_NAME} characters without NUL")
    try:
        name.encode()
    except UnicodeEncodeError:
        _refuse("a name is not valid Unicode")
    return name


def _shape(value: Any) -> tuple[int, ...]:
    row = _row(value, *[int] * LARGEST_RANK, least=0)
    if not all(0 <= dim < LARGEST_DIM for dim in row):
        _refuse(f"the shape {row} has a dimension outside 0 to {LARGEST_DIM - 1}")
    return tuple(row)


def _size(value: int) -> int:
    if not 0 <= value < 1 << 62:
        _refuse(f"a length of {value} bytes")
    return value


def _parse_part(value: Any, shape: tuple[int, ...]) -> PartEntry:
    own = isinstance(value, list) and len(value) > 2 and isinstance(value[2], str)
    row = _row(value, str, str, str, int, list, least=4) if own else _row(value, str, str, list, least=2)
    at = 4 if own else 2
    part = _shape(row[at]) if len(row) > at else shape
    if len(row) > at and part == shape:
        _refuse("a part repeats the shape of its tensor")
    return PartEntry(row[0], row[1], part, row[2] if own else "", _size(row[3]) if own else 0)


def _parse_tensor(value: Any) -> TensorEntry:
    row = _row(value, str, str, list, list, str, dict, least=4)
    shape = _shape(row[2])
    parts = tuple(_parse_part(part, shape) for part in row[3])
    if len({part.name for part in parts}) != len(parts):
        _refuse(f"tensor {row[0]!r} has two parts of one name")
    return TensorEntry(check_name(row[0]), row[1], shape, parts, *row[4:])


def _blob(value: Any) -> tuple[int, int] | None:
    row = _row(value, int, int, least=0)
    if len(row) == 1 or (row and not 0 <= row[1] <= row[0]):
        _refuse(f"{row} are no lengths of a blob")
    return (_size(row[0]), row[1]) if row else None


def _header(rows: Any) -> Header:
    model, tensors, pools, aliases, graph, plans = [
        *_row(rows, str, list, list, dict, list, list, least=1), *["", [], [], {}, [], []][len(rows) :]
    ]  # fmt: skip
    if len(model) > LONGEST_NAME:
        _refuse(f"a model name of {len(model)} characters")
    entries = tuple(_parse_tensor(tensor) for tensor in tensors)
    names = {entry.name for entry in entries}
    if len(names) != len(entries):
        _refuse("two tensors have one name")
    for alias, name in aliases.items():
        if check_name(alias) in names or name not in names:
            _refuse(f"the alias {alias!r} of {str(name)[:80]!r}: a new name for a tensor of the file was due")
    found = tuple(PoolEntry(row[0], row[1], row[2], _size(row[3])) for row in (_row(p, str, str, str, int, least=4) for p in pools))
    wanted = {part.pool for entry in entries for part in entry.parts if not part.coder and 0 not in part.shape}
    if {(pool.dtype, pool.name) for pool in found} != wanted or len(found) != len(wanted):
        _refuse("pools and the parts in them do not match")
    return Header(model, entries, found, aliases, _blob(graph), _blob(plans))
