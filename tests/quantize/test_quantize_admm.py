"""ADMM: the projection by brute force, the updates and the extragradient by hand."""

from __future__ import annotations

import pytest
import torch
from tests.quantize.incremental_digits import (
    accuracy,
    check_common,
    check_resumes,
    digits,
    latent_of,
    quantized,
    trained,
    view,
)
from torch import Tensor, nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.errors import UsageError
from espalier.core.quantized import Weight
from espalier.core.task import Task
from espalier.quantize.admm import Admm, magnitudes, nearest, project
from espalier.quantize.quantize import Quantize
from espalier.testing.compare import bits
from espalier.train import SGD, Constant, Finetune


def test_the_sets_of_the_paper() -> None:
    assert magnitudes(1, "fitting") == (1,)
    assert magnitudes(2, "fitting") == (0, 1)
    assert magnitudes(3, "fitting") == (0, 1, 2, 4)
    assert magnitudes(3, "binary") == (1,)


@pytest.mark.parametrize("sizes", [(1,), (0, 1), (0, 1, 2, 4)])
def test_nearest_is_nearest(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values, alpha = torch.randn(500).double(), torch.tensor(0.37)
    members = sorted({s * sign for s in sizes for sign in (-1, 1)})
    expected = [min(members, key=lambda q: abs(v - 0.37 * q)) for v in values.tolist()]
    assert nearest(values, alpha, sizes).tolist() == expected


@pytest.mark.parametrize("sizes", [(1,), (0, 1), (0, 1, 2, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_projection_against_all_scales(sizes: tuple[int, ...], masked: bool) -> None:
    torch.manual_seed(1)
    values = torch.randn(40, 5)
    kept = torch.rand(40, 5) > 0.3 if masked else None
    counted = values[kept] if kept is not None else values

    def error(codes: Tensor, alpha: float) -> float:
        return float((counted - alpha * (codes[kept] if kept is not None else codes)).square().sum())

    codes, alpha = project(values, sizes, 5, kept)
    scales = torch.linspace(0.02, 3, 600)
    best = min(error(nearest(values, a, sizes), float(a)) for a in scales)
    assert error(codes, float(alpha)) <= best * 1.05
    assert torch.equal(codes if kept is None else codes[kept], nearest(counted, alpha, sizes))
    errors = [error(*_floats(project(values, sizes, n, kept))) for n in (1, 2, 3, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    if sizes == (1,):
        assert float(alpha) == pytest.approx(float(counted.abs().mean()))


def _floats(found: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return found[0], float(found[1])


def test_one_update_and_the_penalty_by_hand() -> None:
    method = Admm(rho=0.5)
    w = view(method, torch.tensor([[1.0, -0.8], [0.1, 0.9]]), 2)
    first = method.copy(w)
    assert first.tolist() == [[pytest.approx(0.9), pytest.approx(-0.9)], [0, pytest.approx(0.9)]]
    with torch.no_grad():
        w.latent.add_(torch.tensor([[0.0, 0.1], [0.6, 0.0]]))
        method.update(w)
    second = method.copy(w)
    assert bits(w.state["dual"]) == bits(w.latent.detach() - second)
    w.latent.grad = None
    pull = method.penalty(w)
    assert pull is not None
    pull.backward()  # type: ignore[no-untyped-call]
    assert w.latent.grad is not None
    assert torch.allclose(w.latent.grad, 0.5 * (w.latent.detach() - second + w.state["dual"]))
    assert bits(method.quantize(w)) == bits(w.latent)


@pytest.mark.parametrize("extragradient", [True, False])
def test_steps_by_hand(extragradient: bool) -> None:
    """Plain gradient descent on f(w) = |w - 3|^2 / 2 with the pull towards G, which stays for the epoch."""
    task = Task(train=[(torch.ones(1, 1), torch.full((1, 1), 3.0))] * 4, loss=_half_square)
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # type: ignore[operator, union-attr]
    seen: list[float] = []

    class Noted(Admm):
        def after_step(self, w: Weight, loop: Loop) -> None:
            seen.append(float(w.latent))

    method = Noted(rho=0.5, extragradient=extragradient)
    Quantize(
        weights=method, bits=1, ends="same", epochs=1, lr=0.1, optimizer=SGD(momentum=0.0), lr_schedule=Constant()
    ).transform(model, Context(task=task))

    def slope(w: float) -> float:
        return (w - 3) + 0.5 * (w - 1.0)

    expected, w = [], 1.0
    for step in range(4):
        if not extragradient:
            w = w - 0.1 * slope(w)
            expected.append(w)
        elif step % 2 == 0:
            guess = w - 0.1 * slope(w)
            expected.append(guess)
        else:
            w = w - 0.1 * slope(guess)
            expected.append(w)
    assert seen == pytest.approx(expected, rel=1e-5)


def _updates(steps: int, epochs: int, method: Admm) -> tuple[list[int], list[float]]:
    """After how many optimizer steps the copy was updated, and the weight it was updated for."""
    task = Task(train=[(torch.ones(1, 1), torch.full((1, 1), 3.0))] * steps, loss=_half_square)
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # type: ignore[operator, union-attr]
    taken, done, at = [0], [], []

    class Noted(type(method)):  # type: ignore[misc]
        def after_step(self, w: Weight, loop: Loop) -> None:
            taken[0] += 1
            super().after_step(w, loop)

        def update(self, w: Weight) -> None:
            done.append(taken[0])
            at.append(float(w.latent))
            super().update(w)

    fields = {"rho": 0.0, "every": method.every, "extragradient": method.extragradient}
    Quantize(
        weights=Noted(**fields), bits=1, ends="same", epochs=epochs, lr=0.1, optimizer=SGD(momentum=0.0),
        lr_schedule=Constant(),
    ).transform(model, Context(task=task))  # fmt: skip
    return done, at


@pytest.mark.parametrize(
    ("steps", "epochs", "every", "expected"),
    [
        (8, 1, 1, [2, 4, 6, 8]), (12, 1, 3, [4, 6, 10, 12]), (8, 1, 4, [4, 8]), (3, 4, None, [4, 6, 10, 12]),
        (3, 3, None, [4, 6, 9]), (4, 2, None, [4, 8]), (7, 1, 3, [4, 6]), (7, 1, 7, [7]),
    ],
)  # fmt: skip
def test_the_copy_follows_the_weights_and_never_the_look_ahead(
    steps: int, epochs: int, every: int | None, expected: list[int]
) -> None:
    """Without a pull, an extragradient step takes the distance to 3 by 1 - 0.1 (1 - 0.1); W_p alone by 1 - 0.1."""
    done, at = _updates(steps, epochs, Admm(every=every))
    assert done == expected
    assert at == pytest.approx([3 - 2 * 0.91 ** (n // 2) * 0.9 ** (n % 2) for n in expected], rel=1e-5)


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4]), (None, [3, 6])])
def test_plain_steps_are_counted_one_by_one(every: int | None, expected: list[int]) -> None:
    assert _updates(3, 2, Admm(every=every, extragradient=False))[0] == expected


def _half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


def test_it_converges_to_the_set_and_learns() -> None:
    at_once = quantized(trained(), Admm(), 2)
    fitted = quantized(trained(), Admm(rho=3.0), 2, epochs=30, lr=1e-2, reestimate=True)
    assert accuracy(fitted) > max(0.85, accuracy(at_once))
    slot, form = latent_of(fitted, "4.weight")
    assert len(slot.value().unique()) <= 3
    assert bits(slot.value()) == bits(form.method.copy(form.view(slot.latent)))  # type: ignore[attr-defined]
    assert bits(slot.value()) == bits(slot.latent.detach())


@pytest.mark.parametrize("every", [None, 5])
def test_a_later_training_is_plain(every: int | None) -> None:
    """The pull, the extragradient and the updates end with the step; the scale and the method's state stay."""
    model = quantized(trained(), Admm(every=every), 2, epochs=2, lr=1e-2)
    slot, form = latent_of(model, "4.weight")
    before = {name: bits(tensor) for name, tensor in form.state.tensors().items()}
    assert form.method.penalty(form.view(slot.latent)) is None
    model = Finetune(epochs=2, lr=1e-3).transform(model, Context(task=digits()))
    slot, form = latent_of(model, "4.weight")
    assert {name: bits(tensor) for name, tensor in form.state.tensors().items()} == before
    assert bool((slot.latent != form.method.copy(form.view(slot.latent))).any())  # type: ignore[attr-defined]
    assert len(slot.value().unique()) <= 3


def test_a_later_step_leaves_what_training_has_made_of_the_codes() -> None:
    context = Context(task=digits())
    model = quantized(trained(), Admm(), 2, epochs=1, lr=1e-2, layers=("4",))
    at_once = latent_of(model, "4.weight")[0].value()
    model = Finetune(epochs=2, lr=1e-2).transform(model, context)
    learned = latent_of(model, "4.weight")[0].value()
    assert bits(learned) != bits(at_once)
    model = Quantize(layers=("0",), ends="same").transform(model, context)
    assert bits(latent_of(model, "4.weight")[0].value()) == bits(learned)


@pytest.mark.parametrize("every", [None, 5])
def test_resume_goes_on_bit_for_bit(every: int | None) -> None:
    check_resumes(Admm(every=every), 3)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_common(width: int) -> None:
    check_common(Admm(), width)


def test_a_set_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="powers values need 3 bits; got 2"):
        quantized(trained(), Admm(levels="powers"), 2)
