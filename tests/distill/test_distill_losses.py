"""Every loss beside a formula written out here, and what must hold of it whatever the numbers are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from espalier.core.errors import DataError, UsageError
from espalier.distill import DKD, Attention, Features, Hints, Logits, Relational, SoftTargets
from espalier.distill.parts import Rows

SEEDS = st.integers(0, 10_000)


def rows(seed: int = 0, n: int = 6, classes: int = 5, scale: float = 3.0, **more) -> Rows:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, classes, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(classes, (n,), generator=g)
    return Rows(student.requires_grad_(), teacher, labels, **more)


def features(seed: int = 0, *shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))


def number(value: Tensor) -> float:
    return float(value.detach())


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


OUTPUTS = [SoftTargets(), Logits(), Logits(space="predictions"), DKD(warmup=0)]
PAIRED = [Hints(mode="joint"), *(Features(distance=d) for d in ("mse", "l1", "cosine", "smooth-l1")),
          Attention(), Attention(mode="paper"), Relational()]  # fmt: skip


def label(part) -> str:
    return f"{part.id}-{getattr(part, 'mode', getattr(part, 'distance', getattr(part, 'space', '')))}"


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0, 10.0])
def test_soft_targets_are_hintons(temperature: float) -> None:
    given_rows, total = rows(), 0.0
    for z_s, z_t in zip(given_rows.student.detach().numpy(), given_rows.teacher.numpy(), strict=True):
        p, q = softmax(z_t / temperature), softmax(z_s / temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = 0.7 * temperature**2 * total / len(given_rows.student)
    found = SoftTargets(alpha=0.7, temperature=temperature).value(given_rows)
    assert number(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("space", ["logits", "predictions"])
def test_logits_are_half_the_squared_distance(space: str) -> None:
    given_rows, total = rows(), 0.0
    for z_s, z_t in zip(given_rows.student.detach().numpy(), given_rows.teacher.numpy(), strict=True):
        a, b = (softmax(z_s), softmax(z_t)) if space == "predictions" else (z_s, z_t)
        total += ((a - b) ** 2).sum() / 2
    found = Logits(space=space, weight=3.0).value(given_rows)
    assert number(found) == pytest.approx(3 * total / len(given_rows.student), rel=1e-9)


def test_predictions_of_a_regression_are_the_outputs() -> None:
    given_rows = rows(classes=1)
    numbers = Rows(given_rows.student, given_rows.teacher, classes=False)
    assert Logits(space="predictions").value(numbers) == Logits().value(numbers) > 0


def test_dkd_splits_the_right_class_from_the_others() -> None:
    given_rows, T, parts = rows(), 4.0, np.zeros(2)
    assert given_rows.labels is not None
    for z_s, z_t, y in zip(
        given_rows.student.detach().numpy(), given_rows.teacher.numpy(), given_rows.labels.tolist(), strict=True
    ):
        p, q = softmax(z_t / T), softmax(z_s / T)
        parts[0] += p[y] * math.log(p[y] / q[y]) + (1 - p[y]) * math.log((1 - p[y]) / (1 - q[y]))
        a, b = softmax(np.delete(z_t, y) / T), softmax(np.delete(z_s, y) / T)
        parts[1] += (a * np.log(a / b)).sum()
    expected = T**2 * (1.5 * parts[0] + 6 * parts[1]) / len(given_rows.student)
    assert number(DKD(alpha=1.5, beta=6.0, warmup=0).value(given_rows)) == pytest.approx(expected, rel=1e-9)


def test_dkd_with_the_teachers_own_weight_is_soft_targets() -> None:
    """KL = right class + (1 - p_y) others, so one sample with beta = 1 - p_y gives it back."""
    one = rows(n=1)
    assert one.labels is not None
    p = number(one.teacher.div(4).softmax(1)[0, one.labels[0]])
    whole = SoftTargets(alpha=1.0, temperature=4.0).value(one)
    assert number(DKD(alpha=1.0, beta=1 - p, warmup=0).value(one)) == pytest.approx(number(whole), rel=1e-9)


def test_dkd_warms_up() -> None:
    full = number(DKD(warmup=0).value(rows()))
    for epoch, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        assert number(DKD(warmup=4).value(rows(epoch=epoch))) == pytest.approx(share * full)


def test_dkd_on_extreme_logits_is_finite() -> None:
    student = torch.tensor([[400.0, -400.0, 0.0]], requires_grad=True)
    value = DKD(warmup=0).value(Rows(student, -student.detach(), torch.tensor([0])))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()


def test_dkd_without_labels_says_what_to_use() -> None:
    bare = rows()
    with pytest.raises(DataError, match=r"(?s)integer label.*soft-targets"):
        DKD().value(Rows(bare.student, bare.teacher))


def test_hints_are_half_the_mean_square() -> None:
    s, t = features(0, 2, 3, 4, 4)
    expected = sum((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)) / 2 / 96
    assert number(Hints(mode="joint", weight=7.0).value([(s, t), (s, t)])) == pytest.approx(2 * 7 * expected)
    assert number(Hints(weight=7.0).value([(s, t)])) == pytest.approx(expected)


def test_feature_distances() -> None:
    s, t = (x.numpy() for x in features(1, 2, 3, 4, 4))
    gap = np.abs(s - t)
    dot = (s * t).sum(1) / np.sqrt((s**2).sum(1) * (t**2).sum(1))
    expected = {
        "mse": (gap**2).mean(), "l1": gap.mean(), "cosine": (1 - dot).mean(),
        "smooth-l1": np.where(gap < 1, gap**2 / 2, gap - 0.5).mean(),
    }  # fmt: skip
    for distance, value in expected.items():
        found = Features(distance=distance, weight=2.0).value([features(1, 2, 3, 4, 4)])
        assert number(found) == pytest.approx(2 * value)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_in_both_forms(power: float) -> None:
    s, t = features(2, 3, 4, 2, 5)
    squares, norms = [], []
    for a, b in zip(s.numpy(), t.numpy(), strict=True):
        q = [(np.abs(side) ** power).sum(0).flatten() for side in (a, b)]
        q_s, q_t = (side / np.sqrt((side**2).sum()) for side in q)
        squares.append(((q_s - q_t) ** 2).mean())
        norms.append(np.sqrt(((q_s - q_t) ** 2).sum()))
    code = Attention(power=power, weight=10.0).value([(s, t)])
    paper = Attention(power=power, weight=10.0, mode="paper").value([(s, t)])
    assert number(code) == pytest.approx(10 * np.mean(squares))
    assert number(paper) == pytest.approx(10 / 2 * np.mean(norms) / 10)


def test_relational_distances_and_angles() -> None:
    pair = features(3, 4, 2, 3)
    sides = []
    for x in (side.flatten(1).numpy() for side in pair):
        d = np.array([[math.dist(a, b) for b in x] for a in x])
        angle = np.zeros((4, 4, 4))
        for i, j, k in np.ndindex(4, 4, 4):
            if i != j and k != j:
                u, v = x[i] - x[j], x[k] - x[j]
                angle[i, j, k] = u @ v / math.sqrt((u @ u) * (v @ v))
        sides.append((d / d[d > 0].mean(), angle))
    huber = [np.where((gap := np.abs(a - b)) < 1, gap**2 / 2, gap - 0.5).mean() for a, b in zip(*sides, strict=True)]
    assert number(Relational().value([pair])) == pytest.approx(25 * huber[0] + 50 * huber[1])
    assert number(Relational(angle=0.0, distance=2.0).value([pair])) == pytest.approx(2 * huber[0])


def test_relational_features_may_differ_in_width_and_scale() -> None:
    x, _ = features(4, 5, 3)
    wide = torch.cat([3 * x, torch.zeros(5, 2)], dim=1)
    assert number(Relational().value([(x, wide)])) == pytest.approx(0, abs=1e-12)


def test_relational_of_equal_samples_and_of_one_is_finite() -> None:
    for n in (1, 3):
        x = torch.ones(n, 4, requires_grad=True)
        value = Relational().value([(x, torch.ones(n, 4))])
        value.backward()
        assert value == 0
        assert torch.isfinite(x.grad).all()


# --- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(SEEDS)
def test_gradient_at_high_temperature_is_that_of_centred_logits(seed: int) -> None:
    """T^2 keeps it from vanishing: ((z_s - mean z_s) - (z_t - mean z_t)) / (n classes)."""
    r = rows(seed)
    SoftTargets(alpha=1.0, temperature=1e4).value(r).backward()
    z_s, z_t = r.student.detach(), r.teacher
    limit = ((z_s - z_s.mean(1, keepdim=True)) - (z_t - z_t.mean(1, keepdim=True))) / z_s.numel()
    assert (r.student.grad - limit).norm() <= 2e-3 * limit.norm()


@pytest.mark.parametrize("part", OUTPUTS, ids=label)
@settings(max_examples=10)
@given(SEEDS)
def test_outputs_at_equality_give_zero_and_no_pull(part, seed: int) -> None:
    r = rows(seed)
    same = Rows(r.student, r.student.detach().clone(), r.labels)
    value = part.value(same)
    value.backward()
    assert number(value) == pytest.approx(0, abs=1e-12)
    assert number(r.student.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("part", PAIRED, ids=label)
def test_features_at_equality_give_zero(part) -> None:
    s, _ = features(5, 4, 3, 2, 2)
    assert number(part.value([(s, s.clone())])) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("part", OUTPUTS, ids=label)
def test_outputs_twice_give_the_same_mean(part) -> None:
    """A mean over samples: neither the batch size nor the number of classes divides it once more."""
    r = rows()
    assert r.labels is not None
    twice = Rows(torch.cat([r.student] * 2), torch.cat([r.teacher] * 2), torch.cat([r.labels] * 2))
    assert number(part.value(twice)) == pytest.approx(number(part.value(r)))
    wide = [torch.cat([side, torch.full((6, 5), -1e3, dtype=side.dtype)], dim=1) for side in (r.student, r.teacher)]
    assert number(part.value(Rows(*wide, r.labels))) == pytest.approx(number(part.value(r)))


@pytest.mark.parametrize("part", PAIRED[:-1], ids=label)
def test_features_twice_give_the_same_mean(part) -> None:
    s, t = features(6, 3, 4, 2, 2)
    assert number(part.value([(torch.cat([s, s]), torch.cat([t, t]))])) == pytest.approx(number(part.value([(s, t)])))


def test_alpha_is_continuous_to_both_ends() -> None:
    """Near 0 the soft part vanishes, near 1 the task's own loss does; T^2 stays throughout."""
    r = rows()
    whole = number(SoftTargets(alpha=1.0).value(r))
    for alpha in (0.0, 1e-9, 0.5, 1 - 1e-9):
        part = SoftTargets(alpha=alpha)
        assert number(part.value(r)) == pytest.approx(alpha * whole, abs=1e-12)
        assert part.leaves == pytest.approx(1 - alpha)


@pytest.mark.parametrize("part", OUTPUTS, ids=label)
def test_kl_goes_from_the_teacher_to_the_student(part) -> None:
    """Swapping the two sides is another number, except for the symmetric regression."""
    r = rows()
    swapped = Rows(r.teacher.requires_grad_(), r.student.detach(), r.labels)
    assert (number(part.value(r)) == pytest.approx(number(part.value(swapped)))) == isinstance(part, Logits)


def test_what_each_paper_leaves_of_the_labels() -> None:
    left = {part.id: part.leaves for part in (SoftTargets(), Logits(), DKD(), Hints(), Attention(), Relational())}
    assert left == {"soft-targets": pytest.approx(0.1), "logits": 0, "dkd": 1, "hints": 1, "attention": 1,
                    "relational": 1}  # fmt: skip


def test_losses_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="two-stage needs epochs"):
        Hints(epochs=0)
    with pytest.raises(UsageError, match="both 0"):
        Relational(distance=0.0, angle=0.0)
    with pytest.raises(UsageError, match="temperature"):
        SoftTargets(temperature=0.0)
