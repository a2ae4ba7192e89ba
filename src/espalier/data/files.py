"""Reading files that may be damaged or forged: every failure names the file and what was expected."""

from __future__ import annotations

import gzip
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from espalier.core.errors import DataError

Progress = Callable[[str, int, int], None]  # what, how much is done, of how much

UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, SyntaxError, MemoryError, NotImplementedError, RuntimeError),
    *(struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError),
)


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a parser raise into a ``DataError`` that names it."""
    try:
        yield
    except DataError:
        raise
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} cannot be used: {reason}. Expected {expected}. Replace the file, or name another folder."
        ) from error


def opened(path: Path) -> IO[bytes]:
    """The file's bytes as a stream, unpacked where its name ends in .gz."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """The next ``count`` bytes. Raises ``ValueError`` where the stream ends before."""
    data = stream.read(count)
    if len(data) != count:
        raise ValueError(f"it ends after {len(data)} of {count} bytes")
    return data


class Bounded:
    """A stream that refuses to give more than ``limit`` bytes: what a small archive may unpack to is capped."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Raises ``ValueError`` beyond the limit."""
        data = self.stream.read(self.left + 1 if size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("it unpacks to more bytes than the data set has")
        return data


def tar_members(path: Path, names: Collection[str], member_limit: int) -> dict[str, bytes]:
    """The contents of the named regular files of a .tar.gz, found by base name; nothing is written to disk.

    At most ``member_limit`` bytes each, and twice the sum of all for the archive. Raises ``ValueError``.
    """
    found: dict[str, bytes] = {}
    with gzip.open(path, "rb") as packed:
        stream = Bounded(cast("IO[bytes]", packed), 2 * member_limit * len(names))
        with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in names or not member.isreg():
                    continue
                if name in found or member.size > member_limit:
                    raise ValueError(f"its member {name} is there twice or larger than {member_limit} bytes")
                content = archive.extractfile(member)
                if content is not None:
                    found[name] = read_exactly(content, member.size)
        while stream.read(1 << 16):  # the checksum stands behind the last byte: without this it is never compared
            pass
    missing = sorted(set(names) - set(found))
    if missing:
        raise ValueError(f"it does not hold {', '.join(missing)}")
    return found
