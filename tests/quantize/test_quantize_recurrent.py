"""Recurrent layers: their weights and inputs quantized from attaching to the frozen form, packed sequences included."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from espalier.core.context import Context
from espalier.core.inputs import quantized_inputs
from espalier.core.parametrize import slots
from espalier.core.quantized import QuantizedWeight, WeightQuantizer
from espalier.core.task import Task, classification
from espalier.quantize import Affine, AffineInput, Quantize
from espalier.quantize.binary import Binary
from espalier.quantize.lab import LAB
from espalier.quantize.lat import LAT
from espalier.quantize.ternary import Ternary
from espalier.quantize.ternary_bernoulli import TernaryBernoulli
from espalier.quantize.ttq import TTQ
from espalier.quantize.twn import TWN
from espalier.testing.compare import bits, frozen_copy, outputs
from espalier.train import Finetune

METHODS: dict[str, tuple[WeightQuantizer, int]] = {
    "affine": (Affine(), 8),
    "affine, 4 bits, groups": (Affine(per="group", group=3), 4),
    "binary": (Binary(), 1),
    "lab": (LAB(), 1),
    "ternary": (Ternary(), 2),
    "bernoulli": (TernaryBernoulli(), 2),
    "bernoulli, powers of two": (TernaryBernoulli(backward="power-of-two"), 2),
    "twn": (TWN(per="channel"), 2),
    "ttq": (TTQ(threshold="learned"), 2),
    "lat": (LAT(scales="two"), 2),
}
LAYERS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Reader(nn.Module):
    """Reads sequences of different lengths, packed, and says which kind they are."""

    def __init__(self, kind: str, packed: bool = True) -> None:
        super().__init__()
        self.packed = packed
        self.rnn = LAYERS[kind](3, 10, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(20, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.packed:
            ends = []
            for row, length in zip(x, lengths, strict=True):  # one at a time, without padding
                _, state = self.rnn(row[None, : int(length)])
                ends.append(state[0] if isinstance(state, tuple) else state)
            last = torch.cat(ends, 1)
        else:
            _, state = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
            last = state[0] if isinstance(state, tuple) else state
        return self.head(torch.cat([last[-2], last[-1]], 1))


@cache
def task() -> Task:
    """Is the mean of the first channel positive?"""
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.randint(2, (count,), generator=generator)
        lengths = torch.randint(3, 9, (count,), generator=generator)
        x = torch.randn(count, 8, 3, generator=generator)
        x[..., 0] += (2.0 * y - 1)[:, None]
        return x * (torch.arange(8) < lengths[:, None])[..., None], lengths, y

    return classification([batch(32) for _ in range(16)], [batch(200)])


@cache
def trained(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reader(kind)
    return Finetune(epochs=1, lr=1e-2)(model, Context(task=task()))


CASES = [(name, "lstm") for name in METHODS] + [
    (name, kind) for name in ("affine", "binary", "ternary") for kind in ("rnn", "gru")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_from_attaching_to_the_frozen_form(name, kind):
    method, width = METHODS[name]
    step = Quantize(
        weights=method, bits=width, activations=AffineInput(), activation_bits=6, ends="same", epochs=1, lr=5e-3
    )
    context = Context(task=task())
    result = step(trained(kind), context)
    quantized = {key for key, slot in slots(result).items() if isinstance(slot.form, QuantizedWeight)}
    sides = [f"l{layer}{end}" for layer in (0, 1) for end in ("", "_reverse")]
    expected = {f"rnn.weight_{part}_{side}" for part in ("ih", "hh") for side in sides} | {"head.weight"}
    assert quantized == expected
    assert sorted(quantized_inputs(result)) == ["head", "rnn"]
    most = 2**width if method.id == "affine" else width + 1
    for key in quantized:
        slot = slots(result)[key]
        rows = slot.value() if method.id in ("affine", "twn") else slot.value().reshape(1, -1)
        groups = 3 if name == "affine, 4 bits, groups" else rows.shape[1]
        assert max(len(part.unique()) for row in rows for part in row.split(groups)) <= most
    assert task().measure(result, "val").value > 85
    for other in (frozen_copy(result), frozen_copy(result, through_file=True), copy.deepcopy(result)):
        assert bits(outputs(other, task())) == bits(outputs(result, task()))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_weight_of_a_recurrent_layer_is_trained(kind):
    result = Quantize(weights=TWN(), bits=2, ends="same", epochs=1)(trained(kind), Context(task=task()))
    for key, slot in slots(trained(kind)).items():
        assert not torch.equal(slot.latent, slots(result)[key].latent), key


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_inputs_are_quantized_as_unpacked_ones(kind):
    step = Quantize(weights=Ternary(), bits=2, activations=AffineInput(), activation_bits=3, ends="same")
    packed = step(trained(kind), Context(task=task())).eval()
    single = Reader(kind, packed=False)
    single.load_state_dict(trained(kind).state_dict())
    single = step(single, Context(task=task())).eval()
    (quantizer, _), (same, _) = ((quantized_inputs(model)["rnn"], model) for model in (packed, single))
    assert quantizer.bits == 3
    same.load_state_dict(quantizer.state_dict())
    quantized_inputs(single)["head"].load_state_dict(quantized_inputs(packed)["head"].state_dict())
    x, lengths, _ = next(iter(task().data("val")))
    with torch.no_grad():
        assert torch.allclose(packed(x[:30], lengths[:30]), single(x[:30], lengths[:30]), atol=0.2)
        quantizer.active = same.active = False
        rough = (packed(x[:30], lengths[:30]) - single(x[:30], lengths[:30])).abs().max()
        exact = packed(x[:30], lengths[:30])
        quantizer.active = True
        assert float((packed(x[:30], lengths[:30]) - exact).abs().max()) > 10 * float(rough)
