"""Representations -> the bytes of one .espalier file. Same input, same bytes: no clock, host or path inside."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt, UsageError, did_you_mean
from espalier.core.files import write_atomic
from espalier.core.representation import Affine, Codebook, Dense, Masked, Outliers, Representation
from espalier.core.structures.stored import Structured
from espalier.encode.bits import deflate
from espalier.encode.coder import Coder, Hint
from espalier.encode.coders import resolve, smallest
from espalier.encode.compiled import announce
from espalier.encode.header import Header, PartEntry, PoolEntry, TensorEntry, pack_header
from espalier.encode.info import FileInfo, describe
from espalier.encode.read_header import parse

Array = NDArray[Any]
Floats = Literal["fp32", "fp16"]
POOLED = 4096  # elements of the largest part that shares a blob with its like


def narrowed(representation: Representation) -> Representation:
    """The same tensor with float32 values, centroids and scales as float16, where that keeps them finite."""
    if isinstance(representation, Masked):
        return replace(representation, inner=narrowed(representation.inner))
    if isinstance(representation, Outliers):
        return replace(representation, inner=narrowed(representation.inner), exact=narrowed(representation.exact))
    if isinstance(representation, Structured):
        return replace(representation, parts={name: narrowed(part) for name, part in representation.parts.items()})
    if isinstance(representation, Dense) and representation.stored == "float32":
        return representation.narrowed("float16")
    if isinstance(representation, Codebook):
        return replace(representation, centroids=_half(representation.centroids))
    if isinstance(representation, Affine):
        return replace(representation, scale=_half(representation.scale))
    return representation


def _half(values: Array) -> Array:
    if values.dtype != np.float32:
        return values
    with np.errstate(over="ignore", under="ignore"):
        found = values.astype(np.float16)
    same = np.array_equal(np.isfinite(found), np.isfinite(values)) and np.array_equal(found == 0, values == 0)
    return found if same else values


def hint_of(representation: Representation, part: str) -> Hint | None:
    """What the codes of integer part ``part`` mean, where its representation says so."""
    if part.startswith("inner.") and isinstance(representation, Masked):
        return hint_of(representation.inner, part.removeprefix("inner."))
    if isinstance(representation, Outliers) and "." in part:
        place, _, rest = part.partition(".")
        return hint_of(representation.inner if place == "inner" else representation.exact, rest)
    if isinstance(representation, Structured):
        place, _, rest = part.partition(".")
        return hint_of(representation.parts[place], rest)
    if part == "mask":
        return Hint(0)
    if part == "codes" and isinstance(representation, Affine) and representation.zero is not None:
        return Hint(representation.zero)
    if part == "indices" and isinstance(representation, Codebook) and representation.axis is None:
        centroids = representation.centroids
        if np.isfinite(centroids).all() and (np.diff(centroids) >= 0).all():
            return Hint(int(np.searchsorted(centroids, 0)))
        if representation.has_zero and np.isfinite(centroids).all() and (np.diff(centroids[1:]) >= 0).all():
            return Hint(0, negatives=int((centroids[1:] < 0).sum()))
    return None


def checksum(stored: bytes, decoded: bytes, start: int = 0) -> int:
    """CRC-32 over the stored, then the decoded bytes, continuing ``start``."""
    return zlib.crc32(decoded, zlib.crc32(stored, start))


def canonical_bytes(values: Array) -> bytes:
    """The decoded bytes a checksum runs over: C order, little-endian."""
    return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


class _Builder:
    """Collects blobs and their checksums in file order."""

    def __init__(self, coders: tuple[Coder, ...]) -> None:
        self.coders = coders
        self.blobs: list[bytes] = []
        self.checksums: list[int] = []
        self.pools: dict[tuple[str, str], list[Array]] = {}

    def tensor(self, name: str, representation: Representation) -> TensorEntry:
        meta, parts = representation.state()
        entries, crc, owns = [], 0, False
        for part, values in parts.items():
            entry = PartEntry(part, values.dtype.name, values.shape)
            small = values.size <= POOLED and entry.pool[1] not in ("mask", "indices", "codes")
            if small or values.size == 0:
                if values.size:
                    self.pools.setdefault(entry.pool, []).append(values)
            else:
                coder, blob = smallest(values, self.coders, hint_of(representation, part))
                crc, owns = checksum(blob, canonical_bytes(values), crc), True
                self.blobs.append(blob)
                entry = replace(entry, coder=coder, size=len(blob))
            entries.append(entry)
        if owns:
            self.checksums.append(crc)
        return TensorEntry(name, representation.kind, representation.shape, tuple(entries), representation.dtype, meta)

    def pooled(self) -> tuple[PoolEntry, ...]:
        found = []
        for (dtype, name), arrays in self.pools.items():
            values = np.concatenate([array.ravel() for array in arrays])
            coder, blob = smallest(values, self.coders)
            self.blobs.append(blob)
            self.checksums.append(checksum(blob, canonical_bytes(values)))
            found.append(PoolEntry(dtype, name, coder, len(blob)))
        return tuple(found)

    def opaque(self, data: bytes | None) -> tuple[int, int] | None:
        if not data:
            return None
        stored = min(data, deflate(data), key=len)
        self.blobs.append(stored)
        self.checksums.append(checksum(stored, data))
        return len(data), len(stored)


def _plans_text(plans: Sequence[Any]) -> bytes:
    try:
        return (
            json.dumps(list(plans), separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
            if plans
            else b""
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"plans must be plain JSON (no NaN): {error}") from error


def build(
    tensors: Mapping[str, Representation],
    *,
    aliases: Mapping[str, str] | None = None,
    graph: bytes | None = None,
    plans: Sequence[Any] = (),
    model: str = "",
    coders: Iterable[str | Coder] = ("adaptive", "rans", "huffman"),
    floats: Floats = "fp32",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[bytes, FileInfo]:
    """``(file, account)``. ``tensors`` in the order they get in the file; ``aliases``: tied name -> name of a tensor;
    ``graph``: opaque bytes; ``plans``: a JSON list; ``floats``: precision of values, centroids and scales;
    ``progress(done, total)`` is told the elements coded after each tensor.

    Raises ``UsageError`` for names, aliases, plans or meta that a file cannot hold.
    """
    if floats not in ("fp32", "fp16"):
        raise UsageError(f"floats={floats!r}.{did_you_mean(str(floats), ('fp32', 'fp16'))}")
    if floats == "fp16":
        tensors = {name: narrowed(representation) for name, representation in tensors.items()}
    announce(sum(representation.numel for representation in tensors.values()))
    builder = _Builder(resolve(coders))
    entries, done, total = [], 0, sum(representation.numel for representation in tensors.values())
    for name, representation in tensors.items():
        entries.append(builder.tensor(name, representation))
        done += representation.numel
        if progress is not None:
            progress(done, total)
    pools = builder.pooled()
    header = Header(
        model, tuple(entries), pools, dict(aliases or {}), builder.opaque(graph), builder.opaque(_plans_text(plans))
    )
    try:
        parse(header.to_json().encode())
    except (Corrupt, TypeError, ValueError) as error:
        raise UsageError(f"this cannot be written to a file: {error}") from error
    head = pack_header(header, builder.checksums)
    return head + b"".join(builder.blobs), describe(header, len(head) - 32, tensors)


def encode(tensors: Mapping[str, Representation], **options: Any) -> bytes:
    """The bytes of the file; options and errors as :func:`build`."""
    return build(tensors, **options)[0]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Representation], **options: Any) -> FileInfo:
    """Write the file all or nothing and return where its bytes went; options as :func:`build`.

    Raises ``RunError`` when ``path`` cannot be written (disk full, no such folder); an existing file then stays.
    """
    data, info = build(tensors, **options)
    write_atomic(path, data)
    return info
