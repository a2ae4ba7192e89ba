"""Who teaches: several teachers, assistants, other students, earlier generations."""

from __future__ import annotations

import pytest
import torch
from tests.distill.classroom import fixed, net
from tests.train.conftest import blobs, image_task, states_equal
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, ModelError, NeedError, PhaseError, UsageError
from espalier.core.metric import Loss
from espalier.core.parametrize import slots
from espalier.core.plan import base
from espalier.core.task import Task
from espalier.distill import (
    DKD,
    Assistant,
    Attention,
    Distill,
    Features,
    Logits,
    MultiTeacher,
    Mutual,
    SelfDistillation,
    SoftTargets,
)
from espalier.distill.fresh import afresh
from espalier.distill.multi_teacher import averaged, entropy_shares
from espalier.prune import Prune
from espalier.train import EMA, L1, SGD, Constant, EarlyStopping, Finetune, Mixup

X, Y = blobs(48).tensors
TASK = Task(train=[(X, Y)], val=[(X, Y)])
ALONE = {"losses": (SoftTargets(alpha=1.0, temperature=1.0),)}


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X).softmax(1)


def sure(of: int) -> nn.Module:
    """Always the same class."""
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.copy_(torch.nn.functional.one_hot(torch.tensor(of), 3) * 5.0)
    return model


# --- several teachers ------------------------------------------------------------------------------------------------


def test_the_average_of_probabilities_is_that_at_the_losses_temperature() -> None:
    logits, shares = 3 * fixed(3, 5, 4), torch.tensor([0.2, 0.3, 0.5])
    for temperature in (1.0, 4.0):
        mean = (shares[:, None, None] * (logits / temperature).softmax(-1)).sum(0)
        found = (averaged(logits, shares[:, None], temperature) / temperature).softmax(-1)
        assert torch.allclose(found, mean, atol=1e-6)


def test_predictions_are_averaged_as_probabilities() -> None:
    logits = torch.tensor([[[10.0, 0, 0]], [[0.0, 1, 0]]])
    part = MultiTeacher(beside=("other",))
    found = part.combined(torch.tensor([0.5, 0.5]), logits, Logits(space="predictions").softness, True)
    assert torch.allclose(found.softmax(-1), logits.softmax(-1).mean(0), atol=1e-6)
    assert torch.equal(part.combined(torch.tensor([0.5, 0.5]), logits, Logits().softness, True), logits.mean(0))


def test_entropy_gives_the_sure_one_more_to_say() -> None:
    logits = torch.stack([torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]]), torch.zeros(2, 3)])
    shares = entropy_shares(logits)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(shares, (-entropy).exp() / (-entropy).exp().sum(0))
    assert shares[0, 0] > 0.7 > shares[0, 1] > 0.5


@pytest.mark.parametrize("weights", ["uniform", "metric", "entropy"])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_the_student_learns_the_average(weights: str, average: str) -> None:
    good = Finetune(epochs=15, lr=0.02)(net(8), Context(task=TASK))
    models = {"original": good, "other": sure(0)}
    method = Distill(teaching=MultiTeacher(beside=("other",), weights=weights, average=average), epochs=80, lr=0.1,
                     **ALONE)  # fmt: skip
    context = Context(task=TASK, models=models)
    student = net(8, seed=2)
    with torch.no_grad():
        student[4].weight.zero_()  # knows no better than the constant teacher
    found = answers(method.transform(student, context))
    told = torch.stack([answers(model).clamp_min(1e-9).log() for model in models.values()])
    accuracy = [float((side.argmax(1) == Y).float().mean()) for side in told]
    shares = torch.tensor([0.5, 0.5])[:, None]
    if weights == "metric":
        shares = torch.tensor(accuracy)[:, None] / sum(accuracy)
        assert list(context.record.details["shares"].values()) == pytest.approx(shares.flatten().tolist(), abs=1e-6)
        assert shares[0] > 0.7
    if weights == "entropy":
        shares = (told.exp() * told).sum(-1).softmax(0)
    if average == "probabilities":
        expected = (shares[..., None] * told.exp()).sum(0)
    else:
        expected = (shares[..., None] * told).sum(0).softmax(1)
    assert (found - expected).abs().mean() < 0.05


def test_shares_by_a_metric_that_is_to_be_low_or_zero() -> None:
    class Given(Loss):
        def per_sample(self, output, target):
            return output[:, 0].detach()

    task = Task(train=[(X, Y)], val=[(X, Y)], metric=Given(lambda *_: None))
    part = MultiTeacher(weights="metric")
    method = Distill()

    def shares(*biases: float) -> list[float]:
        teachers = []
        for bias in biases:
            model = sure(0)
            with torch.no_grad():
                model[4].bias[0] = bias
            teachers.append(method.hired("t", model, Context(models={"t": model})))
        return part.shares(teachers, Context(task=task))

    assert shares(1.0, 3.0) == pytest.approx([0.75, 0.25])
    assert shares(0.0, 3.0) == [1.0, 0.0]


