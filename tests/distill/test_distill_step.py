"""The step: whose copy is trained, what is checked first, what the task's own loss weighs, and resuming."""

from __future__ import annotations

import pytest
import torch
from tests.distill.classroom import learn, net
from tests.train.conftest import StoredContext, blobs, image_task, states_equal
from torch import nn
from torch.nn import functional as F

import espalier.distill.lesson as lesson_module
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, ModelError, NeedError, NoEffectWarning, NumericError, UsageError
from espalier.core.parametrize import slots
from espalier.core.plan import base
from espalier.core.task import Task, classification
from espalier.data import Loader, standard
from espalier.distill import DKD, Attention, Distill, Features, Hints, Logits, Mutual, SelfDistillation, SoftTargets
from espalier.distill.lesson import repeats
from espalier.prune import Prune
from espalier.testing.compare import effective
from espalier.train import SGD, AdamW, EarlyStopping, Finetune, LabelSmoothing, Mixup, Shift


def labelled(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    data = blobs(n)
    return data.tensors[0], data.tensors[1]


# --- who is trained --------------------------------------------------------------------------------------------------


def test_the_original_teaches_what_a_step_before_has_made_of_it() -> None:
    task = Task(train=[labelled()], val=[labelled(48)])
    trained = Finetune(epochs=10, lr=0.02)(net(), Context(task=task))
    context = Context(task=task, models={"original": trained})
    pruned = Prune(sparsity=0.7)(trained, context)
    taught = Distill(epochs=10, lr=0.02)(pruned, context)
    x = labelled()[0]
    trained.eval(), pruned.eval(), taught.eval()
    gaps = [(F.softmax(model(x), 1) - F.softmax(trained(x), 1)).abs().mean() for model in (pruned, taught)]
    assert gaps[1] < 0.5 * gaps[0]
    for name, weight in effective(pruned).items():
        assert not effective(taught)[name][weight == 0].any() or weight.ndim < 2
    assert slots(taught)["4.weight"].phase == "mask"


def test_a_named_student_is_the_result_and_stays_as_it_was() -> None:
    small, task = net(2), image_task()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    model = net(8)
    found = Distill(student="small", epochs=1)(model, Context(task=task, models={"small": small}))
    assert found[0].out_channels == 2
    assert base(found) == "small"
    assert not states_equal(found, small)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert base(learn(model, task)) == "original"


@pytest.mark.parametrize("student", [None, "small"])
def test_the_model_at_hand_can_teach(student) -> None:
    """``current``: not the original, nor the named student."""
    task = Task(train=[labelled()])
    original, at_hand = net(seed=0), net(seed=1)
    method = Distill(
        teacher="current", student=student, losses=(SoftTargets(alpha=1.0, temperature=1.0),), epochs=200, lr=0.02
    )
    context = Context(task=task, models={"original": original, "small": net(6, seed=2)})
    found = method(at_hand, context)
    x = labelled()[0]
    answers = [model.eval()(x).softmax(1) for model in (found, at_hand, original)]
    assert (answers[0] - answers[1]).abs().mean() < 0.1 * (answers[2] - answers[1]).abs().mean()
    assert "model:current" not in method.needs


def test_missing_models_are_named_before_any_work() -> None:
    with pytest.raises(NeedError, match=r"'big'.*'tiny'"):
        Distill(teacher="big", student="tiny")(net(), Context(task=image_task()))
    with pytest.raises(NeedError, match="labels"):
        Distill(losses=(DKD(),))(net(), Context(task=Task(train=[labelled()[0]])))


def test_without_epochs_there_is_nothing_to_train() -> None:
    model = net()
    with pytest.warns(NoEffectWarning):
        found = Distill(epochs=0)(model, Context())
    assert states_equal(found, model)
    small = net(2)
    assert states_equal(Distill(epochs=0, student="small")(model, Context(models={"small": small})), small)


# --- what is checked -------------------------------------------------------------------------------------------------


def test_a_teacher_worse_than_its_student_is_said_with_both_figures() -> None:
    task = Task(train=[labelled(96)], val=[labelled(96)])
    good = Finetune(epochs=20, lr=0.02)(net(8), Context(task=task))
    bad = net(8, seed=5)
    with torch.no_grad():
        bad[4].bias[1] += 100  # always the same class: a third is right
    with pytest.warns(EspalierWarning, match=r"teacher 'teacher' is worse than its student on val: accuracy 33\.33 .*"):
        learn(good, task, bad)
    learn(bad, task, good)  # the other way round nothing is said


def test_a_teacher_with_nan_is_refused() -> None:
    bad = net()
    with torch.no_grad():
        bad[4].bias[0] = float("nan")
    with pytest.raises(NumericError, match="output of the teacher 'teacher' holds NaN"):
        learn(net(), Task(train=[labelled()]), bad)


def test_only_losses_over_outputs_need_equal_outputs() -> None:
    other = nn.Sequential(*net(4)[:4], nn.Linear(64, 7))
    with pytest.raises(ModelError, match=r"\(16, 3\) and the teacher 'teacher' \(16, 7\).*attention"):
        learn(net(), image_task(val=None), other)
    learn(net(), image_task(val=None), other, losses=(Attention(),))


# --- the weight of the task's own loss -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "hard"),
    [
        ({}, 0.1),
        ({"losses": (SoftTargets(alpha=0.5),)}, 0.5),
        ({"losses": (Logits(),)}, 0),
        ({"losses": (DKD(),)}, 1),
        ({"losses": (SoftTargets(), Attention())}, 0.1),
        ({"losses": (SoftTargets(), Features()), "hard": 2.0}, 2),
        ({"losses": (Hints(),)}, 0.1),
        ({"losses": (Hints(), DKD())}, 1),
        ({"losses": (Hints(mode="joint"),)}, 1),
        ({"teaching": Mutual()}, 1),
        ({"teaching": Mutual(), "losses": (SoftTargets(),)}, 0.1),
        ({"teaching": SelfDistillation()}, 0),
        ({"teaching": SelfDistillation(), "hard": 1.0}, 1),
    ],
)
def test_what_the_losses_leave(fields, hard: float) -> None:
    assert Distill(**fields).weighed()[1] == pytest.approx(hard)


