"""Writing a file all or nothing, and saying plainly why it could not be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from espalier.core.errors import RunError


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Turn an operating-system refusal into a ``RunError`` that names the file and what to do."""
    try:
        yield
    except OSError as error:
        hint = (
            "The disk is full: free some space."
            if error.errno == errno.ENOSPC
            else "Check that the folder exists and may be written."
        )
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. {hint} What was there before is unchanged; "
            "an interrupted run goes on with --resume."
        ) from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str, *, parents: bool = False) -> Path:
    """Write ``data`` so that ``path`` holds the old or the new content at every moment; returns the path.

    ``parents``: make missing folders. Raises ``RunError`` where the system refuses.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.new")
    with written_to(target):
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)  # noqa: PTH105 - the atomic call, by its name
        except OSError:
            with suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise
    return target
