"""ExecuTorch files run: XNNPACK on the CPU, through the runtime's own Python module."""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from espalier.core.errors import ModelError, NeedError
from espalier.deploy.installed import need, quiet
from espalier.deploy.runtimes import Array, Session, first_line
from espalier.deploy.signature import Signature, unnamed

METHOD, ABOUT = "forward", "espalier_signature"
"""What a file can be asked for: the network, and how it is called."""


@dataclass(frozen=True)
class Calling:
    """How a file is called. ``largest``: samples it has memory for; None where the batch is fixed.

    ``shapes`` of the inputs, with None for an open batch; ``open_outputs``: which outputs have that batch first.
    """

    signature: Signature
    shapes: tuple[tuple[int | None, ...], ...]
    open_outputs: tuple[bool, ...]
    largest: int | None = None

    def to_json(self) -> str:
        """As compact JSON, stored in the file."""
        data = {
            "signature": json.loads(self.signature.to_json()), "shapes": self.shapes, "open": self.open_outputs,
            "largest": self.largest,
        }  # fmt: skip
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Calling:
        """Read :meth:`to_json`. Raises ``ModelError`` for anything else."""
        try:
            data = json.loads(text)
            shapes = tuple(tuple(None if n is None else int(n) for n in shape) for shape in data["shapes"])
            largest = None if data["largest"] is None else int(data["largest"])
            told = json.dumps(data["signature"])
            open_outputs = tuple(map(bool, data["open"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ModelError(
                f"the call stored in the file is not readable ({error}); export the model again."
            ) from error
        return cls(Signature.from_json(told), shapes, open_outputs, largest)

    def batch_of(self, arrays: Sequence[Array]) -> int | None:
        """Samples of a call, None where the batch is fixed. Raises ``ModelError`` for shapes the file has not."""
        batch = next(
            (a.shape[0] for a, s in zip(arrays, self.shapes, strict=True) if s[:1] == (None,) and a.ndim), None
        )
        for name, array, shape in zip(self.signature.inputs, arrays, self.shapes, strict=True):
            if array.shape != tuple(batch if n is None else n for n in shape):
                said = ", ".join("samples" if n is None else str(n) for n in shape)
                raise ModelError(f"the file takes {name!r} of shape ({said}); got {array.shape}.")
        return batch


class _Pool:
    """ExecuTorch's threads: one pool for the whole process, which must not change under a loaded method."""

    def __init__(self) -> None:
        self.sessions: weakref.WeakSet[ExecuTorch] = weakref.WeakSet()
        self.threads = 0

    def set(self, threads: int) -> None:
        """Have so many threads; methods loaded with another number are dropped, and load again when they run."""
        if self.threads == threads:
            return
        library = _library()
        for session in self.sessions:
            session.drop()
        gc.collect()
        with silent():
            library._unsafe_reset_threadpool(threads)
        self.threads = threads


_POOL = _Pool()


class ExecuTorch(Session):
    """A ``.pte`` file on the CPU. ``threads`` is the size of the process's pool while this session runs."""

    runtime = "executorch"

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(threads)
        self._path = path
        self._program: Any = None
        self._method: Any = None
        self._load()
        stored = self._stored()
        self._calling = None if stored is None else Calling.from_json(stored)
        if self._calling is not None:
            self.signature = self._calling.signature
        else:
            meta = self._load().metadata
            inputs = [f"input.{n}" for n in range(meta.num_inputs())]
            self.signature = unnamed(inputs, [f"output.{n}" for n in range(meta.num_outputs())])

    def drop(self) -> None:
        """Let go of the loaded method."""
        self._method = self._program = None

    def _load(self) -> Any:
        """The method, loaded under this session's number of threads."""
        _POOL.set(self.threads)
        if self._method is None:
            with silent():
                self._program = _runtime().load_program(str(self._path))
                self._method = self._program.load_method(METHOD)
            _POOL.sessions.add(self)
        return self._method

    def _stored(self) -> str | None:
        if ABOUT not in self._program.method_names:
            return None
        with silent():
            return str(self._program.load_method(ABOUT).execute([])[0])

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs in order; more samples than the file has memory for run in pieces, where all outputs allow it."""
        calling = self._calling
        if calling is not None:  # contiguous arrays have at least one axis
            arrays = [a.reshape(()) if s == () else a for a, s in zip(arrays, calling.shapes, strict=True)]
        batch = calling.batch_of(arrays) if calling is not None else None
        if calling is None or calling.largest is None or batch is None or batch <= calling.largest:
            return self._run(arrays)
        if not all(calling.open_outputs):
            raise ModelError(f"the file takes at most {calling.largest} samples at once; got {batch}.")
        pieces = [
            self._run([a[at : at + calling.largest] if s[:1] == (None,) else a
                       for a, s in zip(arrays, calling.shapes, strict=True)])
            for at in range(0, batch, calling.largest)
        ]  # fmt: skip
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _run(self, arrays: Sequence[Array]) -> list[Array]:
        found = self._load().execute([torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays])
        return [np.asarray(tensor.detach().numpy() if isinstance(tensor, torch.Tensor) else tensor) for tensor in found]


@cache
def _library() -> Any:
    """The runtime's module with what its public face leaves out."""
    need("running a file in ExecuTorch", "executorch")
    try:
        with quiet(), silent():
            from executorch.extension.pybindings import portable_lib
            from executorch.kernels import quantized  # noqa: F401 - registers what XNNPACK leaves of an int8 file
    except ImportError as error:
        raise NeedError(
            f"executorch is installed without its runtime ({first_line(error)}) Install the wheel of the extra: "
            "pip install 'espalier[executorch]'."
        ) from error
    return portable_lib


def _runtime() -> Any:
    _library()
    with quiet():
        from executorch.runtime import Runtime
    return Runtime.get()


@contextmanager
def silent() -> Iterator[None]:
    """Without what native code writes to standard error: what fails is said once, by us."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with redirect_stderr(io.StringIO()):  # some of it comes by way of Python
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