def test_every_teacher_has_adapters_of_its_own() -> None:
    models = {"original": net(4), "wide": net(8), "wider": net(6)}
    context = Context(task=image_task(val=None), models=models)
    method = Distill(teaching=MultiTeacher(beside=("wide", "wider")), losses=(Features(layers=("2",)),), epochs=1)
    method.transform(net(4), context)
    assert [row["teacher"] for row in context.record.details["features"]] == ["original", "wide", "wider"]


def test_regressions_and_dkd_take_several_teachers() -> None:
    context = Context(task=TASK, models={"original": sure(0), "other": sure(1)})
    for part in (Logits(), DKD()):
        method = Distill(teaching=MultiTeacher(beside=("other",)), losses=(part,), epochs=60, lr=0.1, hard=0.0)
        found = answers(method.transform(sure(2), context))
        assert (found[:, 0] - found[:, 1]).abs().mean() < 0.1
        assert found[:, 2].mean() < 0.1


def test_teachers_that_are_named_twice_or_not_at_all() -> None:
    with pytest.raises(UsageError, match="original more than once"):
        Distill(teaching=MultiTeacher(beside=("original",)))
    with pytest.raises(NeedError, match="'a'"):
        Distill(teaching=MultiTeacher(beside=("a",)))(net(), Context(task=TASK))
    for part in (MultiTeacher(), Assistant()):
        with pytest.warns(EspalierWarning, match=r"\('name', \.\.\.\)"):
            Distill(teaching=part, epochs=1)(net(), Context(task=TASK))


# --- assistants ------------------------------------------------------------------------------------------------------


def test_each_assistant_is_taught_by_the_one_before() -> None:
    """The student equals the one of separate steps, name by name."""
    models = {"original": net(12, seed=1), "middle": net(8, seed=2), "less": net(6, seed=3)}
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    context = Context(task=image_task(val=None), models=dict(models))
    method = Distill(teaching=Assistant(between=("middle", "less")), epochs=2, lr=0.01)
    chained = method.transform(net(4), context)
    assert [row["loss"] > 0 for row in context.record.details["history"]] == [True] * 6
    single, teachers = Distill(epochs=2, lr=0.01), dict(models)
    hand = Context(task=context.task, models=teachers)
    names = ["assistant-1", "assistant-2", "fit"]
    pupils = [models["middle"], models["less"], net(4)]
    taught = "original"
    for name, pupil in zip(names, pupils, strict=True):
        copied = single.hired("x", pupil, Context(models={"x": pupil})).model.requires_grad_().train()
        single.learn(copied, (single.hired(taught, copied, hand),), hand, name=name)
        teachers[name], taught = copied, name
    assert states_equal(chained, copied)
    for name, values in before.items():
        assert all(torch.equal(p, q) for p, q in zip(values, models[name].parameters(), strict=True))


# --- students among themselves ---------------------------------------------------------------------------------------


def test_mutual_learning_is_its_formula() -> None:
    """One step of plain descent for three students, against gradients taken here."""
    models = [net(4, seed=s) for s in range(3)]
    context = Context(task=Task(train=[(X, Y)]), models={"a": models[1], "b": models[2]})
    method = Distill(teaching=Mutual(students=("a", "b"), copies=0), epochs=1, lr=0.1,
                     optimizer=SGD(momentum=0.0), lr_schedule=Constant())  # fmt: skip
    found = method.transform(net(4, seed=0), context)
    outputs = [model.train()(X) for model in models]
    log_p = [z.log_softmax(1) for z in outputs]
    others = sum((log_p[k].detach().exp() * (log_p[k].detach() - log_p[0])).sum(1).mean() for k in (1, 2)) / 2
    (torch.nn.functional.cross_entropy(outputs[0], Y) + others).backward()
    for mine, theirs in zip(found.parameters(), models[0].parameters(), strict=True):
        assert torch.allclose(mine, theirs - 0.1 * theirs.grad, atol=1e-6)


def test_the_best_of_those_built_alike_is_returned() -> None:
    strong = Finetune(epochs=30, lr=0.02)(net(4, seed=7), Context(task=TASK))
    wide = Finetune(epochs=30, lr=0.02)(net(12, seed=7), Context(task=TASK))
    models = {"original": net(), "strong": strong, "wide": wide}
    context = Context(task=TASK, models=models)
    method = Distill(teaching=Mutual(students=("strong", "wide"), copies=1), epochs=1, lr=1e-5)
    found = method.transform(net(4, seed=0), context)
    assert base(found) == "strong"
    assert found[0].out_channels == 4
    assert len(context.record.details["students"]) == 3  # the wide one helps, and is no candidate
    blind = Context(task=Task(train=[(X, Y)]), models=models)
    assert base(method.transform(net(4, seed=0), blind)) == "original"


