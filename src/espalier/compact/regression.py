"""Regression of a block on the inputs and outputs of a layer: least squares where it is closed, Adam for the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.core.blocks import Add, Branches, ChannelShuffle, First
from espalier.train.layers import as_matrix, columns, damped, from_matrix

DAMPING = 1e-5
"""Pulls the closed solution to where it started, so that inputs that were not seen keep their weights."""
ROWS = 40
"""Rows of inputs for each column of the closed form; more change little."""
CHUNK = 32


@dataclass(frozen=True)
class Pairs:
    """Inputs and outputs of a layer, samples first."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def split(self) -> tuple[Pairs, Pairs]:
        """Those to fit on, and every fifth to judge on; every second where there are fewer than ten."""
        held = torch.arange(len(self)) % (5 if len(self) >= 10 else 2) == 0
        return Pairs(self.x[~held], self.y[~held]), Pairs(self.x[held], self.y[held])


def error(block: nn.Module, pairs: Pairs) -> float:
    """The share of the variance of the outputs that ``block`` misses, in eval mode."""
    channel = _channel(pairs.y)
    rest = [dim for dim in range(pairs.y.ndim) if dim != channel]
    spread = float((pairs.y.double() - pairs.y.double().mean(rest, keepdim=True)).square().sum())
    missed = 0.0
    mode = block.training
    block.eval()
    with torch.no_grad():
        for start in range(0, len(pairs), CHUNK):
            part = slice(start, start + CHUNK)
            missed += float((block(pairs.x[part]) - pairs.y[part]).double().square().sum())
    block.train(mode)
    return missed / max(spread, 1e-30)


def _channel(y: Tensor) -> int:
    return y.ndim - 1 if y.ndim < 3 else 1


def regress(
    block: nn.Module, pairs: Pairs, *, least_squares: bool = True, steps: int, lr: float, samples: int,
    rng: torch.Generator, tell: Callable[[int, int], None],
) -> tuple[float, float]:  # fmt: skip
    """Fit ``block`` in place; returns its error before and after, both on samples held apart.

    Least squares (if asked for) first and last, ``steps`` of Adam on ``samples`` at a time between; what was best is
    kept. One sample alone is judged on.
    """
    fit, held = pairs.split()
    first = best = error(block, held)
    if not len(fit):
        return first, best
    kept = copy.deepcopy(block.state_dict())

    def judge() -> None:
        nonlocal best, kept
        now = error(block, held)
        if now < best:
            best, kept = now, copy.deepcopy(block.state_dict())
        else:
            block.load_state_dict(kept)

    if least_squares:
        solve_last(block, fit, rng)
        judge()
    if steps:
        _descend(block, fit, steps, lr, samples, rng, tell)
        judge()
    if steps and least_squares:
        solve_last(block, fit, rng)
        judge()
    return first, best


def _descend(
    block: nn.Module, fit: Pairs, steps: int, lr: float, samples: int, rng: torch.Generator,
    tell: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Adam on the squared error, the rate falling along a cosine; batch norms see the samples of each step."""
    scale = fit.y.float().var().clamp_min(1e-12)
    optimizer = torch.optim.Adam(block.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mode = block.training
    block.train()
    with torch.enable_grad():
        for step in range(steps):
            chosen = torch.randint(len(fit), (min(samples, len(fit)),), generator=rng)
            loss = F.mse_loss(block(fit.x[chosen]), fit.y[chosen]) / scale
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            tell(step + 1, steps)
    optimizer.zero_grad()
    block.train(mode)
    renormalise(block, fit.x)


def renormalise(block: nn.Module, x: Tensor) -> None:
    """Statistics of the batch norms inside ``block`` estimated again on ``x``: means over chunks of it."""
    norms = [part for part in block.modules() if isinstance(part, _BatchNorm)]
    if not norms:
        return
    mode, momenta = block.training, [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    block.train()
    with torch.no_grad():
        for part in torch.split(x, CHUNK):
            block(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    block.train(mode)


def solve_last(block: nn.Module, pairs: Pairs, rng: torch.Generator) -> None:
    """Set the last layer, or that of every branch at the end, by least squares on what reaches it; no Conv3d."""
    mode = block.training
    block.eval()
    with torch.no_grad():
        _solve(block, pairs.x, pairs.y, rng)
    block.train(mode)


def _solve(module: nn.Module, x: Tensor, y: Tensor, rng: torch.Generator) -> None:
    if isinstance(module, Branches):
        done = 0
        parts = [x] * len(module) if module.sizes is None else torch.split(x, list(module.sizes), 1)
        for child, part in zip(module, parts, strict=True):
            count = child(part[:1]).shape[1]
            _solve(child, part, y[:, done : done + count], rng)
            done += count
    elif isinstance(module, Add):
        others = [child for child in module if not isinstance(child, nn.Identity)]
        if len(others) == 1:
            _solve(others[0], x, y - (len(module) - 1) * x, rng)
    elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        _least_squares(module, x, y, rng)
    elif type(module) is nn.Sequential and len(module):
        *before, last = module
        if isinstance(last, ChannelShuffle):
            y = torch.channel_shuffle(y, y.shape[1] // last.groups)  # what it undoes
            *before, last = before
        if isinstance(last, First):  # outputs that it cuts off may stay as they are
            y = torch.cat([y, _through(before, x)[:, last.channels :]], 1)
            *before, last = before
        _solve(last, _through(before, x), y, rng)


def _through(row: Sequence[nn.Module], x: Tensor) -> Tensor:
    for child in row:
        x = torch.cat([child(part) for part in torch.split(x, CHUNK)])
    return x


def _least_squares(layer: nn.Linear | nn.Conv1d | nn.Conv2d, x: Tensor, y: Tensor, rng: torch.Generator) -> None:
    """min ||y - W x - b||^2 + damping ||W - W_start||^2, group by group, on a part of the places."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    matrix = as_matrix(layer.weight.detach()).double()
    size, width = len(matrix) // groups, matrix.shape[1] + (layer.bias is not None)
    places = y.numel() // y.shape[_channel(y)]
    share = min(1.0, (ROWS * width + 4096) / places)
    gram = matrix.new_zeros(groups, width, width)
    right = matrix.new_zeros(groups, width, size)
    for begin in range(0, len(x), CHUNK):
        part = slice(begin, begin + CHUNK)
        wanted = y[part].movedim(_channel(y), -1).flatten(0, -2)
        chosen = torch.arange(len(wanted))
        if share < 1:
            chosen = torch.randperm(len(wanted), generator=rng)[: max(1, round(share * len(wanted)))]
        chosen = chosen.to(x.device)
        for group, inputs in enumerate(columns(layer, x[part])):
            rows = inputs[chosen].double()
            if layer.bias is not None:
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            gram[group] += rows.T @ rows
            right[group] += rows.T @ wanted[chosen, group * size : (group + 1) * size].double()
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        start = matrix[part].T
        if layer.bias is not None:
            start = torch.cat([start, layer.bias.detach()[None, part].double()])
        if not bool(gram[group].diagonal().any()):
            continue
        metric = damped(gram[group], DAMPING)
        found = start + torch.linalg.solve(metric, right[group] - gram[group] @ start)
        if layer.bias is not None:
            layer.bias[part] = found[-1].to(layer.bias.dtype)
            found = found[:-1]
        matrix[part] = found.T
    layer.weight.copy_(from_matrix(matrix, layer.weight.shape))
