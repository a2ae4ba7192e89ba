"""GPTQ against the paper's update with an explicit inverse, on its grid, with pruned and shared weights."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.solver_nets import context_for, convolutional, digits_task, distance
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.forms import Mask, Shared, from_numpy
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, freeze, slots
from espalier.core.representation import Affine as AffineCodes
from espalier.core.task import Task
from espalier.quantize import Affine, Quantize
from espalier.quantize.gptq import GPTQ, natural, solve_columns, unit_upper
from espalier.quantize.grid import grid_for
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train.layers import as_matrix, columns


def problem(rows: int = 6, n: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a Hessian of correlated inputs, scales of 3-bit codes; float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=g, dtype=torch.float64)
    x = torch.randn(200, n, generator=g, dtype=torch.float64) @ mix
    w = torch.randn(rows, n, generator=g, dtype=torch.float64)
    return w, 2 * x.T @ x / 200, w.abs().amax(1, keepdim=True) / 3


def papers(w: Tensor, hessian: Tensor, scale: Tensor, kept: Tensor | None = None) -> Tensor:
    """Column by column with the inverse of what is left, as Optimal Brain Quantization writes it (eq. 2 and 3)."""
    w, inverse = w.clone(), torch.linalg.inv(hessian)
    solved = torch.zeros_like(w)
    for i in range(w.shape[1]):
        solved[:, i] = (w[:, i] / scale[:, 0]).round().clamp(-3, 3) * scale[:, 0]
        if kept is not None:
            solved[:, i] *= kept[:, i]
        error = (w[:, i] - solved[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    return solved


@pytest.mark.parametrize("block", [1, 7, 128])
def test_columns_are_solved_as_in_the_paper(block):
    w, hessian, scale = problem()
    upper = unit_upper(hessian)
    assert upper is not None
    assert torch.allclose(upper.diagonal(), torch.ones(30, dtype=torch.float64))
    solved = solve_columns(w, upper, scale, torch.zeros_like(scale), (-3, 3), block=block)
    assert torch.allclose(solved, papers(w, hessian, scale), atol=1e-12)
    nearest = (w / scale).round().clamp(-3, 3) * scale
    loss = [float(((v - w) @ hessian * (v - w)).sum()) for v in (solved, nearest)]
    assert loss[0] < loss[1]


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them():
    w, hessian, scale = problem(seed=1)
    kept = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    upper = unit_upper(hessian)
    assert upper is not None
    solved = solve_columns(w * kept, upper, scale, torch.zeros_like(scale), (-3, 3), kept=kept, block=8)
    assert torch.allclose(solved, papers(w * kept, hessian, scale, kept), atol=1e-12)
    assert not solved[~kept].any()


def test_a_group_takes_its_scale_from_the_weights_as_they_are_when_it_is_reached():
    w, hessian, _ = problem(seed=3)
    upper, group = unit_upper(hessian), 8
    assert upper is not None
    scale, zero = torch.ones(6, 4), torch.zeros(6, 4)

    def ranges(values: Tensor, _: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return grid_for(values.amin(1), values.amax(1), 3, symmetric=True)

    solved = solve_columns(w, upper, scale, zero, (-3, 3), group=group, ranges=ranges, block=5)
    now, inverse = w.clone(), torch.linalg.inv(hessian)
    for i in range(w.shape[1]):
        if i % group == 0:
            step = ranges(now[:, i : i + group])[0]
            assert torch.allclose(scale[:, i // group], step)
        error = (now[:, i] - solved[:, i]) / inverse[i, i]
        assert torch.allclose(solved[:, i], (now[:, i] / step).round().clamp(-3, 3) * step, atol=1e-9)
        now -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]


def test_a_hessian_of_patches_is_put_in_the_order_of_the_weight():
    layer = nn.Conv2d(4, 6, (3, 2), groups=2)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    patches = list(columns(layer, x))
    weight = layer.weight.detach().double()
    for patch, part in zip(patches, weight.chunk(2), strict=True):
        hessian = natural(patch.T @ patch, layer.weight.shape)
        flat, matrix = part.flatten(1), as_matrix(part)
        found, expected = ((flat @ hessian) * flat).sum(), (patch @ matrix.T).square().sum()
        assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(), GPTQ(act_order=True), GPTQ(symmetric=False), GPTQ(per="tensor"), GPTQ(per="group", group=20),
        GPTQ(per="group", group=20, act_order=True, symmetric=False), GPTQ(block=3),
    ],
)  # fmt: skip
def test_it_is_ahead_of_rounding_and_frozen_bit_for_bit(method):
    model, task = convolutional(), digits_task()
    plain = Affine(symmetric=method.symmetric, per=method.per, group=method.group)
    solved, rounded = (
        Quantize(weights=each, bits=3, ends="same")(model, Context(task=task)) for each in (method, plain)
    )
    assert distance(solved, model, task) < 0.5 * distance(rounded, model, task)
    assert bits(outputs(solved, task)) == bits(outputs(frozen_copy(solved, through_file=True), task))
    tensors, _ = freeze(solved)
    for name, slot in slots(solved).items():
        if name.endswith("weight"):
            assert isinstance(tensors[name], AffineCodes)
            stored = from_numpy(tensors[name].dense(), "float32")
            assert torch.equal(stored, slot.latent)  # the solved values are what is stored


def test_block_changes_nothing():
    model, task = convolutional(), digits_task()
    found = [Quantize(weights=GPTQ(block=b), bits=3)(model, Context(task=task)) for b in (16, 128)]
    assert distance(*found, task) < 1e-8


def test_masks_and_shared_values_are_kept():
    model, task = copy_model(convolutional()), digits_task()
    mask = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) > 0.6
    attach(slots(model)["5.weight"], Mask(mask))
    index = torch.randint(0, 5, (10, 32), generator=torch.Generator().manual_seed(1))
    attach(slots(model)["7.weight"], Shared(index, torch.linspace(-0.3, 0.3, 5), zero=False))
    done = Quantize(weights=GPTQ(), bits=4)(model, context_for(task))
    assert not slots(done)["5.weight"].value()[~mask].any()
    assert len(slots(done)["7.weight"].value().unique()) == 5
    rounded = Quantize(weights=Affine(), bits=4)(model, context_for(task))
    assert distance(done, model, task) < distance(rounded, model, task)
    assert bits(outputs(done, task)) == bits(outputs(frozen_copy(done), task))


def test_layers_it_cannot_solve_are_rounded_and_named():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(18, 3))
    task = Task(train=[(torch.arange(12).reshape(4, 3) % 7, torch.arange(4) % 3)])
    context = context_for(task)
    form = Quantize(weights=GPTQ(), bits=4).transform(model, context)
    assert any("0.weight was rounded to nearest" in note for note in context.record.notes)
    assert bool(slots(form)["0.weight"].value().isfinite().all())


def test_no_damping_with_dependent_inputs_is_refused():
    x = torch.randn(16, 1).expand(16, 6)
    task = Task(train=[(x, torch.arange(16) % 3)])
    with pytest.raises(NumericError, match="larger damping"):
        Quantize(weights=GPTQ(damping=0.0), bits=4)(nn.Sequential(nn.Linear(6, 3)), Context(task=task))
    zero = Task(train=[(torch.zeros(16, 6), torch.arange(16) % 3)])
    done = Quantize(weights=GPTQ(), bits=4)(nn.Sequential(nn.Linear(6, 3)), Context(task=zero))
    assert bool(slots(done)["0.weight"].value().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    x = torch.randn(32, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    task = Task(train=[(x, torch.arange(32) % 3)], val=[(x, torch.arange(32) % 3)])
    done = Quantize(weights=GPTQ(), bits=3)(model, Context(task=task))
    assert bits(outputs(done, task)) == bits(outputs(frozen_copy(done), task))


def test_pruned_weights_do_not_widen_the_range_of_their_group():
    w, hessian, _ = problem()
    kept = torch.rand(6, 30, generator=torch.Generator().manual_seed(4)) < 0.5
    seen = []

    def ranges(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(present.clone())
        return GPTQ(per="group", group=10)._ranges(3)(values, present)

    upper = unit_upper(hessian)
    scale, zero = torch.ones(6, 3), torch.zeros(6, 3, dtype=torch.int32)
    solve_columns(w * kept, upper, scale, zero, (-3, 3), kept=kept, group=10, ranges=ranges)
    assert torch.equal(torch.cat(seen, 1), kept)
    values, present = torch.tensor([[0.3, -9.0, 0.6]]), torch.tensor([[True, False, True]])
    assert float(GPTQ()._ranges(3)(values, present)[0]) == pytest.approx(0.2)
