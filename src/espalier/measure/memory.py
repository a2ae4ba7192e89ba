"""Memory: the largest number of tensor bytes alive at once during a forward pass.

Every storage a torch operator returns is counted from its first appearance until it is freed, views once, under a
``TorchDispatchMode``. This is deterministic and the same on every machine; it leaves out what a kernel allocates
inside itself (convolution workspaces) and what the allocator and the interpreter add. It is no process size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from espalier.core.model import evaluating


@dataclass(frozen=True)
class PeakMemory:
    """Bytes: ``weights`` (parameters and buffers, as they lie in memory) and the peak of all else at ``batch``
    samples (None where it was not named).
    """

    weights: int
    activations: int
    batch: int | None = None

    @property
    def total(self) -> int:
        """Peak tensor bytes of the forward pass."""
        return self.weights + self.activations

    def to_json(self) -> dict[str, int]:
        """As plain data."""
        data = {"weights": self.weights, "activations": self.activations, "bytes": self.total}
        return data if self.batch is None else {**data, "batch": self.batch}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensor storages: ``live`` now, ``peak`` so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}

    def watch(self, tensors: Iterable[Any]) -> None:
        """Count the storages of ``tensors`` that are not counted yet."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            size -= self._seen[key][1]  # a storage that was resized
            if not size:
                return
            self._seen[key] = (self._seen[key][0], self._seen[key][1] + size)
        else:
            self._seen[key] = (weakref.ref(storage, lambda _: self._remove(key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._seen.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.watch(tree_leaves(result))
        return result


def peak_memory(model: nn.Module, call: Callable[[nn.Module], Any], inputs: Any = ()) -> PeakMemory:
    """Peak tensor bytes of ``call(model)`` in eval mode without gradients; ``inputs`` (a nest of tensors) count too.

    Give the plain model: a weight that is computed from latent values at every call counts as an activation.
    """
    mode = LiveBytes()
    mode.watch(model.parameters())
    mode.watch(model.buffers())
    weights = mode.live
    mode.watch(tree_leaves(inputs))
    with evaluating(model), mode:
        result = call(model)
    del result
    return PeakMemory(weights, mode.peak - weights)
