"""A killed and resumed training equals the one that ran through, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.conftest import StoredContext, blobs, image_task, small_net, states_equal
from torch import Tensor, nn
from torch.utils.data import DataLoader

from espalier.core.callback import Callback
from espalier.core.errors import RunError, UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.parametrize import attach, slots
from espalier.train import SGD, AdamW, Cosine, EarlyStopping, Flip, Shift, fit
from espalier.train.state import pack, unpack


class Drift(Callback):
    """Stateful and random: a running mean of a weight, added back with noise from every generator."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.seen: dict[int, float] = {}

    def after_step(self, loop):
        with torch.no_grad():
            weight = loop.model[5].bias
            self.mean = weight.clone() if self.mean is None else 0.9 * self.mean + 0.1 * weight
            noise = torch.randn(3, generator=loop.generator) * 1e-3 + random.random() * 1e-3 + np.random.rand() * 1e-3
            weight.add_(0.1 * (self.mean - weight) + noise)
        self.seen[loop.step] = float("inf") if loop.step == 2 else float(self.mean[0])

    def state_dict(self):
        return {"mean": self.mean, "seen": self.seen, "pair": (1, self.mean)}

    def load_state_dict(self, state):
        assert state["pair"][0] == 1
        assert torch.equal(state["pair"][1], state["mean"])
        self.mean, self.seen = state["mean"], state["seen"]


def dress(net: nn.Module) -> nn.Module:
    """A mask on the convolution, shared codes on the classifier."""
    found = slots(net)
    attach(found["0.weight"], Mask(torch.arange(36).reshape(4, 1, 3, 3) % 3 > 0))
    index = torch.arange(192).reshape(3, 64) % 5
    attach(found["5.weight"], Shared(index, torch.linspace(-0.2, 0.2, 4), zero=True))
    return net


PARTS = [SGD(momentum=0.9, nesterov=True), AdamW(), SGD(momentum=0.0)]


