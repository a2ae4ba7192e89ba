"""The header of an .espalier file out of hostile bytes: every field checked before anything relies on it."""

from __future__ import annotations

import json
import struct
from typing import Any, NoReturn

from espalier.core.errors import Corrupt, LimitExceeded, NotOurFile, UnsupportedVersion
from espalier.encode.bits import inflate_prefix
from espalier.encode.header import (
    DICTIONARY,
    LARGEST_HEADER,
    LONGEST_NAME,
    MAGIC,
    MAJOR,
    PREFIX,
    Header,
    PartEntry,
    PoolEntry,
    TensorEntry,
    dumps,
    header_checksum,
)

LARGEST_RANK = 8
LARGEST_DIM = 1 << 31
DEEPEST = 16


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
    if header_checksum(head, stored) != PREFIX.unpack(head)[6]:
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
    try:
        rows = json.loads(text.decode(), parse_constant=_refuse, parse_float=_refuse)
        if dumps(rows).encode() != text:  # also where a key stands twice
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
    given = _row(rows, str, list, list, dict, list, list, least=1)
    defaults: list[Any] = ["", [], [], {}, [], []]
    model, tensors, pools, aliases, graph, plans = given + defaults[len(given) :]
    if len(model) > LONGEST_NAME:
        _refuse(f"a model name of {len(model)} characters")
    entries = tuple(_parse_tensor(tensor) for tensor in tensors)
    names = {entry.name for entry in entries}
    if len(names) != len(entries):
        _refuse("two tensors have one name")
    for alias, name in aliases.items():
        if check_name(alias) in names or not isinstance(name, str) or name not in names:
            _refuse(f"the alias {alias!r} of {str(name)[:80]!r}: a new name for a tensor of the file was due")
    found = tuple(
        PoolEntry(row[0], row[1], row[2], _size(row[3]))
        for row in (_row(p, str, str, str, int, least=4) for p in pools)
    )
    wanted = {part.pool for entry in entries for part in entry.parts if not part.coder and 0 not in part.shape}
    if {(pool.dtype, pool.name) for pool in found} != wanted or len(found) != len(wanted):
        _refuse("pools and the parts in them do not match")
    return Header(model, entries, found, aliases, _blob(graph), _blob(plans))
