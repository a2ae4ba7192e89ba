"""Parts of kernels: only convolutions have some; patterns by brute force, on schedules, after other steps, in files."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.task import classification
from espalier.data import standard
from espalier.prune import KernelParts, KernelPatterns, Linear, Magnitude, Prune, Random
from espalier.prune.kernel_patterns import dictionary, fitted
from espalier.prune.masks import outputs_first
from espalier.prune.parts import Pattern
from espalier.testing import bits, effective, frozen_copy


def shapes_of(mask: Tensor) -> set[tuple[bool, ...]]:
    """The distinct patterns of a mask (out, in, *kernel)."""
    return {tuple(kernel) for kernel in mask.flatten(2).flatten(0, 1).tolist()}


def by_hand(weight: np.ndarray[Any, Any], n: int, size: int) -> tuple[list[tuple[int, ...]], np.ndarray[Any, Any]]:
    """The dictionary, most frequent first, and per kernel the most that any of its patterns keeps."""
    kernels = np.abs(weight).reshape(weight.shape[0] * weight.shape[1], -1).astype(np.float64)
    positions = range(kernels.shape[1])
    natural = Counter(
        max(itertools.combinations(positions, n), key=lambda p: kernel[list(p)].sum()) for kernel in kernels
    )
    cut = sorted(natural.values(), reverse=True)[min(size, len(natural)) - 1]
    found = [p for p, count in natural.items() if count > cut]
    tied = [p for p, count in natural.items() if count == cut]
    assert len(found) < size
    return found + tied, kernels


@given(outputs=st.integers(1, 6), inputs=st.integers(1, 6), n=st.integers(1, 3), size=st.integers(1, 6),
       side=st.integers(2, 3), seed=st.integers(0, 50))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_patterns_by_brute_force(outputs: int, inputs: int, n: int, size: int, side: int, seed: int) -> None:
    weight = torch.randn(outputs, inputs, side, side, generator=torch.Generator().manual_seed(seed))
    pattern = KernelPatterns(n=n, patterns=size)
    stays = ~pattern.spread(pattern.removed(pattern.pool(weight, "l1"), 1.0), weight.shape)
    allowed, kernels = by_hand(weight.numpy(), n, size)
    used = {tuple(np.flatnonzero(shape).tolist()) for shape in shapes_of(stays)}
    assert used <= set(allowed)
    assert len(used) <= size
    table = dictionary(weight.abs().flatten(2).flatten(0, 1), n, size)
    chosen = [tuple(np.flatnonzero(row).tolist()) for row in table.numpy()]
    assert len(chosen) == len(set(chosen)) <= size
    for kernel, mask in zip(kernels, stays.flatten(2).flatten(0, 1).numpy(), strict=True):
        best = max(kernel[list(shape)].sum() for shape in chosen)
        assert kernel[mask].sum() == pytest.approx(best, rel=1e-5)
        assert mask.sum() == n


def test_the_most_frequent_shapes_are_the_dictionary() -> None:
    cross, corner, rare = torch.eye(9, dtype=torch.bool)[torch.tensor([[1, 3, 5], [0, 1, 3], [6, 7, 8]])].any(1)
    scores = torch.cat([cross.float().expand(5, 9), corner.float().expand(3, 9), rare.float().expand(1, 9)])
    found = dictionary(scores, 3, 2)
    assert found.tolist() == [cross.tolist(), corner.tolist()]
    assert fitted(torch.tensor([[9.0, 2, 0, 2, 0, 2, 0, 0, 0]]), found).tolist() == [corner.tolist()]
    assert len(dictionary(scores, 3, 8)) == 3, "no more shapes than there are"


def test_a_schedule_fills_kernel_after_kernel() -> None:
    pattern, scores = (
        KernelPatterns(n=4, patterns=3),
        torch.rand(6, 5, 3, 3, generator=torch.Generator().manual_seed(1)),
    )
    end, before = pattern.removed(scores, 1.0), torch.zeros_like(scores, dtype=torch.bool)
    assert not pattern.removed(scores, 0.0).any()
    for share in (0.1, 0.4, 0.9, 1.0):
        now = pattern.removed(scores, share)
        assert not (before & ~now).any()
        assert not (now & ~end).any()
        assert int(now.sum()) == int(share * 30 + 1e-9) * 5
        before = now


@given(seed=st.integers(0, 50), size=st.integers(1, 5), prior=st.booleans())
@settings(max_examples=30, deadline=None)
def test_shapes_in_use_stay_in_use_whatever_the_scores_do(seed: int, size: int, prior: bool) -> None:
    """As in training: what is gone scores -inf, the rest moves between two updates."""
    pattern, generator = KernelPatterns(n=4, patterns=size), torch.Generator().manual_seed(seed)
    kept = torch.ones(7, 6, 3, 3, dtype=torch.bool)
    if prior:
        kept[2:4, 1] = False  # whole kernels, by an earlier step
    alive = kept.clone()
    for share in (0.2, 0.5, 0.8, 1.0):
        scores = torch.randn(kept.shape, generator=generator).masked_fill(~kept, -torch.inf)
        kept = kept & ~pattern.removed(scores, share)
    counts = kept.flatten(2).sum(2)
    assert (counts[alive.flatten(2).all(2)] == 4).all()
    assert len(shapes_of(kept) - {(False,) * 9}) <= size


def test_what_is_gone_decides_only_where_nothing_else_does() -> None:
    scores = torch.rand(40, 9, generator=torch.Generator().manual_seed(0))
    scores[:20, :6] = -torch.inf  # 3 of 4 entries at most
    found = fitted(scores, dictionary(scores, 4, 4))
    assert (found.sum(1) == 4).all()
    assert (dictionary(torch.full((3, 9), -torch.inf), 4, 2).sum(1) == 4).all()
    assert (fitted(torch.full((3, 9), -torch.inf), torch.eye(9, dtype=torch.bool)).sum(1) == 1).all()
    huge = torch.full((2, 2, 3, 3), torch.inf)
    assert (KernelPatterns().removed(huge, 1.0).flatten(2).sum(2) == 5).all()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def test_patterns_as_a_step_and_in_a_file() -> None:
    splits = standard("digits")
    context = Context(task=classification(splits.train, splits.val, splits.test))
    method = Prune(pattern=KernelPatterns(n=4, patterns=5), epochs=2, schedule=Linear(), every=7, lr=1e-2)
    result = method.transform(network(), context)
    for name in ("0.weight", "2.weight", "5.weight"):
        slot = slots(result)[name]
        kept = outputs_first(slot, slot.form.mask)  # type: ignore[union-attr]
        assert (kept.flatten(2).sum(2) == 4).all()
        assert len(shapes_of(kept)) <= 5
        assert context.record.details["sparsity"][name] == pytest.approx(5 / 9)
    reasons = {row["name"]: row["reason"] for row in context.record.skipped}
    assert "1 positions, and n=4 of each stay" in reasons["4.weight"]
    assert "no kernel" in reasons["7.weight"]
    assert bits(frozen_copy(result, through_file=True).state_dict()) == bits(frozen_copy(result).state_dict())
    images = next(iter(splits.val))[0]
    assert torch.equal(frozen_copy(result, through_file=True).eval()(images), result.eval()(images))


def test_the_best_patterns_keep_more_than_those_of_chance() -> None:
    left = {}
    for criterion in (Magnitude(), Random()):
        pruned = Prune(criterion=criterion, pattern=KernelPatterns(), layers=("0", "2", "5"))(network())
        left[criterion.id] = sum(float(w.abs().sum()) for w in effective(pruned).values())
    assert left["magnitude"] > left["random"]


class Parameters(nn.Module):
    """Two parameters of three and four dimensions that are no convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.bias_table = nn.Parameter(torch.rand(1, 5, 16)), nn.Parameter(torch.rand(2, 3, 4, 4))
        self.conv = nn.Conv2d(2, 3, 3)


@pytest.mark.parametrize("pattern", [KernelParts(), KernelParts(part="kernel"), KernelPatterns()], ids=lambda p: p.id)
def test_only_convolutions_have_kernels(pattern: Any) -> None:
    refused = {name for name, slot in slots(Parameters()).items() if slot.latent.ndim > 2 and pattern.unfit(slot)}
    assert refused == {"position", "bias_table"}
    if not hasattr(Pattern, "unfit"):
        pytest.skip("prune.py does not ask the pattern about a slot yet")
    asked = {} if isinstance(pattern, KernelPatterns) else {"sparsity": 0.5}
    after = effective(Prune(pattern=pattern, **asked).transform(Parameters(), Context()))
    assert [name for name, weight in after.items() if (weight == 0).any()] == ["conv.weight"]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="patterns=0"):
        KernelPatterns(patterns=0)
    with pytest.raises(UsageError, match="pattern patterns decides the sparsity itself"):
        Prune(pattern=KernelPatterns(), sparsity=0.5)