@pytest.mark.parametrize("part", PARTS, ids=["momentum", "adamw", "plain"])
@pytest.mark.parametrize("forms", [False, True], ids=["dense", "forms"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_equals_uninterrupted(part, forms: bool, precision: str) -> None:
    own = torch.Generator()
    task = image_task(train=DataLoader(blobs(), batch_size=16, shuffle=True, generator=own))

    def run(context: StoredContext) -> tuple[nn.Module, Drift, object]:
        net, drift = small_net(dropout=0.3, norm=True), Drift()
        net = dress(net) if forms else net
        result = fit(
            net, context, epochs=7, callbacks=[drift], optimizer=part.build(net.parameters(), 0.02), schedule=Cosine(),
            augment=(Flip(), Shift(pixels=1)), stopping=EarlyStopping(patience=3), precision=precision,
        )  # fmt: skip
        return net, drift, result

    through, drift, whole = run(StoredContext(task, seed=4))
    broken = StoredContext(task, seed=4)
    for die_after in (1, 3, 4):
        broken.epochs().die_after = die_after
        with pytest.raises(KeyboardInterrupt):
            run(broken)
        own.manual_seed(die_after)  # what a fresh process would have here
        torch.manual_seed(die_after)
    resumed, again, rest = run(broken)
    assert states_equal(through, resumed)
    assert drift.seen == again.seen
    assert torch.equal(drift.mean, again.mean)
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (whole, rest)]
    assert plain[0] == plain[1]
    assert (whole.best_epoch, whole.stopped) == (rest.best_epoch, rest.stopped)


def test_death_in_the_middle_of_an_epoch_costs_that_epoch_only() -> None:
    class Dies(Callback):
        at = 14

        def after_step(self, loop):
            if loop.step == self.at:
                raise KeyboardInterrupt

    through, resumed = small_net(dropout=0.2), small_net(dropout=0.2)
    context = StoredContext(image_task())
    dies = Dies()
    with pytest.raises(KeyboardInterrupt):
        fit(small_net(dropout=0.2), context, epochs=4, callbacks=[dies], optimizer=None)
    assert context.epochs().kept[0] == 2
    Dies.at = -1
    fit(resumed, context, epochs=4, callbacks=[Dies()])
    fit(through, StoredContext(image_task()), epochs=4, callbacks=[Dies()])
    assert states_equal(through, resumed)


def test_a_finished_training_is_not_trained_again() -> None:
    context = StoredContext(image_task())
    first, second = small_net(), small_net()
    stopping = EarlyStopping(patience=1)
    one = fit(first, context, epochs=9, stopping=stopping, optimizer=AdamW().build(first.parameters(), 0.05))
    saves = context.epochs().saves
    assert one.stopped == "patience"
    two = fit(second, context, epochs=9, stopping=stopping, optimizer=AdamW().build(second.parameters(), 0.05))
    assert context.epochs().saves == saves == len(one.history)
    assert states_equal(first, second)
    assert two == one


def test_start_hook_runs_again_once_the_state_is_back() -> None:
    starts: list[tuple[int, int, float]] = []

    class Starts(Callback):
        def on_start(self, loop):
            starts.append((loop.epoch, loop.step, loop.model[5].bias[0].item()))

    context = StoredContext(image_task())
    context.epochs().die_after = 2
    with pytest.raises(KeyboardInterrupt):
        fit(small_net(), context, epochs=3, callbacks=[Starts()])
    kept = context.epochs().kept[1]["model/5.bias"][0]
    fit(small_net(), context, epochs=3, callbacks=[Starts()])
    assert [row[:2] for row in starts] == [(0, 0), (2, 12)]
    assert starts[1][2] == float(kept)


def test_loops_of_one_step_keep_their_states_apart() -> None:
    context = StoredContext(image_task())
    fit(small_net(), context, epochs=2, name="search")
    result = fit(small_net(), context, epochs=1, name="final")
    assert len(result.history) == 1
    assert sorted(context.stores) == ["final", "search"]


def test_a_state_of_another_training_is_refused() -> None:
    context = StoredContext(image_task())
    fit(small_net(), context, epochs=2)
    with pytest.raises(RunError, match=r"epochs 2 there, 3 here; optimizer 'AdamW' there, 'SGD' here"):
        net = small_net()
        fit(net, context, epochs=3, optimizer=SGD().build(net.parameters(), 0.1))


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.floats(allow_nan=False)
keys = st.text(max_size=4) | st.integers()
trees = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=12,
)


@settings(deadline=None, max_examples=80)
@given(trees)
def test_pack_round_trip(value: object) -> None:
    import json

    tensors: dict[str, Tensor] = {}
    data = json.loads(json.dumps(pack({"value": value, "$odd": [value]}, tensors), allow_nan=False))
    assert unpack(data, tensors) == {"value": value, "$odd": [value]}
    assert not tensors


def test_pack_keeps_shared_tensors_once_and_never_mixes_names() -> None:
    tied, square = torch.arange(6.0).reshape(2, 3), torch.arange(4.0).reshape(2, 2)
    tensors: dict[str, Tensor] = {}
    value = {"a/b": tied, "a": {"b": tied + 1, "c": tied[:1]}, "t": tied.t(), "again": tied, "none": torch.zeros(0)}
    value |= {"square": square, "turned": square.t()}
    back = unpack(pack(value, tensors), tensors)
    assert len(tensors) == 7
    assert torch.equal(back["square"], value["square"])
    assert torch.equal(back["turned"], value["turned"])
    assert all(torch.equal(back[k], value[k]) for k in ("a/b", "t", "again", "none"))
    assert torch.equal(back["a"]["b"], tied + 1)
    assert torch.equal(back["a"]["c"], tied[:1])


def test_pack_refuses_what_json_and_tensors_cannot_hold() -> None:
    with pytest.raises(UsageError, match=r"set at 'callbacks/0/names'"):
        pack({"callbacks": [{"names": {1}}]}, {})
