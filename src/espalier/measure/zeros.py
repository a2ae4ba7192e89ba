"""Zeros that are run: linear layers by torch's sparse kernels, beside the same network dense.

torch multiplies compressed rows (CSR) and compressed blocks (BSR) on the processor; its 2:4 kernel is for CUDA, and
convolutions have none. A layer is run sparse only where that was measured faster.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.parametrize import plain
from espalier.core.task import Task
from espalier.measure.speed import Latency, latency
from espalier.measure.summary import sized_call

EDGES = (32, 16, 8, 4)
ZEROS, SMALLEST = 0.5, 4096
"""Share of zeros, and number of weights, from which a layer is tried."""
FILLED = 1.1
"""A block layout may store at most so many times the weights that are not zero."""


class SparseLinear(nn.Module):
    """A linear layer whose weight is stored by rows or by blocks; same outputs, no gradients."""

    def __init__(self, layer: nn.Linear, edge: int) -> None:
        super().__init__()
        weight = layer.weight.detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(beta state|invariant).*", category=UserWarning)
            self.weight = weight.to_sparse_bsr((edge, edge)) if edge else weight.to_sparse_csr()
        self.bias = layer.bias
        self.outputs = layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = torch.mm(self.weight, x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], self.outputs)
        return flat if self.bias is None else flat + self.bias


@dataclass(frozen=True)
class Layer:
    """One layer at the batch of the timing. ``layout``: ``rows`` or ``blocks of N``."""

    name: str
    zeros: float
    layout: str
    dense_ms: float
    sparse_ms: float


@dataclass(frozen=True)
class Zeros:
    """``dense`` and ``sparse``: the whole network; ``sparse`` is None where no layer was faster by itself."""

    layers: tuple[Layer, ...]
    dense: Latency | None
    sparse: Latency | None
    difference: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "dense": None if self.dense is None else self.dense.to_json(),
            "sparse": None if self.sparse is None else self.sparse.to_json(),
            "difference": self.difference,
        }

    def sentence(self) -> str:
        """What a reader of the report should know."""
        count = sum(layer.sparse_ms < layer.dense_ms for layer in self.layers)
        if self.dense is None or self.sparse is None:
            return (
                f"zeros: none of the {len(self.layers)} linear layers with half zeros or more is faster by torch's "
                "sparse kernels on this processor; they make the file smaller, not the network faster."
            )
        faster = "faster" if self.sparse.median_ms < self.dense.median_ms else "not faster as a whole"
        return (
            f"zeros: with {count} of {len(self.layers)} sparse linear layers run by torch's sparse kernels the network "
            f"is {faster}: {self.dense.median_ms:.3g} ms dense, {self.sparse.median_ms:.3g} ms sparse, batch "
            f"{self.dense.batch}."
        )


def edge_of(weight: Tensor) -> int:
    """The largest block edge at which the blocks that are not empty hold few zeros; 0: rows."""
    used = int(weight.count_nonzero())
    for edge in EDGES:
        if not used or weight.shape[0] % edge or weight.shape[1] % edge:
            continue
        tiles = weight.reshape(weight.shape[0] // edge, edge, weight.shape[1] // edge, edge).ne(0).any(3).any(1)
        if int(tiles.sum()) * edge * edge <= FILLED * used:
            return edge
    return 0


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], model: nn.Module) -> Any:
    return model(*args, **kwargs)


def run_zeros(model: nn.Module, task: Task, *, threads: int = 1, batch: int = 1, seconds: float = 2.0) -> Zeros | None:
    """Time ``model`` with its sparse linear layers run as such; None where it has none.

    ``seconds`` caps the timing of the layers, and that of the network.
    """
    bare = plain(copy.deepcopy(model)).eval()
    chosen = {
        name: module
        for name, module in bare.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.numel() >= SMALLEST
        and module.weight.device.type == "cpu"
        and 1 - int(module.weight.count_nonzero()) / module.weight.numel() >= ZEROS
    }
    if not chosen or seconds <= 0:
        return None
    args, kwargs = sized_call(task, bare, task.example(), batch)
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.setdefault(name, given[0].detach()))
        for name, module in chosen.items()
    ]
    with torch.no_grad():
        wanted = bare(*args, **kwargs)
    for handle in handles:
        handle.remove()
    other, layers = copy.deepcopy(bare), []
    for name, x in inputs.items():
        layer, edge = chosen[name], edge_of(chosen[name].weight)
        pair: dict[str, nn.Module] = {"dense": layer, "sparse": SparseLinear(layer, edge)}
        each = seconds / max(4, len(inputs))
        timed = latency(pair, partial(_call, (x,), {}), threads=threads, batch=batch, seconds=each)
        share = 1 - int(layer.weight.count_nonzero()) / layer.weight.numel()
        layout = f"blocks of {edge}" if edge else "rows"
        layers.append(Layer(name, share, layout, timed["dense"].median_ms, timed["sparse"].median_ms))
        if layers[-1].sparse_ms < layers[-1].dense_ms:
            parent, _, last = name.rpartition(".")
            setattr(other.get_submodule(parent), last, pair["sparse"])
    if not layers:
        return None
    if not any(isinstance(module, SparseLinear) for module in other.modules()):
        return Zeros(tuple(layers), None, None, 0.0)
    models = {"dense": bare, "sparse": other}
    timed = latency(models, partial(_call, args, kwargs), threads=threads, batch=batch, seconds=seconds)
    with torch.no_grad():
        found = other(*args, **kwargs)
    gap = 0.0
    if isinstance(found, Tensor):
        gap = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    return Zeros(tuple(layers), timed["dense"], timed["sparse"], gap)
