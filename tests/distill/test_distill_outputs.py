"""Which numbers of an output are distilled: keys, classes first or last, labels that do not count."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.distill.classroom import fixed, learn
from torch import nn
from torch.nn import functional as F

from espalier.core.errors import DataError, ModelError, UnknownNameError, UsageError
from espalier.core.task import Task
from espalier.distill import DKD, Logits, SoftTargets
from espalier.distill.lesson import output_value
from espalier.distill.outputs import Reading, class_dim


def reading(output, target=None, *, loss=None, key="", dim="auto") -> Reading:
    return Reading.of(output, (torch.zeros(2), target), Task(loss=loss), key, dim)


@pytest.mark.parametrize(
    ("output", "target", "dim"),
    [
        ((4, 3), (4,), 1),
        ((4, 3), None, 1),
        ((4, 3, 5, 5), (4, 5, 5), 1),
        ((4, 3, 5, 5), None, 1),
        ((4, 5, 3), (4, 5), 2),
        ((4, 3, 5), (4, 5), 1),
        ((4, 5, 3), None, 2),
        ((4, 5, 3), (20,), 2),
    ],
)
def test_labels_say_where_the_classes_stand(output, target, dim: int) -> None:
    labels = None if target is None else torch.zeros(target, dtype=torch.long)
    assert class_dim(torch.zeros(output), labels, "auto") == dim
    assert class_dim(torch.zeros(output), labels, "first") == 1
    assert class_dim(torch.zeros(output), labels, "last") == len(output) - 1


@pytest.mark.parametrize(("shape", "labels"), [((2, 3, 4, 5), (2, 4, 5)), ((2, 7, 3), (2, 7)), ((6, 3), (6,))])
def test_rows_and_labels_stay_together(shape, labels) -> None:
    """The logit of each label's class is found in the row of that label."""
    target = torch.randint(3, labels, generator=torch.Generator().manual_seed(0))
    hot = F.one_hot(target, 3).float()
    output = hot.movedim(-1, 1) if len(shape) == 4 else hot
    assert output.shape == shape
    read = reading(output, target)
    rows = read.rows(output)
    flat, counts = read.labels(target, len(rows))
    assert counts is None
    assert torch.equal(rows.argmax(1), flat)


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [(F.cross_entropy, -100), (nn.CrossEntropyLoss(ignore_index=1), 1), (partial(F.cross_entropy, ignore_index=1), 1)],
)
def test_rows_that_the_loss_ignores_do_not_count(loss, ignored: int) -> None:
    g = torch.Generator().manual_seed(0)
    output, told = torch.randn(2, 5, 3, generator=g), torch.randn(1, 10, 3, generator=g)
    target = torch.tensor([[0, ignored, 2, 2, 0], [ignored, 0, 0, 2, 2]])
    read = reading(output, target, loss=loss)
    kept = target.reshape(-1) != ignored
    part = SoftTargets(alpha=1.0)
    found = output_value([part], read, output, told, target, 0)
    alone = output_value([part], reading(output[0]), output.reshape(10, 3)[kept], told[:, kept], None, 0)
    assert torch.allclose(found, alone)
    nobody = output_value([part], read, output, told, torch.full_like(target, ignored), 0)
    assert nobody == 0


def test_a_key_names_the_part() -> None:
    output = {"hidden": torch.zeros(2, 8), "logits": torch.ones(2, 3)}
    assert reading(output).rows(output).shape == (2, 8)
    assert reading(output, key="logits").rows(output).shape == (2, 3)
    with pytest.raises(UnknownNameError, match=r"'logit'.*'logits'"):
        reading(output, key="logit")
    with pytest.raises(UnknownNameError, match=r"'logits'.*Tensor"):
        reading(torch.zeros(2, 3), key="logits")


