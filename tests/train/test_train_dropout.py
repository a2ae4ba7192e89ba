"""Dropout put in, set, lowered after pruning, and scheduled while a model trains."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tests.train.conftest import StoredContext, image_task, small_net, states_equal
from torch import nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, ModelError, NeedError, NoEffectWarning, UnknownNameError, UsageError
from espalier.core.forms import Mask
from espalier.core.insert import Insert, inserted
from espalier.core.model import copy_model
from espalier.core.parametrize import attach, plain, slots
from espalier.core.plan import Plan, applied
from espalier.core.recipe import Recipe
from espalier.graph import trace
from espalier.prune import Prune
from espalier.runs.checkpoint import load_model, save_model
from espalier.train import BatchNorm, CurriculumDropout, Dropout, EarlyDropout, Finetune
from espalier.train.dropout import rescaled
from espalier.train.dropout_schedule import dropouts


class Wide(nn.Module):
    """Functions between the layers, no modules; one of its layers is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(36, 20), nn.Linear(20, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.three(torch.relu(self.two(input=torch.relu(self.one(x.flatten(1))))))


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide()


X = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def rates(model: nn.Module) -> dict[str, float]:
    return {path: place.rate for path, place in dropouts(model).items()}


# --- insert --------------------------------------------------------------------------------------


def test_hidden_layers_get_one_and_in_use_nothing_changes() -> None:
    net, context = wide().eval(), Context(image_task())
    done = Dropout(rate=0.25)(net, context)
    assert rates(done) == {"two.before": 0.25, "three.before": 0.25}
    assert torch.equal(done(X), net(X))
    assert done.state_dict().keys() == net.state_dict().keys()
    assert not rates(net)


def test_units_are_dropped_before_the_layer_and_the_rest_scaled_up() -> None:
    """z = W (r * y) / (1 - p) + b."""
    net = Dropout(rate=0.5, layers=("two",))(wide(), Context(image_task())).train()
    y, seen = torch.relu(net.one(X.flatten(1))), []
    handle = net.two.register_forward_hook(lambda _, args, kwargs, out: seen.append((kwargs["input"], out)),
                                           with_kwargs=True)  # fmt: skip
    net(X)
    handle.remove()
    ((entered, left),) = seen
    kept = entered != 0
    assert torch.allclose(entered, torch.where(kept, 2 * y, 0.0))
    assert 0.4 < float(kept[y > 0].float().mean()) < 0.6
    assert torch.allclose(left, entered @ net.two.weight.T + net.two.bias, atol=1e-6)


def test_what_gets_none_is_said() -> None:
    context = Context(image_task())
    with pytest.warns(NoEffectWarning):
        assert rates(Dropout()(small_net(dropout=0.3), context)) == {"4": 0.3}
    child = Context(image_task())
    model = Dropout().transform(small_net(), child)
    assert rates(model) == {"4": 0.0}
    assert child.record.skipped == [{"name": "5", "reason": "a dropout stands before it; mode=set changes its rate"}]
    child = Context(image_task())
    Dropout().transform(wide(), child)
    assert child.record.skipped == [
        {"name": "one", "reason": "it reads the model's inputs; name it in layers to drop of these"}
    ]
    again = Context(image_task())
    with pytest.warns(NoEffectWarning, match="a dropout stands before it"):
        Dropout()(Dropout()(wide(), again), again)


def test_named_layers_convolutions_and_inputs_among_them() -> None:
    done = Dropout(rate=0.1, layers=("0", "type:Linear"))(small_net(norm=True), Context(image_task()))
    assert rates(done) == {"0.before": 0.1, "4": 0.0}
    with pytest.raises(UnknownNameError, match="no weight answers to 'fc1'"):
        Dropout(layers=("fc1",))(wide(), Context(image_task()))


def test_layers_that_are_never_called_are_skipped() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            x = x.squeeze(1)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    context = Context(image_task())
    done = Dropout().transform(Attention(), context)
    assert rates(done) == {"head.before": 0.5}
    assert context.record.skipped == [
        {"name": "attention.out_proj", "reason": "its forward is not called, so nothing can be put before it"}
    ]


def test_the_edit_is_replayed_copied_and_traced() -> None:
    net = wide()
    attach(slots(net)["two.weight"], Mask(torch.arange(200).reshape(10, 20) % 2 > 0))
    done = Dropout(rate=0.25)(net, Context(image_task()))
    assert slots(done)["two.weight"].phase == "mask"
    data = json.loads(json.dumps(applied(done).to_json()))
    again = Plan.from_json(data).apply(wide())
    assert rates(again) == rates(copy_model(done)) == rates(done)
    graph = trace(plain(done), (X,))
    assert [node.args["p"] for node in graph.nodes if node.op == "dropout" and "p" in node.args] == [0.25, 0.25]
    assert str(applied(done)).splitlines() == ["Dropout(p=0.25) before two", "Dropout(p=0.25) before three"]


def test_checkpoints_carry_what_was_put_in(tmp_path) -> None:
    recipe = Recipe(steps=(Dropout(rate=0.25), BatchNorm(mode="insert"), Finetune(epochs=1)))
    done = recipe(wide(), Context(image_task()))
    save_model(done, tmp_path / "kept.safetensors")
    loaded = load_model(wide(), tmp_path / "kept.safetensors")
    assert rates(loaded) == {"two.before": 0.25, "three.before": 0.25}
    assert torch.equal(loaded.eval()(X), done.eval()(X))


def test_a_place_is_taken_once() -> None:
    edit = Insert(path="two", side="before", spec={"class": "Dropout", "args": {"p": 0.5}})
    net = wide()
    edit.apply(net)
    assert isinstance(inserted(net.two, "before"), nn.Dropout)
    assert inserted(net.two, "after") is None
    with pytest.raises(ModelError, match="two has a 'before' already"):
        edit.apply(net)
    net.two._modules["before"] = nn.Identity()
    edit.apply(net)
    assert len(net.two._forward_pre_hooks) == 1


# --- set -----------------------------------------------------------------------------------------


def test_rates_are_set_by_path() -> None:
    net = Dropout(rate=0.5)(wide(), Context(image_task()))
    done = Dropout(mode="set", rate=0.125, layers=("three.*",))(net)
    assert rates(done) == {"two.before": 0.5, "three.before": 0.125}
    assert rates(Plan.from_json(applied(done).to_json()).apply(wide())) == rates(done)
    with pytest.raises(UnknownNameError, match=r"no dropout layer answers to 'four'.*two.before"):
        Dropout(mode="set", rate=0.1, layers=("four",))(net)
    with pytest.raises(UsageError, match="mode=set needs a rate"):
        Dropout(mode="set")


def test_rates_of_recurrent_and_attention_layers_and_of_whole_numbers() -> None:
    net = nn.ModuleDict({
        "rnn": nn.LSTM(4, 4, num_layers=2, dropout=0.5), "plain": nn.LSTM(4, 4), "whole": nn.Dropout(0),
        "attention": nn.MultiheadAttention(4, 2, dropout=0.25), "channels": nn.Dropout2d(1),
    })  # fmt: skip
    context = Context()
    done = Dropout(mode="set", rate=0.1).transform(copy_model(net), context)
    assert rates(done) == {"rnn": 0.1, "whole": 0.1, "attention": 0.1, "channels": 1.0}
    assert done["plain"].dropout == 0
    assert [row["name"] for row in context.record.skipped] == ["channels"]
    with pytest.warns(NoEffectWarning, match="no dropout layer; mode=insert"):
        Dropout(mode="set", rate=0.1)(nn.Linear(2, 2))


# --- rescale -------------------------------------------------------------------------------------


def test_the_rate_falls_with_the_root_of_the_connections_left() -> None:
    """Han et al. 2015, eq. 2."""
    assert rescaled(0.5, 25, 100) == 0.25
    net, context = Dropout(rate=0.5)(wide(), Context(image_task())), Context(image_task())
    pruned = Prune(sparsity={"one": 0.75, "two": 0.5, "three": 0.0})(net, context)
    kept = {name: int(slots(pruned)[f"{name}.weight"].value().count_nonzero()) for name in ("one", "two")}
    assert kept == {"one": 180, "two": 100}
    done = Dropout(mode="rescale")(pruned, context)
    expected = {"two.before": 0.5 * math.sqrt(180 / 720), "three.before": 0.5 * math.sqrt(100 / 200)}
    assert rates(done) == pytest.approx(expected)
    # rates count from those at the start, however often they are lowered
    sparser = Prune(sparsity={"one": 0.9, "two": 0.5, "three": 0.0})(done, context)
    again = Dropout(mode="rescale")(sparser, context)
    assert rates(again)["two.before"] == pytest.approx(0.5 * math.sqrt(72 / 720))
    assert rates(Dropout(mode="rescale", rate=0.1)(sparser, context))["two.before"] == pytest.approx(
        0.1 * math.sqrt(72 / 720)
    )


def test_dropout_of_the_models_own_and_layers_with_all_connections() -> None:
    context = Context(image_task())
    net = small_net(dropout=0.4)
    with pytest.warns(NoEffectWarning, match="0 has all its connections"):
        Dropout(mode="rescale")(net, context)
    context.models["original"] = small_net()  # whose rate is 0
    pruned = Prune(sparsity=0.5, layers=("0",)).transform(copy_model(net), Context(image_task()))
    done = Dropout(mode="rescale")(pruned, context)
    assert rates(done) == pytest.approx({"4": 0.4 * math.sqrt(0.5)})
    reset = Dropout(mode="set", rate=0.2)(done)
    assert rates(Dropout(mode="rescale")(reset, context)) == pytest.approx({"4": 0.2 * math.sqrt(0.5)})
    with pytest.warns(NoEffectWarning, match="no layer with connections runs before it"):
        Dropout(mode="rescale")(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)), Context(image_task()))
    with pytest.raises(NeedError, match="training data"):
        Dropout(mode="rescale")(net, Context())
    assert Dropout(mode="set", rate=0.1).needs == frozenset()


