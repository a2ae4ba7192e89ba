"""Schemes: the stages they make, what is quantized in each, and the full-precision network that learns alongside."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError, UnknownNameError, UsageError
from espalier.core.inputs import quantized_inputs
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight
from espalier.quantize import BWN, LSQ, QAT, AffineInput, Quantize, Scheme
from espalier.quantize.guided import Guide, Guided, default_layers, hint
from espalier.quantize.progressive import Progressive
from espalier.quantize.two_stage import TwoStage
from espalier.runs.checkpoint import EpochFile
from espalier.testing.compare import bits
from espalier.train import SGD, Finetune, Mixup


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )


@dataclass(frozen=True, kw_only=True)
class Watch(Scheme):
    """Notes the bits of weights and inputs when each stage begins."""

    id = "watch"

    def __post_init__(self):
        object.__setattr__(self, "seen", [])

    def stages(self, before, method):
        return tuple(stage.replace(guides=(*stage.guides, self)) for stage in before)

    def callback(self, model, context):
        forms = [slot.form for slot in slots(model).values() if isinstance(slot.form, QuantizedWeight)]
        self.seen.append(([form.bits for form in forms], [q.bits for q in quantized_inputs(model).values()]))


def stages_seen(task, *schemes, **fields):
    watch = Watch()
    given = {"weights": QAT(), "activations": AffineInput(), "bits": 2, "activation_bits": 3, "ends": "same"} | fields
    step = Quantize(epochs=12, schemes=(*schemes, watch), **given)
    step(network(), Context(task=task))
    return watch.seen


def test_two_stage_puts_weights_first(task):
    assert stages_seen(task, TwoStage()) == [([2] * 3, []), ([2] * 3, [3] * 3)]


def test_progressive_goes_down(task):
    assert stages_seen(task, Progressive(bits=(16, 8, 4))) == [
        ([16] * 3, [16] * 3), ([8] * 3, [8] * 3), ([4] * 3, [4] * 3), ([2] * 3, [3] * 3)
    ]  # fmt: skip
    assert stages_seen(task, Progressive(bits=(8, 3)), ends=4) == [
        ([8] * 3, [8] * 3), ([4, 3, 4], [4, 3, 4]), ([4, 2, 4], [4, 3, 4])
    ]  # fmt: skip


def test_both_in_one(task):
    assert stages_seen(task, Progressive(bits=(8,)), TwoStage()) == [
        ([8] * 3, []), ([8] * 3, [8] * 3), ([2] * 3, [8] * 3), ([2] * 3, [3] * 3)
    ]  # fmt: skip


def test_widths_that_change_nothing_make_no_stage():
    step = Quantize(weights=QAT(), bits=4, epochs=9, schemes=(Progressive(bits=(16, 8, 4, 2)),))
    assert [stage.width for stage in step.stages()] == [16, 8, 1]
    mixed = Quantize(weights=QAT(), bits={"4": 2}, epochs=9, schemes=(Progressive(bits=(8, 4)),))
    assert [stage.width for stage in mixed.stages()] == [8, 4, 1]


def test_each_stage_begins_where_the_last_ended(task):
    """Without a step of training in between, widths and scales change and the latent weights do not."""
    model = network()
    step = Quantize(weights=LSQ(), bits=2, epochs=3, lr=1e-30, schemes=(Progressive(bits=(8, 4)),), optimizer=SGD())
    result = step(model, Context(task=task))
    slot = slots(result)["4.weight"]
    assert torch.allclose(slot.latent, model[4].weight, atol=1e-12)
    assert slot.form.bits == 2


def test_refusals(task):
    with pytest.raises(UsageError, match=r"two-stage quantizes weights first and then activations: give both"):
        Quantize(schemes=(TwoStage(),), epochs=4)
    with pytest.raises(UsageError, match=r"make no stage before the bits asked for"):
        Quantize(weights=BWN(), bits=1, schemes=(Progressive(),), epochs=4)
    with pytest.raises(UsageError, match=r"must fall"):
        Progressive(bits=(2, 4))
    with pytest.raises(UsageError, match=r"the schemes make 2 stages; give as many epochs"):
        Quantize(schemes=(Progressive(),), epochs=1)
    with pytest.raises(UsageError, match=r"guided gives every image one label, and mixup blends two"):
        Quantize(schemes=(Guided(),), epochs=2, augment=(Mixup(),))
    with pytest.raises(UnknownNameError, match=r"no layer is called '5'"):
        Quantize(epochs=1, schemes=(Guided(layers=("5",)),))(network(), Context(task=task))


# --- guided --------------------------------------------------------------------------------------------------------


def test_the_hint_pulls_at_both_and_does_not_see_the_scale():
    full = [torch.randn(3, 4, requires_grad=True), torch.randn(6, requires_grad=True)]
    low = [torch.randn(3, 4, requires_grad=True), torch.randn(6, requires_grad=True)]
    found = hint(full, low)

    def correlation(f, s):
        return float(torch.corrcoef(torch.stack([f.detach().flatten(), s.detach().flatten()]))[0, 1])

    wanted = sum(1 - correlation(f, s) for f, s in zip(full, low, strict=True))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-3)  # of normalised maps it is 1 - their correlation
    found.backward()
    assert all(float(side.grad.abs().max()) > 0 for side in (*full, *low))
    assert float(hint([4 * f - 2 for f in full], [s / 2 + 1 for s in low]).detach()) == pytest.approx(wanted, rel=1e-3)
    assert float(hint([torch.full((3, 2), 5.0)], [torch.zeros(3, 2)])) == 0


def test_default_layers_are_in_the_middle_and_before_the_last(task):
    context = Context(task=task)
    assert default_layers(network(), context) == ("4",)
    longer = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 10))
    assert default_layers(longer, context) == ("4", "6")
    assert default_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), context) == ("1",)


def normalised(value):
    return (value - value.mean()) / (value.var(correction=0) + 1e-5).sqrt()


def test_one_step_is_that_of_the_sum_of_both_losses(task):
    low, original = network(), network()
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.8)
    context = Context(task=task, models={"original": original})
    scheme = Guided(strength=3.0, optimizer=SGD(momentum=0.0), lr=0.5, layers=("0", "4"))
    guide = scheme.callback(low, context)
    assert isinstance(guide, Guide)
    optimizer = torch.optim.SGD(low.parameters(), lr=0.25)
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.5  # the schedule is at one half
    loop = Loop(low, optimizer, context, torch.Generator(), 1, 1)
    batch = next(iter(task.data("train")))
    low.train()
    guide.on_start(loop)
    with guide.around(loop):
        output = task.predict(low, batch)
    loss = guide.loss(loop, batch, output, task.training_loss(output, batch))
    loss.backward()
    guide.after_step(loop)

    twin, full = copy.deepcopy(low), network().train()
    x, y = batch
    features = [[], []]
    outputs = []
    for net, found in zip((twin, full), features, strict=True):
        net.zero_grad()
        value = x
        for number, layer in enumerate(net):
            value = layer(value)
            if number in (0, 4):
                found.append(value)
        outputs.append(nn.functional.cross_entropy(value, y))
    pairs = [[normalised(value) for value in pair] for pair in zip(*features, strict=True)]
    apart = sum((a - b).square().mean() / 2 for a, b in pairs)
    wanted = sum(outputs) + 3.0 * apart
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    wanted.backward()
    for mine, other in zip(low.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-6)
    for after, before in zip(guide.full.parameters(), full.parameters(), strict=True):
        assert torch.allclose(after, before - 0.25 * before.grad, atol=1e-6)  # half of its own 0.5
    assert not torch.equal(guide.full[0].weight, original[0].weight)
    assert torch.equal(original[0].weight, network()[0].weight)


def guided(**fields: Any) -> Quantize:
    return Quantize(
        weights=QAT(), activations=AffineInput(), bits=2, activation_bits=2, epochs=4, lr=3e-3,
        schemes=(TwoStage(), Guided(**fields)),
    )  # fmt: skip


def test_guided_training_learns_and_leaves_nothing_behind(task):
    context = Context(task=task)
    base = Finetune(epochs=4, lr=3e-3)(network(), context)
    before = copy.deepcopy(base.state_dict())
    result = guided()(base, Context(task=task))
    assert context.measure(result).value > 85
    assert not any(module._forward_hooks for module in result.modules())
    assert bits(base.state_dict()) == bits(before)
    other = guided(strength=0.0)(base, Context(task=task))
    assert bits(other.state_dict()) != bits(result.state_dict())


class Kept(Context):
    """Keeps epochs in a folder; stops after ``stop`` saves."""

    folder: Path
    stop: int

    def epochs(self, name: str = "fit"):
        context = self

        class Store(EpochFile):
            def save(self, epoch, tensors, data):
                super().save(epoch, tensors, data)
                context.stop -= 1
                if not context.stop:
                    raise KeyboardInterrupt

        return Store(self.folder / name)

    def child(self, name, method):
        made = super().child(name, method)
        made.folder, made.stop = self.folder, self.stop
        return made


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_guided_training_goes_on_bit_for_bit(stop, task, tmp_path):
    base = network()
    for count in (stop, 99):
        context = Kept(task=task)
        context.folder, context.stop = tmp_path, count
        if count == stop:
            with pytest.raises(KeyboardInterrupt):
                guided()(base, context)
        else:
            result = guided()(base, context)
    assert bits(result.state_dict()) == bits(guided()(base, Context(task=task)).state_dict())


def test_features_that_changed_their_shape_are_named(task):
    original = network()
    smaller = nn.Sequential(*network()[:4], nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 10))
    with pytest.raises(ModelError, match=r"the output of 4 is \(\d+, 16\) here and \(\d+, 32\) in the original"):
        Quantize(epochs=1, schemes=(Guided(),))(smaller, Context(task=task, models={"original": original}))


def test_callbacks_of_several_guides_stand_side_by_side(task):
    watch = Watch()
    step = Quantize(weights=QAT(), bits=2, epochs=2, ends="same", schemes=(Guided(), Progressive(bits=(4,)), watch))
    assert [[guide.id for guide in stage.guides] for stage in step.stages()] == [["guided", "watch"]] * 2
    assert isinstance(Guided().callback(network(), Context(task=task, models={"original": network()})), Callback)
    step(network(), Context(task=task))
    assert [weights for weights, _ in watch.seen] == [[4] * 3, [2] * 3]