@pytest.mark.parametrize(
    ("output", "target", "loss", "classes"),
    [
        ((4, 3), torch.zeros(4, dtype=torch.long), None, True),
        ((4, 3), None, None, True),
        ((4, 3), torch.full((4, 3), 1 / 3), F.cross_entropy, True),
        ((4, 3), torch.zeros(4, 3), F.mse_loss, False),
        ((4, 3), torch.zeros(4, 3), F.binary_cross_entropy_with_logits, False),
        ((4, 3), torch.zeros(4, 3, dtype=torch.long), None, False),
        ((4, 1), torch.zeros(4), F.mse_loss, False),
        ((4,), torch.zeros(4), F.mse_loss, False),
    ],
)
def test_what_is_a_choice_of_one_class(output, target, loss, classes: bool) -> None:
    assert reading(torch.zeros(output), target, loss=loss).classes == classes


@pytest.mark.parametrize("part", [SoftTargets(), DKD()], ids=["soft-targets", "dkd"])
def test_losses_of_classes_are_refused_on_a_regression(part) -> None:
    task = Task(train=[(torch.randn(8, 4), torch.randn(8, 2))], loss=F.mse_loss)
    with pytest.raises(UsageError, match=rf"distill\.{part.id} compares.*the loss logits"):
        learn(nn.Linear(4, 2), task, teacher=nn.Linear(4, 2), losses=(part,))


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_regression_is_distilled_by_logits(outputs: int) -> None:
    x = fixed(64, 4)
    truth = nn.Linear(4, outputs)
    task = Task(train=[(x, torch.zeros(64, outputs))], loss=F.mse_loss)
    student = learn(nn.Linear(4, outputs), task, teacher=truth, losses=(Logits(),), epochs=150, lr=0.1)
    assert torch.allclose(student(x), truth(x), atol=0.05)  # the labels are all zero: the teacher alone was heard


def test_outputs_of_other_shapes_are_said_before_any_training() -> None:
    task = Task(train=[(torch.randn(8, 4), torch.arange(8) % 3)])
    with pytest.raises(ModelError, match=r"\(8, 3\) and the teacher 'teacher' \(8, 10\)"):
        learn(nn.Linear(4, 3), task, teacher=nn.Linear(4, 10))


def test_a_dense_prediction_and_tokens_are_learned() -> None:
    """Per-pixel and per-token logits, with the means over all rows: the student ends near its teacher."""
    images, words = fixed(8, 1, 5, 5), torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))
    cases = (
        (nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1), (images, torch.zeros(8, 5, 5, dtype=torch.long)), None),
        (nn.Embedding(7, 3), nn.Embedding(7, 3), (words, torch.zeros(8, 5, dtype=torch.long)), last_classes),
    )
    for student, teacher, batch, loss in cases:
        taught = learn(
            student, Task(train=[batch], loss=loss), teacher=teacher, losses=(SoftTargets(alpha=1.0),), epochs=100,
            lr=0.3,
        )  # fmt: skip
        dim = 1 if loss is None else 2
        answers = [model(batch[0]).softmax(dim) for model in (taught, teacher)]
        assert torch.allclose(*answers, atol=0.03)


def last_classes(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def test_the_key_is_a_field_of_the_step() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return {"noise": x, "logits": self.head(x)}

    task = Task(train=[(fixed(8, 4), torch.arange(8) % 3)], loss=lambda out, y: F.cross_entropy(out["logits"], y))
    torch.manual_seed(0)
    student, teacher = Two(), Two()
    hard0 = {"losses": (SoftTargets(alpha=1.0, temperature=1.0),), "epochs": 100, "lr": 0.3}
    taught = learn(student, task, teacher=teacher, output="logits", **hard0)
    x = task.train[0][0]
    assert torch.allclose(taught(x)["logits"].softmax(1), teacher(x)["logits"].softmax(1), atol=0.03)


def test_labels_that_are_no_class_are_said() -> None:
    student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(36, 3)) for _ in range(2))
    x, y = fixed(4, 1, 6, 6), torch.tensor([0, 1, 2, 255])
    told = Task(train=[(x, y)], loss=partial(F.cross_entropy, ignore_index=255))
    learn(student, told, teacher, losses=(DKD(),))
    hidden = Task(train=[(x, y)], loss=lambda output, target: F.cross_entropy(output, target, ignore_index=255))
    with pytest.raises(DataError, match=r"(?s)labels in 0 \.\. 2 .*has 0 \.\. 255.*ignore_index"):
        learn(student, hidden, teacher, losses=(DKD(),))