# --- schedules -----------------------------------------------------------------------------------


def test_schedules_by_their_formulas() -> None:
    curriculum, early = CurriculumDropout(), EarlyDropout(until=0.5)
    assert [curriculum.factor(p) for p in (0.0, 0.1, 1.0)] == [0.0, 1 - math.exp(-1), 1 - math.exp(-10)]
    assert [early.factor(p) for p in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.5, 0.0, 0.0]
    assert EarlyDropout(until=0.0).factor(0.0) == 0.0


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def loss(self, loop, batch, output, loss):
        self.seen.append(loop.model[4].p)
        return loss


@pytest.mark.parametrize("schedule", [CurriculumDropout(), EarlyDropout()])
def test_the_rate_follows_the_schedule_and_is_put_back(schedule) -> None:
    net, watch = small_net(dropout=0.4), Rates()
    Finetune(epochs=2, dropout=schedule).train(net, Context(image_task()), callbacks=[watch])
    assert watch.seen == [0.4 * schedule.factor(step / 12) for step in range(12)]
    assert rates(net) == {"4": 0.4}


def test_the_rate_is_put_back_after_a_failure_too() -> None:
    class Fails(Callback):
        def after_step(self, loop):
            raise KeyboardInterrupt

    net = small_net(dropout=0.4)
    with pytest.raises(KeyboardInterrupt):
        Finetune(epochs=2, dropout=EarlyDropout()).train(net, Context(image_task()), callbacks=[Fails()])
    assert rates(net) == {"4": 0.4}


