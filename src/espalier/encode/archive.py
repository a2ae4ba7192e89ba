"""Reading an .espalier file: every byte is hostile until its checksum and its limits have been checked."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from espalier.core.errors import Corrupt, RunError, UnknownNameError, did_you_mean
from espalier.core.representation import Representation, from_state
from espalier.encode import coders
from espalier.encode.bits import inflate
from espalier.encode.compiled import announce
from espalier.encode.header import PREFIX, PartEntry, PoolEntry, TensorEntry
from espalier.encode.info import FileInfo, describe
from espalier.encode.limits import PART_DTYPES, check_limits
from espalier.encode.read_header import read_prefix, unpack_header
from espalier.encode.writer import canonical_bytes, checksum

Array = NDArray[Any]
Source = str | os.PathLike[str] | bytes


class Archive:
    """An open file. Tensors are decoded one by one, when asked for; keeps the file open until closed."""

    def __init__(self, source: Source, *, max_elements: int, max_bytes: int, max_ratio: int) -> None:
        self._max_bytes = max_bytes
        self._file, length = _open(source)
        try:
            head = self._file.read(PREFIX.size)
            stored, decoded = read_prefix(head, length)
            self._header_bytes = stored
            self._header, checksums = unpack_header(head, self._file.read(stored), decoded)
            self._place(PREFIX.size + stored, length, checksums)
            check_limits(self._header, length, max_elements, max_bytes, max_ratio)
        except BaseException:
            self._file.close()
            raise
        self._pools: dict[tuple[str, str], Array] = {}

    def _place(self, start: int, length: int, checksums: list[int]) -> None:
        """Give every blob its place, in header order; together they must cover the file exactly."""
        if start + sum(self._header.sizes()) != length:
            raise Corrupt(f"header and blobs cover {start + sum(self._header.sizes())} of {length} bytes")
        remaining = iter(checksums)
        self._tensors: dict[str, tuple[TensorEntry, int, int]] = {}
        for tensor in self._header.tensors:
            owns = any(part.coder for part in tensor.parts)
            self._tensors[tensor.name] = tensor, start, next(remaining) if owns else 0
            start += sum(part.size for part in tensor.parts)
        self._counts: dict[tuple[str, str], int] = {}
        self._first: dict[tuple[str, str], int] = {}
        for tensor in self._header.tensors:
            for part in tensor.parts:
                if not part.coder:
                    self._first[tensor.name, part.name] = self._counts.setdefault(part.pool, 0)
                    self._counts[part.pool] += math.prod(part.shape)
        self._pool_places: dict[tuple[str, str], tuple[PoolEntry, int, int]] = {}
        for pool in self._header.pools:
            self._pool_places[pool.dtype, pool.name] = pool, start, next(remaining)
            start += pool.size
        self._opaque: list[tuple[int, int, int, int] | None] = []
        for blob in (self._header.graph, self._header.plans):
            self._opaque.append((start, *blob, next(remaining)) if blob else None)
            start += blob[1] if blob else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def keys(self) -> tuple[str, ...]:
        """Names of the stored tensors, in file order (aliases are in :attr:`aliases`)."""
        return tuple(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def aliases(self) -> dict[str, str]:
        """Tied name -> name of the tensor it shares."""
        return dict(self._header.aliases)

    @property
    def model(self) -> str:
        """The model's name; empty when none was given."""
        return self._header.model

    @property
    def graph(self) -> bytes | None:
        """The opaque graph bytes, or None."""
        return self._read_opaque(0)

    @property
    def plans(self) -> list[Any]:
        """The plans, a JSON list."""
        text = self._read_opaque(1)
        try:
            found = json.loads(text) if text else []
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"the plans are no JSON: {type(error).__name__}") from error
        if not isinstance(found, list):
            raise Corrupt(f"the plans are a {type(found).__name__}, a list was due")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor or alias ``name``, without decoding."""
        return self._entry(name)[0].shape

    def dtype(self, name: str) -> str:
        """Dtype name of tensor or alias ``name``, without decoding."""
        return self._entry(name)[0].dtype

    def representation(self, name: str) -> Representation:
        """Tensor or alias ``name`` as stored; only its own blobs (and a shared pool) are read.

        Raises ``UnknownNameError``, ``Corrupt``.
        """
        tensor, start, expected = self._entry(name)
        parts, crc = {}, 0
        for part in tensor.parts:
            if part.coder:
                stored = self._read(start, part.size)
                start += part.size
                parts[part.name] = coders.decode(part.coder, stored, PART_DTYPES[part.dtype], part.shape)
                crc = checksum(stored, canonical_bytes(parts[part.name]), crc)
            else:
                parts[part.name] = self._from_pool(part, tensor.name)
        if crc != expected:
            raise Corrupt(f"the checksum of tensor {tensor.name!r} does not match: the file is damaged")
        return from_state(tensor.kind, tensor.shape, tensor.dtype, tensor.meta, parts)

    def get(self, name: str) -> Array:
        """The values of tensor or alias ``name``; bfloat16 comes as float32. Raises as :meth:`representation`."""
        return self.representation(name).dense()

    def verify(self) -> None:
        """Decode everything and check every checksum; raises ``Corrupt`` at the first fault."""
        announce(sum(math.prod(tensor.shape) for tensor, _, _ in self._tensors.values()))
        for name in self._tensors:
            self.get(name)
        _ = self.graph, self.plans

    def info(self) -> FileInfo:
        """Where every byte goes. Decodes the tensors, to tell positions from values."""
        return describe(self._header, self._header_bytes, {name: self.representation(name) for name in self._tensors})

    def _entry(self, name: str) -> tuple[TensorEntry, int, int]:
        found = self._tensors.get(self._header.aliases.get(name, name))
        if found is None:
            raise UnknownNameError(
                f"no tensor is called {name!r}.{did_you_mean(name, [*self._tensors, *self._header.aliases])}"
            )
        return found

    def _read(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(size)
        if len(data) != size:
            raise Corrupt(f"the file ends within a blob of {size} bytes at {start}: it was changed while open")
        return data

    def _from_pool(self, part: PartEntry, tensor: str) -> Array:
        dtype = PART_DTYPES[part.dtype]
        if 0 in part.shape:
            return np.zeros(part.shape, dtype=dtype)
        if part.pool not in self._pools:
            pool, start, expected = self._pool_places[part.pool]
            stored = self._read(start, pool.size)
            found = coders.decode(pool.coder, stored, dtype, (self._counts[part.pool],))
            if checksum(stored, canonical_bytes(found)) != expected:
                raise Corrupt(
                    f"the checksum of the pool of {pool.dtype} {pool.name} does not match: the file is damaged"
                )
            self._pools[part.pool] = found
        first = self._first[tensor, part.name]
        return self._pools[part.pool][first : first + math.prod(part.shape)].reshape(part.shape).copy()

    def _read_opaque(self, which: int) -> bytes | None:
        place = self._opaque[which]
        if place is None:
            return None
        start, decoded, size, expected = place
        stored = self._read(start, size)
        data = inflate(stored, decoded) if size < decoded else stored
        if checksum(stored, data) != expected:
            raise Corrupt(f"the checksum of the {('graph', 'plans')[which]} does not match: the file is damaged")
        return data


def _open(source: Source) -> tuple[BinaryIO, int]:
    if isinstance(source, bytes):
        return io.BytesIO(source), len(source)
    try:
        file = Path(source).open("rb")  # noqa: SIM115 - the archive closes it
        return file, file.seek(0, os.SEEK_END) + file.seek(0)
    except OSError as error:
        raise RunError(f"cannot read {str(source)!r}: {error.strerror or error}") from error


def open_file(
    source: Source, *, max_elements: int = 1 << 31, max_bytes: int = 1 << 33, max_ratio: int = 50_000
) -> Archive:
    """Open a path or the bytes of a file. Header and limits are checked at once, tensors when asked for.

    ``max_elements``, ``max_bytes``: of all tensors together, decoded; ``max_ratio``: decoded over stored bytes, above
    64 MiB decoded. Raises ``NotOurFile``, ``UnsupportedVersion``, ``Corrupt``, ``LimitExceeded``; ``RunError`` when
    the path cannot be read.
    """
    return Archive(source, max_elements=max_elements, max_bytes=max_bytes, max_ratio=max_ratio)


def verify(source: Source, **limits: int) -> None:
    """Decode everything, check every checksum; errors and ``limits`` as :func:`open_file`."""
    with open_file(source, **limits) as archive:
        archive.verify()


def info(source: Source, **limits: int) -> FileInfo:
    """Where every byte of the file goes; errors and ``limits`` as :func:`open_file`."""
    with open_file(source, **limits) as archive:
        return archive.info()
