"""Fetching published files: bounded, checked against their SHA-256, and put in place in one move."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from espalier.core.errors import DataError
from espalier.data.files import Progress
from espalier.data.sources import Remote

CHUNK = 1 << 18
TIMEOUT = 30.0  # seconds without an answer


class _RefusedError(Exception):
    """This URL did not give the file; the next may."""


def fetch(remote: Remote, folder: Path, *, progress: Progress | None = None, timeout: float = TIMEOUT) -> Path:
    """Download one file into ``folder``; ``progress`` hears bytes. The file appears whole and checked, or not at all.

    Raises ``DataError`` naming every URL tried and why it failed, or the folder that cannot be written.
    """
    target = folder / remote.name
    partial = folder / f".{remote.name}.{os.getpid()}.part"
    failures = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for url in remote.urls:
            try:
                _write(partial, remote, url, progress, timeout)
            except _RefusedError as reason:
                failures.append(f"{url}: {reason}")
            else:
                partial.replace(target)
                return target
    except OSError as error:
        raise DataError(
            f"{remote.name} could not be written to {folder}: {error.strerror or error}. "
            f"It needs {remote.size:,} bytes in a folder that can be written."
        ) from error
    finally:
        # Where the folder cannot be written there is nothing to remove, and the reason is on its way already.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    raise DataError(
        f"{remote.name} could not be downloaded: {'; '.join(failures)}. Check the network, or put the file into "
        f"{folder} yourself (SHA-256 {remote.sha256})."
    )


def _write(partial: Path, remote: Remote, url: str, progress: Progress | None, timeout: float) -> None:
    digest, received = hashlib.sha256(), 0
    with partial.open("wb") as out:
        for chunk in _chunks(url, timeout):
            received += len(chunk)
            if received > remote.size:
                raise _RefusedError(f"it sends more than the published {remote.size:,} bytes")
            digest.update(chunk)
            out.write(chunk)
            if progress is not None:
                progress(f"download {remote.name}", received, remote.size)
        out.flush()
        os.fsync(out.fileno())
    if received != remote.size:
        raise _RefusedError(f"it ended after {received:,} of {remote.size:,} bytes")
    if digest.hexdigest() != remote.sha256:
        raise _RefusedError(f"its SHA-256 is {digest.hexdigest()}, published is {remote.sha256}")


def _chunks(url: str, timeout: float) -> Iterator[bytes]:
    """The body of a URL. Every failure of the network becomes ``_RefusedError``, so that an OSError is the disk's."""
    if not url.startswith(("https://", "http://")):
        raise _RefusedError("only http and https are fetched")
    request = urllib.request.Request(url, headers={"User-Agent": "espalier"})  # noqa: S310  (scheme checked above)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
            while True:
                chunk = answer.read(CHUNK)
                if not chunk:
                    return
                yield chunk
    except urllib.error.HTTPError as error:
        raise _RefusedError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _RefusedError(str(error.reason)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _RefusedError(str(error) or type(error).__name__) from error
