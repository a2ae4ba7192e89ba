"""BS-Fixed: the start by brute force, gradients as sums, frozen constants, digits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tests.quantize.binary_nets import accuracy, freezes_bit_for_bit, keeps_masks_and_tables, run, trained, view
from torch import nn
from torch.nn import functional as F

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.parametrize import slots
from espalier.core.task import Task
from espalier.quantize import Quantize
from espalier.quantize.binary import glorot
from espalier.quantize.bs_fixed import BSFixed, means, otsu


def split_error(values: torch.Tensor, low: torch.Tensor) -> float:
    parts = (values[low], values[~low])
    return sum(float((part - part.mean()).square().sum()) for part in parts if len(part))


def constants(method: BSFixed, weight: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[float, ...]:
    state = method.start(weight, 1, 0, kept)
    c1, c2, unit, threshold = (float(state[name].detach()) for name in ("c1", "c2", "unit", "threshold"))
    return c1 * unit, c2 * unit, threshold


@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_the_best_of_all_splits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(40, generator=generator).double().exp()  # lopsided
    ordered = values.sort().values
    best = min(split_error(values, values <= cut) for cut in ordered[:-1])
    threshold = otsu(values)
    assert split_error(values, values < threshold) == pytest.approx(best)
    low, high = means(values, threshold)
    assert threshold == pytest.approx((low + high) / 2, abs=float(ordered.diff().max()))  # a fixed point of 2-means


def test_otsu_of_equal_values_and_of_one() -> None:
    assert otsu(torch.full((4,), 0.5)) == 0.5
    assert otsu(torch.tensor([3.0])) == 3.0
    assert means(torch.tensor([1.0, 3.0]), 0.0) == (-2.0, 2.0)
    assert means(torch.tensor([-1.0, -3.0]), 0.0) == (-2.0, 2.0)
    assert means(torch.tensor([]), 0.0) == (-0.0, 0.0)


def test_three_starts() -> None:
    weight = torch.tensor([[-1.0, -3.0, 2.0, 6.0, 9.0]])
    wanted = {
        "sign": (-2.0, 17 / 3, 0.0),
        "otsu": (-2 / 3, 7.5, 4.0),
        "glorot": (-glorot((1, 5)), glorot((1, 5)), 0.0),
    }
    for init, numbers in wanted.items():
        assert constants(BSFixed(init=init), weight) == pytest.approx(numbers)


def test_gradients_are_sums_over_the_members() -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5)
    w = view(BSFixed(), weight, training=True)
    BSFixed().quantize(w).backward(gradient)
    below = weight.detach() < 0
    assert torch.allclose(w.state["c1"].grad, gradient[below].sum() * w.state["unit"])
    assert torch.allclose(w.state["c2"].grad, gradient[~below].sum() * w.state["unit"])
    assert torch.equal(weight.grad, gradient)


def test_kept_weights_alone_make_the_constants() -> None:
    weight, kept = torch.tensor([[-1.0, 5.0, 9.0]]), torch.tensor([[True, True, False]])
    assert constants(BSFixed(), weight, kept) == pytest.approx((-1.0, 5.0, 0.0))


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, torch.Tensor]] = []

    def loss(self, loop: Loop, batch: object, output: object, loss: torch.Tensor) -> torch.Tensor:
        slot = slots(loop.model)["0.weight"]
        self.seen.append((float(slot.form.state["c2"].detach()), slot.latent.detach().clone()))
        return loss


@pytest.mark.parametrize(("constants", "changes"), [("trained", 9), ("frozen", 4)])
def test_frozen_constants_stand_still_after_the_warm_up(
    constants: str, changes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    torch.manual_seed(0)
    task = Task(train=[(torch.randn(8, 6), torch.randn(8, 3))], loss=F.mse_loss)
    train = Quantize.train
    monkeypatch.setattr(
        Quantize,
        "train",
        lambda self, *args, callbacks, **more: train(self, *args, callbacks=(*callbacks, watch), **more),
    )
    method = BSFixed(constants=constants, warmup=0.4)
    Quantize(weights=method, ends="same", epochs=10, lr=0.05)(nn.Sequential(nn.Linear(6, 3)), Context(task=task))
    values = [value for value, _ in watch.seen]
    assert [a != b for a, b in pairwise(values)] == [True] * changes + [False] * (9 - changes)
    assert all(not torch.equal(a[1], b[1]) for a, b in pairwise(watch.seen))


@pytest.mark.parametrize("init", ["sign", "otsu", "glorot"])
def test_frozen_form(init: str) -> None:
    freezes_bit_for_bit(BSFixed(init=init))


def test_masks_and_tables_stay() -> None:
    keeps_masks_and_tables(BSFixed())


def test_digits() -> None:
    result = run(trained("cnn"), weights=BSFixed(), epochs=2, lr=3e-3)
    assert accuracy(result) > 94
    assert len(slots(result)["4.weight"].value().unique()) == 2


def test_warm_up_is_a_share() -> None:
    with pytest.raises(UsageError, match="warmup"):
        BSFixed(warmup=1.5)
