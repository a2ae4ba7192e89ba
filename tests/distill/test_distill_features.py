"""Features by path or by shape, adapters, and hooks that leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from tests.distill.classroom import fixed, learn, net
from tests.train.conftest import image_task
from torch import nn

from espalier.core.callback import Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError, UnknownNameError
from espalier.core.parametrize import slots
from espalier.core.task import Task
from espalier.distill import Attention, Distill, Features, Hints, Relational, SoftTargets
from espalier.distill.lesson import look, prepare
from espalier.distill.outputs import Reading
from espalier.distill.pairing import pair_up
from espalier.distill.places import Place, caught, matched, named, same_size
from espalier.prune import Prune
from espalier.testing.compare import hooks
from espalier.train import L1

FEATURES = [Hints(epochs=1), Hints(mode="joint"), Features(), Attention(), Relational()]
READ = Reading("", 1, classes=True)


def seen_in(model: nn.Module, task: Task, batch) -> list:
    with torch.no_grad():
        return look(model, Context(task=task), batch, READ)[1]


def pairs(student: nn.Module, teacher: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, str]]:
    task, batch = Task(), (fixed(*shape), torch.zeros(shape[0], dtype=torch.long))
    found = matched(seen_in(student, task, batch), seen_in(teacher, task, batch))
    return [(a.path, b.path) for a, b in found]


def test_one_pair_for_each_size_that_both_have() -> None:
    def stages(*widths: int) -> nn.Module:
        layers, before = [], 1
        for width in widths:
            layers += [nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.ReLU()), nn.MaxPool2d(2)]
            before = width
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * (16 // 2 ** len(widths)) ** 2, 3))

    student, teacher = stages(2, 4), stages(8, 8, 16)
    assert pairs(student, teacher, (2, 1, 16, 16)) == [("0", "0"), ("2", "2"), ("3", "4"), ("4", "6")]


def test_as_many_channels_come_first() -> None:
    student = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    teacher = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
    assert pairs(student, teacher, (4, 6)) == [("1", "1")]
    wider = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3))
    assert pairs(student, wider, (4, 6)) == [("1", "3")]


def test_tokens_have_their_channels_last_and_1d_convolutions_second() -> None:
    batch = (fixed(3, 5, 6), torch.zeros(3, dtype=torch.long))
    tokens = nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3))
    (row,) = [row for row in seen_in(tokens, Task(), batch) if str(row.place) == "0"]
    assert (row.size, row.channels) == ((5,), 4)
    signal = nn.Sequential(nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    (row,) = [row for row in seen_in(signal, Task(), batch) if str(row.place) == "0"]
    assert (row.size, row.channels) == ((4,), 4)


def test_names_of_wrappers_are_taken_off() -> None:
    model = nn.Sequential(net())
    for path in ("0.2", "module.0.2", "_orig_mod.0.2", "module._orig_mod.0.2"):
        assert named(path, model, "x", "student") == Place("0.2")
    with pytest.raises(UnknownNameError, match=r"the teacher has no module called 'module.0.22'.*'0\.2'"):
        named("module.0.22", model, "x", "teacher")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_path_that_matches_nothing_names_close_ones(side: str) -> None:
    layers = {"block": "2"} if side == "student" else {"2": "block"}
    with pytest.raises(UnknownNameError, match=rf"distill\.features: the {side} has no module called 'block'"):
        learn(net(), image_task(), losses=(Features(layers=layers),))


def test_a_module_that_is_not_called_is_said() -> None:
    model = net()
    model.spare = nn.Identity()
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    with pytest.raises(ModelError, match="spare of the student has no features"):
        learn(model, image_task(), losses=(Features(layers=("spare",)),))


def test_features_that_fit_nowhere_list_both_sides() -> None:
    student, teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(ModelError, match=r"(?s)attention found no features.*0 \(36,\).*layers="):
        learn(student, image_task(), teacher, losses=(Attention(),))


def test_channels_that_differ_need_an_adapter() -> None:
    with pytest.raises(ModelError, match=r"compared channel by channel.*where-needed"):
        learn(net(4), image_task(), net(6), losses=(Features(adapters="never"),))
    with pytest.raises(ModelError, match="as many dimensions"):
        learn(net(4), image_task(), net(6), losses=(Features(layers={"2": "3"}),))


def test_the_larger_map_is_averaged_down() -> None:
    a, b = same_size(fixed(2, 3, 8, 6), fixed(2, 5, 4, 9))
    assert (a.shape, b.shape) == ((2, 3, 4, 6), (2, 5, 4, 6))
    assert torch.allclose(a[:, :, 0, 0], fixed(2, 3, 8, 6)[:, :, :2, 0].mean(2))


@pytest.mark.parametrize("part", FEATURES, ids=lambda part: f"{part.id}-{getattr(part, 'mode', '')}")
def test_nothing_stays_behind(part) -> None:
    """No hook in the student or the teacher, no adapter in the state dict, no gradient or change in the teacher."""
    student, teacher = net(4), net(8, seed=1, size=5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    taught = learn(student, image_task(), teacher, losses=(part, SoftTargets()), epochs=2)
    for model in (taught, teacher):
        assert not any(hooks(model).values())
    assert taught.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())


def test_hooks_are_gone_after_a_failure() -> None:
    model = net()
    with pytest.raises(RuntimeError), caught(model, [Place("0"), Place("4", "in")]):
        model(torch.zeros(1, 7))
    assert not any(hooks(model).values())


def test_adapters_learn() -> None:
    """The student holds the teacher's channels among others: a linear map is all that is missing."""
    student, teacher, task = net(8, seed=2), net(4, seed=2), image_task()
    with torch.no_grad():
        student[0].weight[:4] = teacher[0].weight
        student[0].bias[:4] = teacher[0].bias
    method = Distill(losses=(Features(layers=("2",)),), lr=0.02, teacher="t")
    context = Context(task=task, models={"t": teacher})
    teachers = (method.hired("t", student, context),)
    lesson = prepare(
        method, student.eval(), teachers, context, method.read(context), losses=method.losses, hard=0.0
    )  # fmt: skip
    assert [type(adapter) for adapter in lesson.pairings[0].adapters] == [nn.Conv2d]
    loop = Loop(student, torch.optim.SGD(student.parameters(), 1.0), context, torch.Generator(), 1, 120)
    loop.optimizer.param_groups[0]["initial_lr"] = 1.0
    batch, losses = next(iter(task.train)), []
    for _ in range(120):
        with lesson.around(loop):
            output = student(batch[0])
        value = lesson.loss(loop, batch, output, torch.zeros(()))
        value.backward()
        lesson.after_step(loop)
        losses.append(float(value.detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad is None for parameter in teachers[0].model.parameters())


def test_hints_train_up_to_the_layer_only_in_the_first_stage() -> None:
    student, teacher = net(4), net(8, seed=1, size=5)
    task = image_task()
    method = Distill(losses=(Hints(epochs=2, layers=("1",)),), epochs=1, lr=1e-9, teacher="t")
    taught = method(student, Context(task=task, models={"t": teacher}))
    moved = {name: not torch.equal(slot.latent, slots(student)[name].latent) for name, slot in slots(taught).items()}
    assert moved["0.weight"]
    assert method.weighed()[0] == (SoftTargets(),)  # the second stage, where no other loss is named
    first = Distill(losses=(Hints(epochs=2, layers=("1",)),), epochs=1, lr=1e-2, teacher="t")
    calls = []

    class Watching(Distill):
        def train(self, model, context, **more):
            calls.append((self.epochs, more["name"], [type(part).id for part in more["callbacks"][0].losses]))
            before = model[4].weight.detach().clone()
            result = super().train(model, context, **more)
            calls.append(torch.equal(before, model[4].weight))
            return result

    Watching(**{name: getattr(first, name) for name in ("losses", "epochs", "lr", "teacher")})(
        student, Context(task=task, models={"t": teacher})
    )
    assert calls == [(2, "fit-hints", ["hints"]), True, (1, "fit", ["soft-targets"]), False]


def test_hints_take_the_middle_pair_and_relational_the_last_inputs() -> None:
    task = Task()
    batch = (fixed(2, 1, 6, 6), torch.zeros(2, dtype=torch.long))
    student = seen_in(net(4), task, batch)
    teacher = seen_in(net(8), task, batch)
    assert Hints().found(student, teacher) == [(Place("2"), Place("2"))]
    assert Relational().found(student, teacher) == [(Place("4", "in"), Place("4", "in"))]
    assert str(Place("4", "in")) == "the input of 4"


def test_features_that_are_not_finite_name_the_layer() -> None:
    class Bad(nn.Module):
        def forward(self, x):
            return x if not self.training else x * float("nan")

    student = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), Bad(), nn.Linear(5, 3))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(NumericError, match=r"distill\.features: the features of 2 in the student hold NaN"):
        learn(student, image_task(), teacher, losses=(Features(layers=("2",)),))
    with torch.no_grad():
        teacher[1].bias[0] = float("inf")
    student[2] = nn.ReLU()
    with pytest.raises(NumericError, match="features of 2 in the teacher"):
        learn(student, image_task(), teacher, losses=(Features(layers=("2",)),))