@pytest.mark.parametrize(
    "fields", [{"penalties": (L1(),)}, {"ema": EMA()}, {"stopping": EarlyStopping()}, {"reestimate": True}], ids=str
)
def test_what_acts_on_the_steps_own_student_makes_it_the_result(fields) -> None:
    strong = Finetune(epochs=30, lr=0.02)(net(4, seed=7), Context(task=TASK))
    context = Context(task=TASK, models={"original": net(), "strong": strong})
    student = net(4, seed=0)
    method = Distill(teaching=Mutual(students=("strong",), copies=0), epochs=1, lr=1e-5, **fields)
    assert method.transform(student, context) is student
    assert f"{next(iter(fields))} act on the step's own student alone" in context.record.notes[0]


def test_copies_begin_afresh_and_a_pruned_student_stays_pruned() -> None:
    pruned = Prune(sparsity=0.5)(net(), Context(task=TASK))
    found = Distill(teaching=Mutual(copies=2), epochs=2, lr=0.02)(pruned, Context(task=TASK))
    assert slots(found)["4.weight"].phase == "mask"
    one, two = (afresh(net(), Context(), salt) for salt in ("a", "b"))
    assert not torch.equal(one[0].weight, two[0].weight)
    assert states_equal(one, afresh(net(seed=9), Context(), "a"))


def test_what_has_no_place_in_mutual_learning() -> None:
    with pytest.raises(UsageError, match="one student cannot"):
        Mutual(copies=0)
    with pytest.raises(UsageError, match="teacher='big' has no say"):
        Distill(teaching=Mutual(), teacher="big")
    with pytest.raises(UsageError, match="attention compares features"):
        Distill(teaching=Mutual(), losses=(Attention(),))
    with pytest.raises(UsageError, match="augment blends them"):
        Distill(teaching=Mutual(), augment=(Mixup(),))
    with pytest.raises(NeedError, match="labels"):
        Distill(teaching=Mutual())(net(), Context(task=Task(train=[X])))
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(ModelError, match=r"\(48, 3\) and student 2 \(48, 4\)"):
        Distill(teaching=Mutual(students=("o",)))(net(), Context(task=TASK, models={"o": other}))


# --- generations -----------------------------------------------------------------------------------------------------


def test_every_generation_begins_anew_and_learns_from_the_last() -> None:
    teacher = Finetune(epochs=20, lr=0.02)(net(), Context(task=TASK))
    context = Context(task=TASK, models={"original": teacher})
    method = Distill(teaching=SelfDistillation(generations=2), epochs=60, lr=0.05)
    found = method.transform(net(seed=4), context)
    assert (answers(found) - answers(teacher)).abs().mean() < 0.1
    told = context.record.details["before"]
    assert [list(row) for row in told] == [["student", "original"], ["student", "generation 1"]]
    assert told[0]["student"] < told[0]["original"]  # a fresh one knows nothing


def test_what_is_fixed_is_not_begun_afresh() -> None:
    pruned = Prune(sparsity=0.5)(net(), Context(task=TASK))
    with pytest.raises(PhaseError, match="start=copied"):
        Distill(teaching=SelfDistillation())(pruned, Context(task=TASK))
    context = Context(task=TASK, models={"original": net(seed=3)})
    found = Distill(teaching=SelfDistillation(start="copied", generations=2), epochs=1)(pruned, context)
    assert slots(found)["4.weight"].phase == "mask"


def test_a_network_without_resets_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(36, 3))

        def forward(self, x):
            return x.flatten(1) @ self.weight

    with pytest.raises(ModelError, match="Own has a reset_parameters"):
        Distill(teaching=SelfDistillation())(Own(), Context(task=TASK))


def test_what_keeps_its_trained_values_is_said() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Parameter(torch.ones(36)), nn.Linear(36, 3)
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

    context = Context()
    assert bool((afresh(Token(), context, "a").token == 1).all())
    assert [(row["name"], row["reason"].split(":")[0]) for row in context.record.skipped] == [
        ("the model itself", "it has parameters and no reset_parameters method"), ("frozen", "frozen")
    ]  # fmt: skip


def test_the_model_at_hand_may_teach_beside_the_original() -> None:
    from espalier.distill import Distill, MultiTeacher

    assert "model:current" not in Distill(teaching=MultiTeacher(beside=("current",))).needs