def test_a_resumed_schedule_goes_on_where_it_was() -> None:
    step = Finetune(epochs=5, lr=0.02, dropout=CurriculumDropout())
    through = step(small_net(dropout=0.5), StoredContext(image_task(), seed=4))
    broken = StoredContext(image_task(), seed=4)
    for die_after in (1, 3):
        broken.epochs().die_after = die_after
        with pytest.raises(KeyboardInterrupt):
            step(small_net(dropout=0.5), broken)
    assert states_equal(through, step(small_net(dropout=0.5), broken))


def test_a_schedule_without_dropout_says_so() -> None:
    with pytest.warns(EspalierWarning, match="no layer of Sequential drops anything"):
        Finetune(epochs=1, dropout=EarlyDropout())(small_net(), Context(image_task()))


def test_it_travels_in_a_recipe() -> None:
    text = """
    steps:
      - train.dropout: {rate: 0.2}
      - prune.prune: {sparsity: 0.5}
      - train.dropout: {mode: rescale}
      - train.finetune: {epochs: 1, dropout: curriculum-dropout}
    """
    recipe = Recipe.from_yaml(text)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    done = recipe(wide(), Context(image_task()))
    assert rates(done) == pytest.approx(dict.fromkeys(("two.before", "three.before"), 0.2 * math.sqrt(0.5)))