def test_the_loss_is_the_weighted_sum() -> None:
    """The reported loss of one step, against the formula on the network in training mode."""
    student, teacher, (x, y) = net(4), net(8, seed=1), labelled()
    context = Context(task=Task(train=[(x, y)]), models={"teacher": teacher})
    context.record.details["history"] = history = []
    Distill(teacher="teacher").replace(epochs=1).transform(net(4), context)
    z_s, z_t = student.train()(x), teacher.eval()(x)
    kl = (z_t.div(4).softmax(1) * (z_t.div(4).log_softmax(1) - z_s.div(4).log_softmax(1))).sum(1).mean()
    expected = 0.1 * F.cross_entropy(z_s, y) + 0.9 * 16 * kl
    assert history[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_without_labels_the_teacher_alone_is_heard() -> None:
    x = labelled()[0]
    context = Context(task=classification(train=[x]), models={"teacher": net(8, seed=1)})
    child = Distill(teacher="teacher", epochs=100, lr=0.05)
    found = child.transform(net(4), context)
    assert any("no labels" in note for note in context.record.notes)
    assert context.record.details["distillation"] == {"losses": ["soft-targets"], "hard": 0.0}
    answers = [model(x).softmax(1) for model in (found.eval(), context.models["teacher"].eval())]
    assert (answers[0] - answers[1]).abs().mean() < 0.05


def test_smoothed_labels_that_nobody_looks_at_are_refused() -> None:
    with pytest.raises(UsageError, match="set hard above 0"):
        Distill(losses=(Logits(),), smoothing=LabelSmoothing())
    Distill(losses=(Logits(),), smoothing=LabelSmoothing(), hard=0.5)


def test_blended_images_have_no_one_label() -> None:
    with pytest.raises(UsageError, match="dkd looks at one label"):
        Distill(losses=(DKD(),), augment=(Mixup(),))
    found = learn(net(), image_task(val=None), net(8, seed=1), augment=(Mixup(),))
    assert not states_equal(found, net())


# --- the teacher's answers -------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its forward passes, and is in eval mode in all of them."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.body = net(8, seed=1)

    def forward(self, x):
        assert not self.training
        assert not torch.is_grad_enabled()
        type(self).calls += 1
        return self.body(x)


@pytest.mark.parametrize("augment", [(), (Shift(pixels=1),)], ids=["plain", "augmented"])
def test_answers_are_kept_only_where_the_same_batches_come_again(augment, monkeypatch) -> None:
    task = Task(train=[labelled(12), labelled(24)])

    def run() -> tuple[nn.Module, int]:
        Counting.calls = 0
        found = learn(net(), task, Counting().eval(), epochs=5, augment=augment)
        return found, Counting.calls

    kept, few = run()
    monkeypatch.setattr(lesson_module, "CACHED", 0)
    anew, many = run()
    assert states_equal(kept, anew)
    assert many - few == (0 if augment else 2 * 4)


def test_which_loaders_repeat_themselves() -> None:
    x, y = labelled()
    assert repeats([(x, y)])
    assert repeats(Loader(x, y, batch_size=8))
    assert not repeats(Loader(x, y, batch_size=8, shuffle=True))
    assert not repeats(image_task().train)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"losses": (Hints(epochs=3), SoftTargets()), "optimizer": AdamW(), "clip": 1.0},
        {"losses": (Features(), DKD(warmup=3)), "optimizer": SGD(momentum=0.9), "lr": 0.02},
        {"teaching": Mutual(copies=2), "stopping": EarlyStopping(patience=3)},
        {"teaching": SelfDistillation(generations=2)},
    ],
    ids=["soft-targets", "hints", "features-dkd", "mutual", "self"],
)
def test_resumed_equals_uninterrupted(fields) -> None:
    method = Distill(epochs=4, teacher="original", **fields)
    task = image_task()
    teacher = Finetune(epochs=5, lr=0.02)(net(8, seed=3, size=5), Context(task=task))

    def run(context: StoredContext) -> nn.Module:
        return method.transform(net(4), context)

    def context() -> StoredContext:
        return StoredContext(task, seed=4, models={"original": teacher})

    through = run(context())
    broken = context()
    for name, die_after in (("fit", 2), ("fit", 3), ("fit-hints", 1), ("generation-1", 2), ("generation-2", 1)):
        broken.epochs(name).die_after = die_after
    for _ in range(4):
        try:
            resumed = run(broken)
        except KeyboardInterrupt:
            torch.manual_seed(7)
    assert states_equal(through, resumed)


def test_a_student_learns_more_from_a_teacher_than_from_few_labels() -> None:
    """Digits: a teacher that saw all labels, a student whose own loss sees wrong ones for two images of five."""
    data = standard("digits")
    x, y = data.train.x[:400], data.train.y[:400].clone()
    wrong = torch.arange(400) % 5 < 2
    y[wrong] = (y[wrong] + 1 + torch.arange(int(wrong.sum())) % 9) % 10
    task = classification(Loader(x, y, batch_size=50, shuffle=True, normalisation=data.normalisation), data.val)

    def fresh(width: int) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    full = classification(data.train, data.val)
    teacher = Finetune(epochs=6, lr=5e-3)(fresh(64), Context(task=full))
    alone = Finetune(epochs=12, lr=5e-3)(fresh(16), Context(task=task))
    taught = learn(fresh(16), task, teacher, epochs=12, lr=5e-3)
    scores = [task.measure(model, "val").value for model in (alone, taught)]
    assert scores[1] > scores[0] + 5