def test_a_layer_that_runs_twice_gives_its_last_features() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(36, 36)
            self.head = nn.Linear(36, 3)

        def forward(self, x):
            return self.head(self.block(torch.relu(self.block(x.flatten(1)))))

    model, x = Twice(), fixed(2, 1, 6, 6)
    with caught(model, [Place("block")]) as found:
        model(x)
    expected = model.block(torch.relu(model.block(x.flatten(1))))
    assert torch.equal(found[Place("block")], expected)
    model.alias = model.block
    assert named("alias", model, "x", "student") == Place("block")
    rows = seen_in(model, Task(), (x, torch.zeros(2)))
    assert [str(row.place) for row in rows] == ["the input of block", "block", "the input of head", "head"]


def test_what_makes_the_weights_is_no_feature() -> None:
    """A pruned layer computes its weight inside a module, here of as many rows as the batch has samples."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3))
    masked = Prune(sparsity=0.5)(model, Context(task=image_task()))
    batch = next(iter(image_task().train))
    for network in (model, masked):
        assert [str(row.place) for row in seen_in(network, Task(), batch) if row.place.side == "out"] == [
            "0", "1", "2", "3"
        ]  # fmt: skip
    found = matched(seen_in(masked, Task(), batch), seen_in(model, Task(), batch))
    assert found == [(Place("2"), Place("2"))]
    assert [row.weighted for row in seen_in(masked, Task(), batch) if row.place.path == "1"] == [True, True]


def test_features_are_as_they_were_handed_back() -> None:
    x, layers = fixed(2, 1, 6, 6), [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten()]
    model = nn.Sequential(*layers)
    with caught(model, [Place("1")]) as found:
        model(x)
    assert torch.equal(found[Place("1")], layers[1](layers[0](x)))
    found[Place("1")].sum().backward()  # and lead back to the weights
    assert layers[1].bias.grad.sum() > 0


def test_signals_keep_their_channels_second_in_layers_of_other_names() -> None:
    batch = (fixed(3, 2, 9), torch.zeros(3, dtype=torch.long))
    signal = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3))
    rows = {str(row.place): row for row in seen_in(signal, Task(), batch)}
    assert [(rows[path].size, rows[path].channels) for path in "012"] == [((7,), 4)] * 3


def test_relations_are_computed_in_float32() -> None:
    """Two tight clusters far apart: in bfloat16 their cosines are not even cosines."""
    x = torch.cat([0.05 * fixed(16, 36), 3 + 0.05 * fixed(16, 36, seed=1)])
    ends = [nn.Sequential(nn.Flatten(), nn.Linear(36, 3)) for _ in range(2)]
    sides = [(end, seen_in(end, Task(), (x, None))) for end in ends]
    pairing = pair_up(Relational(), 0, *sides)
    mine, theirs = ({pairing.pairs[0][0].place: side} for side in (x, x + 0.01 * fixed(32, 36, seed=2)))
    with torch.autocast("cpu", torch.bfloat16):
        found = pairing.value(mine, theirs)
    assert torch.equal(found, pairing.value(mine, theirs))


def test_two_first_stages_are_two_and_shrink_nothing_above_them() -> None:
    student, teacher = net(4), net(8, seed=1, size=5)
    parts = (Hints(epochs=1, layers=("1",)), Hints(epochs=2, layers=("2",)))
    calls = []

    class Watching(Distill):
        def train(self, model, context, **more):
            calls.append((self.epochs, more["name"], self.penalties))
            return super().train(model, context, **more)

    Watching(losses=parts, epochs=3, teacher="t", penalties=(L1(),))(
        student, Context(task=image_task(), models={"t": teacher})
    )
    assert calls == [(1, "fit-hints", ()), (2, "fit-hints-2", ()), (3, "fit", (L1(),))]
