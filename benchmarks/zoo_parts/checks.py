"""What every pruned model must hold, whichever tool pruned it: one function per assertion."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.zoo_parts.models import relative
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

EXACT, EXPORTED, BUDGET = 1e-4, 1e-3, 0.02
"""Largest relative difference to a masked reference or a loaded file; to ONNX; kept parameters off one half."""

Row = dict[str, Any]


def parameters_of(model: nn.Module) -> int:
    """Trainable and frozen parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates for one sample as torch's own counter sees them (half its operations)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(_MATH):
        model(x)
    return counter.get_total_flops() // 2 // len(x)


_MATH = torch.nn.attention.SDPBackend.MATH  # the counter knows no fused attention of the processor


def output_of(model: nn.Module, x: Tensor) -> Any:
    """The result in eval mode, without gradients; ``model`` keeps its mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        result = model(x)
    model.train(training)
    return result


def shapes(tree: Any) -> list[tuple[int, ...]]:
    """Shapes of the tensors of a result."""
    return [tuple(leaf.shape) for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def attempt(row: Row, name: str, check: Callable[[], bool | None]) -> None:
    """Record under ``ok.NAME`` whether ``check`` holds (None: the tool does not offer it), and why it fails."""
    try:
        row["ok"][name] = check()
    except Exception as error:
        row["ok"][name] = False
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row["reasons"][name] = f"{type(error).__name__}: {(lines or [''])[0][:300]}"
    gc.collect()


def within(row: Row, name: str, difference: float, limit: float) -> bool:
    """Record a difference and whether it is within ``limit``."""
    row["differences"][name] = difference
    return difference <= limit


def onnx_agrees(model: nn.Module, x: Tensor, row: Row) -> bool:
    """Export, run in onnxruntime, compare."""
    import onnxruntime

    expected = output_of(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model.eval(), (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    tensors = [leaf for leaf in _pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    return within(row, "onnx", relative([torch.from_numpy(a) for a in found], tensors), EXPORTED)


def without_gradient(model: nn.Module, x: Tensor) -> tuple[set[str], float]:
    """Names of the parameters that take a gradient and get none in one backward pass, and the loss."""
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    generator = torch.Generator().manual_seed(1)
    outputs = [leaf for leaf in _pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]
    loss = torch.stack([(y * torch.randn(y.shape, generator=generator)).mean() for y in outputs]).sum()
    loss.backward()
    missing = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    return missing, float(loss.detach())


def trains(model: nn.Module, x: Tensor, row: Row, idle: set[str]) -> bool:
    """One step: finite loss, a gradient wherever the original gets one (``idle`` gets none), and it moves."""
    model = copy.deepcopy(model)
    missing, loss = without_gradient(model, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-30).step()
    after = dict(model.named_parameters())
    moving = [name for name, p in after.items() if p.grad is not None and bool(p.grad.any())]
    still = [name for name in moving if torch.equal(before[name], after[name])]
    lost = sorted(missing - idle)
    if lost or still or loss != loss:  # noqa: PLR0124 - NaN
        row["reasons"]["trains"] = f"loss {loss}; no gradient: {lost[:3]}; does not move: {still[:3]}"
        return False
    return abs(loss) < float("inf") and bool(moving)


def common_checks(row: Row, model: nn.Module, pruned: nn.Module, x: Tensor) -> bool:
    """Forward, shapes, budget, MACs. Says whether the pruned model runs at all."""
    row["parameters"] = [parameters_of(model), parameters_of(pruned)]
    kept = row["parameters"][1] / max(row["parameters"][0], 1)
    row["kept"] = round(kept, 4)
    results: list[Any] = []

    def run() -> bool:
        results.append(output_of(pruned, x))
        return True

    attempt(row, "runs", run)
    attempt(row, "budget", lambda: abs(kept - 0.5) <= BUDGET)
    if not results:
        return False
    expected = output_of(model, x)
    attempt(row, "same_shapes", lambda: shapes(results[0]) == shapes(expected))
    try:
        row["macs"] = [macs_of(model, x), macs_of(pruned, x)]
    except Exception as error:
        row["reasons"]["macs"] = f"{type(error).__name__}: {str(error)[:200]}"
    return True


def late_checks(
    row: Row, model: nn.Module, pruned: nn.Module, x: Tensor, onnx: Callable[..., bool] = onnx_agrees
) -> None:
    """ONNX and one training step; both leave ``pruned`` as it was. ``onnx``: how the tool exports, if not by torch."""
    attempt(row, "onnx", lambda: onnx(copy.deepcopy(pruned), x, row))

    def step() -> bool:
        idle, _ = without_gradient(copy.deepcopy(model), x)
        return trains(pruned, x, row, idle)

    attempt(row, "trains", step)
