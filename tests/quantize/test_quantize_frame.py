"""The frame of quantization: forms, inputs, the technique; methods have tests of their own."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from espalier.api import fill_registry
from espalier.core.context import Context
from espalier.core.errors import Corrupt, NumericError, PhaseError, UnknownNameError, UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.inputs import FloatInput, QuantizeInput, quantized_input, quantized_inputs
from espalier.core.parametrize import freeze, plain, slots
from espalier.core.plan import Plan, applied
from espalier.core.quantized import QuantizedWeight
from espalier.core.recipe import Recipe
from espalier.core.representation import Affine as StoredAffine
from espalier.core.task import classification
from espalier.graph import trace
from espalier.prune import Channels, Prune
from espalier.quantize import LSQ, Affine, AffineInput, LSQInput, Quantize, places
from espalier.runs.checkpoint import load_model, save_model
from espalier.share import KMeans
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

fill_registry()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 10)
    )


def form_of(model: nn.Module, name: str) -> QuantizedWeight:
    form = slots(model)[name].form
    assert isinstance(form, QuantizedWeight)
    return form


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per", ["tensor", "channel", "group"])
@pytest.mark.parametrize("width", [1, 2, 4, 8, 12])
def test_affine_rounds_to_the_nearest_of_its_grid(per, symmetric, width, task):
    model = network()
    step = Quantize(weights=Affine(per=per, symmetric=symmetric, group=50), bits=width, ends="same")
    result = step(model, Context(task=task))
    stored = freeze(result)[0]["4.weight"]
    assert isinstance(stored, StoredAffine)
    assert stored.bits_per_code == width
    assert len(np.unique(stored.codes)) <= 2**width
    weight, found = model[4].weight.detach().double().numpy(), stored.dense().astype(float)
    scale = {"tensor": stored.scale, "channel": stored.scale[..., None]}.get(per)
    if scale is None:
        scale = np.repeat(stored.scale, 50, axis=1)[:, :216]
    half = width > 1 or not symmetric
    assert (np.abs(weight - found) <= (0.5 if half else 1.0) * scale * 1.0001).all()


def test_zero_is_exact_and_pruned_weights_stay_zero(task):
    context = Context(task=task)
    masked = Prune(sparsity=0.7)(network(), context)
    for weights in (Affine(), Affine(symmetric=False, per="tensor")):
        result = Quantize(weights=weights, bits=3, epochs=1)(masked, context)
        form = form_of(result, "4.weight")
        assert isinstance(form.inner, Mask)
        value = slots(result)["4.weight"].value()
        assert not value[~form.inner.mask].any()
        assert freeze(result)[0]["4.weight"].kind == "affine"


def test_shared_values_stay_shared(task):
    context = Context(task=task)
    clustered = KMeans(bits=3, layers=("4",))(network(), context)
    result = Quantize(bits=4, epochs=1)(clustered, context)
    form = form_of(result, "4.weight")
    assert isinstance(form.inner, Shared)
    stored = freeze(result)[0]["4.weight"]
    assert stored.kind == "codebook"
    step = stored.centroids / float(form.state["scale"])
    assert np.allclose(step, np.round(step), atol=1e-4)
    assert len(stored.centroids) <= 8
    assert bits(outputs(frozen_copy(result), task)) == bits(outputs(result, task))


def test_ends_get_more_bits_the_same_or_none(task):
    context = Context(task=task)
    found = {}
    for ends in (8, 3, "same", "float"):
        result = Quantize(bits=4, ends=ends)(network(), context)
        found[ends] = [
            slot.form.bits if isinstance(slot.form, QuantizedWeight) else None
            for name, slot in slots(result).items() if name in ("0.weight", "4.weight", "6.weight")
        ]  # fmt: skip
    assert found == {8: [8, 4, 8], 3: [4, 4, 4], "same": [4, 4, 4], "float": [None, 4, None]}


def test_bits_by_layer(task):
    result = Quantize(bits={"type:Linear": 5, "6": 6}, ends="same")(network(), Context(task=task))
    widths = {name: slot.form.bits for name, slot in slots(result).items() if isinstance(slot.form, QuantizedWeight)}
    assert widths == {"0.weight": 8, "4.weight": 5, "6.weight": 6}


def test_bits_of_inputs_by_layer_are_patterns_like_those_of_weights(task):
    def found(table):
        step = Quantize(activations=AffineInput(), activation_bits=table, ends="same")
        return {path: q.bits for path, q in quantized_inputs(step(network(), Context(task=task))).items()}

    assert found({"#-1": 5, "#0": 6}) == {"0": 6, "4": 8, "6": 5}
    assert found({"type:Linear": 4, "6": 3}) == {"0": 8, "4": 4, "6": 3}
    with pytest.raises(UnknownNameError, match="no weight answers to 'head'"):
        found({"head": 4})


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(20, 16), nn.LSTM(16, 16, 2, batch_first=True, bidirectional=True)
        self.hidden, self.out = nn.Linear(32, 16), nn.Linear(16, 20, bias=False)
        if tied:
            self.out.weight = self.embed.weight


def test_the_ends_are_whole_layers_whoever_shares_their_weights():
    first = {f"rnn.weight_{part}_l0{side}" for part in ("ih", "hh") for side in ("", "_reverse")}
    assert places.ends(Language(tied=False)) == first | {"out.weight"}
    assert places.ends(Language(tied=True)) == first | {"embed.weight"}
    assert places.ends(network()) == {"0.weight", "6.weight"}
    assert places.ends(nn.Embedding(4, 3)) == set()


def test_inputs_are_on_their_grid_and_survive_everything(task, tmp_path):
    context = Context(task=task)
    original = network()
    step = Quantize(activations=AffineInput(), activation_bits=3, ends="same", bits=8)
    result = Finetune(epochs=1)(step(original, context), context)
    assert sorted(quantized_inputs(result)) == ["0", "4", "6"]
    seen = []
    for layer in (result[4], result[6]):
        quantizer = quantized_input(layer)
        values = quantizer(torch.rand(1000) * 3)
        seen.append(len(values.unique()))
    assert max(seen) <= 8
    save_model(result, tmp_path / "kept")
    loaded = load_model(original, tmp_path / "kept")
    for other in (loaded, copy.deepcopy(result), frozen_copy(result), plain(result)):
        assert bits(outputs(other, task)) == bits(outputs(result, task))
    assert len(applied(result).edits) == 3
    assert Plan.from_json(json.loads(json.dumps(applied(result).to_json()))) == applied(result)


def test_trained_file_and_weights_file_answer_as_the_model(task, tmp_path):
    import espalier

    steps = (Finetune(epochs=1), Quantize(bits=4, activations=AffineInput(), activation_bits=4, epochs=1))
    original = network()
    result = espalier.compress(original, task, Recipe(steps=steps), out=tmp_path / "run")
    whole = espalier.load(tmp_path / "run" / "model.espalier")
    filled = espalier.load(tmp_path / "run" / "model.weights.espalier", into=network(1))
    assert bits(outputs(whole, task)) == bits(outputs(filled, task))
    assert not quantized_inputs(original)
    details = result.record["steps"][-1]["details"]["coverage"]
    assert details["layers"] == "3 of 3"
    assert details["inputs"]["4"]["bits"] == 4


def test_the_quantizer_is_traced_with_a_free_batch(task):
    result = Quantize(activations=AffineInput())(network(), Context(task=task))
    graph = trace(plain(result), (torch.randn(4, 1, 8, 8),))
    assert [node.op for node in graph.nodes].count("fake_quantize") == 3
    assert graph.dynamic


def test_an_input_quantizer_can_be_taken_away(task):
    model = network()
    result = Quantize(weights=None, activations=AffineInput(), activation_bits=2)(model, Context(task=task))
    assert bits(outputs(result, task)) != bits(outputs(model, task))
    result = Plan(tuple(FloatInput(path=path) for path in quantized_inputs(result))).apply(result)
    assert bits(outputs(result, task)) == bits(outputs(model, task))


def test_channels_can_still_be_removed(task):
    context = Context(task=task)
    result = Quantize(bits=4, activations=AffineInput())(network(), context)
    smaller = Prune(pattern=Channels(), sparsity=0.5)(result, context)
    assert slots(smaller)["0.weight"].shape[0] == 3
    form = form_of(smaller, "4.weight")
    assert form.state["scale"].shape == (10,)
    assert bits(outputs(frozen_copy(smaller), task)) == bits(outputs(smaller, task))


def test_keep_cuts_the_scales_of_the_rows_that_go(task):
    result = Quantize(bits=4, ends="same")(network(), Context(task=task))
    before = slots(result)["6.weight"].value()
    form = form_of(result, "6.weight")
    taken = form.take(0, torch.tensor([2, 3, 4]))
    latent = form.take_latent(slots(result)["6.weight"].latent.detach(), 0, torch.tensor([2, 3, 4]))
    assert torch.equal(taken(latent), before[2:5])


def test_what_is_on_a_grid_is_left_alone_unless_asked(task):
    context = Context(task=task)
    once = Quantize(bits=4, ends="same")(network(), context)
    with pytest.raises(PhaseError, match=r"0\.weight.*on a grid already \(quantize\.affine, 4 bits\)"):
        Quantize(bits=2)(once, context)
    again = Quantize(bits=2, ends="same", densify=True)(once, context)
    assert form_of(again, "4.weight").bits == 2


@pytest.mark.parametrize("densify", [False, True])
def test_a_step_without_weights_leaves_codes_alone(densify, task):
    context = Context(task=task)
    coded = Quantize(weights=LSQ(), bits=3, ends="same")(network(), context)
    inputs = Quantize(weights=None, activations=LSQInput(), activation_bits=4, densify=densify)(coded, context)
    assert len(quantized_inputs(inputs)) == 3
    for result in (inputs, Quantize(weights=None, gradients=_gradient(), epochs=1, densify=densify)(coded, context)):
        for name in ("0.weight", "4.weight", "6.weight"):
            assert form_of(result, name).bits == 3


def test_refusals(task):
    with pytest.raises(UsageError, match=r"nothing is to be quantized"):
        Quantize(weights=None)
    with pytest.raises(UsageError, match=r"schemes|epochs"):
        Quantize(epochs=0, gradients=_gradient())
    with pytest.raises(UsageError, match=r"reestimate needs epochs; without any add the step train\.batch-norm"):
        Quantize(reestimate=True)
    broken = network()
    with torch.no_grad():
        broken[4].weight[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"4\.weight holds NaN"):
        Quantize()(broken, Context(task=task))
    nan = classification([(torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4, dtype=torch.long))], task.val)
    with pytest.raises(NumericError, match=r"NaN or infinity at the input of 0"):
        Quantize(activations=AffineInput())(network(), Context(task=nan))


def _gradient():
    from espalier.quantize import GradientQuantizer

    class Identity(GradientQuantizer):
        id = "identity"

        def quantize(self, gradient, bits, generator, *, samples):
            return gradient

    return Identity()


def test_a_dead_input_is_left_out_and_said(task):
    model = network()
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.fill_(-1)
    context = Context(task=task)
    result = Quantize(activations=AffineInput()).transform(copy.deepcopy(model), context)
    assert "6" not in quantized_inputs(result)
    assert {"name": "input of 6", "reason": "its range is dead: every value seen was zero"} in context.record.skipped


@pytest.mark.parametrize("change", [{"bits": 99}, {"bits": True}, {"method": "[]"}, {"method": "{"}, {"signed": 1}])
def test_a_forged_plan_is_refused(change, task):
    edit = QuantizeInput.of("4", AffineInput(), 8, signed=False).to_json() | change
    with pytest.raises((Corrupt, UsageError)):
        Plan.from_json([edit]).apply(network())


def test_a_model_that_rounds_its_inputs_is_exported(task, tmp_path):
    pytest.importorskip("onnxruntime")
    from espalier import deploy

    result = Quantize(activations=AffineInput(), activation_bits=4, ends="same", bits=8)(network(), Context(task=task))
    done = deploy.to_onnx(result, task, tmp_path / "model.onnx", runtime="onnxruntime")
    file = deploy.open(done.path).module()
    value, wanted = task.measure(file, "val").value, task.measure(result, "val").value
    assert abs(value - wanted) <= 1.5


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.encoder(x).mean(1))
        return out


def test_torchs_fused_transformer_layer_does_not_pass_the_quantizers_by():
    torch.manual_seed(0)
    x = torch.randn(16, 6, 16)
    data = [(x, torch.randint(0, 4, (16,)))]
    step = Quantize(activations=AffineInput(), activation_bits=2, ends="same", bits=8)
    result = step(Encoder().eval(), Context(task=classification(data, data)))
    with torch.no_grad():
        fast = result(x)
        torch.backends.mha.set_fastpath_enabled(value=False)
        try:
            assert torch.equal(result(x), fast)
        finally:
            torch.backends.mha.set_fastpath_enabled(value=True)


def test_what_a_composite_says_is_in_the_record_of_a_run(task, tmp_path):
    import dataclasses

    import espalier
    from espalier.core.errors import EspalierWarning
    from espalier.quantize import PTQInt8

    without = dataclasses.replace(task, train=None)
    with pytest.warns(EspalierWarning, match="data"):
        result = espalier.compress(network(), without, Recipe(steps=(PTQInt8(),)), out=tmp_path / "run")
    methods = [step["method"] for step in result.record["steps"]]
    assert methods[:2] == ["quantize.ptq-int8", "quantize.quantize"]
    assert result.record["steps"][0]["details"]["data-free"] is True
    assert any("data" in warning for warning in result.record["steps"][0]["warnings"])
    assert "data-free" in (tmp_path / "run" / "record.json").read_text()


def test_the_groups_of_a_transposed_convolution_would_lie_across_its_channels(task):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.ConvTranspose2d(8, 6, 3), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.Flatten(),
        nn.Linear(392, 10),
    )  # fmt: skip
    context = Context(task=task)
    by_group = Quantize(weights=Affine(per="group", group=4), bits=4, ends="same")
    result = by_group.transform(copy.deepcopy(model), context)
    reason = "a transposed convolution holds the inputs of an output channel apart; per=group cannot group them"
    assert context.record.skipped == [{"name": name, "reason": reason} for name in ("1.weight", "2.weight")]
    assert {name for name, slot in slots(result).items() if slot.form is not None} == {"0.weight", "4.weight"}
    result = by_group.replace(weights=Affine(per="channel")).transform(copy.deepcopy(model), Context(task=task))
    assert form_of(result, "1.weight").state["scale"].shape == (6,)
