"""Blocks: the layer itself where theory says so, the right shape everywhere, refused where they cannot stand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.compact import (
    METHODS,
    AsymmetricKernels,
    Block,
    Bottleneck,
    DepthwiseSeparable,
    Dilated,
    Fire,
    Ghost,
    GlobalPooling,
    InvertedResidual,
    Layer,
    Shuffle,
    Stacked3x3,
)
from espalier.compact.decompose import composed
from espalier.compact.parts import unit_kernel
from espalier.compact.regression import Pairs, error, regress
from espalier.compact.starting import settle
from espalier.core.errors import UsageError
from espalier.core.spec import build
from espalier.graph import trace

BLOCKS = [cls for cls in METHODS if issubclass(cls, Block)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(block: Block, layer: nn.Module, x: Tensor | None = None, feature_map: Any = None) -> nn.Module:
    """The block that stands for ``layer``, started, and settled on ``x``."""
    seen = Layer.of(layer, feature_map)
    assert not block.refusal(seen)
    with torch.random.fork_rng(devices=[]):
        module = build(json.loads(json.dumps(block.spec(seen)))).eval()
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    block.start(module, seen, layer.weight.detach(), bias, rng())  # type: ignore[arg-type]
    if x is not None:
        settle(module, x)
    return module


def conv(*args: Any, seed: int = 0, **fields: Any) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Conv2d(*args, **fields)


LAYERS = {
    "plain": conv(8, 8, 3, padding=1),
    "strided": conv(4, 8, 3, stride=2, bias=False),
    "odd": conv(4, 6, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "reflecting": conv(6, 4, 3, padding=1, padding_mode="reflect"),
    "same": conv(4, 4, 3, padding="same", dilation=2),
    "large": conv(4, 8, 5, padding=2),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    "block",
    [
        AsymmetricKernels(width=5.0),
        Bottleneck(width=1.0),
        Bottleneck(width=1.0, activation="relu"),
        DepthwiseSeparable(multiplier=16),
        DepthwiseSeparable(multiplier=16, activation="relu6", norm=True),
        InvertedResidual(expansion=16.0),
        InvertedResidual(expansion=16.0, shortcut=True, norm=True),
        InvertedResidual(expansion=16.0, activation="none"),
        Shuffle(version=1, width=25.0),
        Shuffle(version=1, width=25.0, activation="none"),
    ],
    ids=lambda b: f"{b.id}-{b.activation}{'-norm' * b.norm}",
)
def test_at_full_rank_a_block_is_the_layer(block: Block, layer: nn.Conv2d) -> None:
    """Borders, strides, dilation and what lies between the layers of the block included."""
    x = torch.randn(6, layer.in_channels, 9, 11, generator=rng())
    found = made(block, layer, x)
    with torch.no_grad():
        wanted, got = layer(x), found(x)
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) < 2e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("cls", BLOCKS, ids=lambda c: c.id)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_block_has_the_shape_of_the_layer_and_can_be_traced(cls: type[Block], layer: nn.Conv2d) -> None:
    block = cls()
    seen = Layer.of(layer)
    if reason := block.refusal(seen):
        assert reason.strip() == reason
        return
    x = torch.randn(2, layer.in_channels, 12, 13, generator=rng())
    module = made(block, layer, x)
    with torch.no_grad():
        wanted, got = layer(x), module(x)
    assert got.shape == wanted.shape
    assert float((got - wanted).square().mean()) < float(wanted.square().mean())
    assert trace(module, (x,)).dynamic


@pytest.mark.parametrize("cls", [DepthwiseSeparable, Bottleneck, InvertedResidual, Fire, Shuffle, Ghost, Dilated])
@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(cls: type[Block], dims: int) -> None:
    layer = (nn.Conv1d if dims == 1 else nn.Conv3d)(4, 6, 5, padding=2)
    x = torch.randn(2, 4, *(7,) * dims, generator=rng())
    assert made(cls(), layer, x)(x).shape == layer(x).shape


def test_planted_slices_of_rank_one_are_met_by_one_kernel_each() -> None:
    layer = conv(6, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oi,ik->oik", torch.randn(4, 6), torch.randn(6, 9)).reshape(4, 6, 3, 3))
    x = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(made(DepthwiseSeparable(), layer)(x), layer(x), atol=1e-5, rtol=0)


def test_depthwise_separable_keeps_groups() -> None:
    layer = conv(6, 9, 3, groups=3)
    x = torch.randn(2, 6, 8, 8)
    module = made(DepthwiseSeparable(multiplier=3), layer)
    assert module[1].groups == 3
    torch.testing.assert_close(module(x), layer(x), atol=1e-5, rtol=0)
    assert "already" in DepthwiseSeparable().refusal(Layer.of(conv(6, 6, 3, groups=6)))


def test_dilated_keeps_a_kernel_of_few_taps() -> None:
    layer = conv(3, 4, 5, padding=2)
    with torch.no_grad():
        kept = layer.weight[:, :, ::2, ::2].clone()
        layer.weight.zero_()[:, :, ::2, ::2] = kept
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(made(Dilated(), layer)(x), layer(x), atol=1e-5, rtol=0)


def test_ghosts_that_are_multiples_are_met() -> None:
    layer = conv(3, 7, 3, padding=1)
    with torch.no_grad():
        layer.weight[4:] = layer.weight[:3] * torch.tensor([2.0, -1.0, 0.5])[:, None, None, None]
    x = torch.randn(2, 3, 9, 9)
    module = made(Ghost(), layer)
    torch.testing.assert_close(module(x), layer(x), atol=1e-5, rtol=0)
    assert module[0].out_channels == 4


def test_fire_meets_outputs_of_one_tap() -> None:
    for activation in ("relu", "none"):
        layer = conv(4, 6, 3, stride=2, padding=0)
        with torch.no_grad():
            middle = layer.weight[:3, :, 1:2, 1:2].clone()
            layer.weight[:3] = 0
            layer.weight[:3, :, 1:2, 1:2] = middle
        x = torch.randn(4, 4, 9, 8)
        module = made(Fire(squeeze=1.0, activation=activation), layer, x)  # type: ignore[arg-type]
        torch.testing.assert_close(module(x), layer(x), atol=1e-4, rtol=0)


def test_shuffle_v2_meets_what_its_branches_can_hold() -> None:
    layer = conv(4, 6, 3, padding=1)
    with torch.no_grad():
        separable = torch.einsum("oi,ik->oik", torch.randn(3, 4), torch.randn(4, 9)).reshape(3, 4, 3, 3)
        layer.weight[0::2] = separable
    x = torch.randn(4, 4, 9, 8)
    module = made(Shuffle(width=6.0), layer, x)
    torch.testing.assert_close(module(x), layer(x), atol=1e-4, rtol=0)


def test_global_pooling_is_right_for_maps_that_are_constant() -> None:
    layer = nn.Linear(5 * 12, 7)
    module = made(GlobalPooling(), layer, feature_map=(5, 3, 4))
    x = torch.randn(2, 5, 1, 1).expand(2, 5, 3, 4).flatten(1)
    torch.testing.assert_close(module(x), layer(x), atol=1e-5, rtol=0)


def test_bottleneck_of_a_linear_layer_is_its_truncated_svd() -> None:
    layer = nn.Linear(12, 8)
    module = made(Bottleneck(width=0.5), layer)
    values = torch.linalg.svdvals(layer.weight.detach())
    missed = (module[1].weight @ module[0].weight - layer.weight).detach()
    assert float(missed.norm()) == pytest.approx(float(values[4:].norm()), rel=1e-4)
    pointwise = conv(6, 8, 1, padding=1, stride=2)
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(made(Bottleneck(width=1.0), pointwise)(x), pointwise(x), atol=1e-5, rtol=0)


def test_stacked_learns_a_planted_composition_by_regression() -> None:
    layer = conv(3, 4, 5, padding=2)
    with torch.no_grad():
        layer.weight.copy_(composed(conv(4, 4, 3, seed=1).weight, conv(3, 4, 3, seed=2).weight))
    x = torch.randn(80, 3, 10, 10, generator=rng())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build(Stacked3x3(width=2.0).spec(Layer.of(layer)))
    pairs = Pairs(x, layer(x).detach())
    first, last = regress(module, pairs, steps=150, lr=0.02, samples=16, rng=rng(), tell=lambda *_: None)
    assert first > 0.9
    assert last < 0.05
    assert error(module, pairs) == pytest.approx(last, rel=0.5)


def test_three_in_a_row_for_seven() -> None:
    layer = conv(2, 3, 7, stride=2, padding=3)
    module = made(Stacked3x3(), layer)
    assert [m.kernel_size for m in module] == [(3, 3)] * 3
    assert module(torch.randn(1, 2, 16, 15)).shape == layer(torch.randn(1, 2, 16, 15)).shape


@pytest.mark.parametrize(
    ("block", "layer", "words"),
    [
        (DepthwiseSeparable(), nn.Linear(4, 4), "no convolution"),
        (DepthwiseSeparable(), conv(4, 4, 1), "1x1"),
        (AsymmetricKernels(), nn.Conv1d(4, 4, 3), "two dimensions"),
        (AsymmetricKernels(), conv(4, 4, (1, 3)), "one row or one column"),
        (AsymmetricKernels(), conv(4, 4, 3, groups=2), "groups"),
        (Stacked3x3(), conv(4, 4, 3), "at least 5"),
        (Stacked3x3(), conv(4, 4, (5, 7)), "odd squares"),
        (Stacked3x3(), conv(4, 4, 6), "odd squares"),
        (Dilated(), conv(4, 4, 3), "at least 4"),
        (Dilated(), conv(4, 4, 6), "equal distances"),
        (Dilated(), nn.Conv2d(4, 4, (1, 11)), "do not meet"),
        (GlobalPooling(), nn.Linear(4, 4), "flattened"),
        (GlobalPooling(), conv(4, 4, 3), "fully connected"),
        (Bottleneck(), conv(4, 4, 3, groups=2), "groups"),
        (Fire(), conv(4, 1, 3), "one output"),
        (Ghost(), conv(4, 1, 3), "one output"),
        (Shuffle(), conv(4, 5, 3), "2 equal groups"),
        (Shuffle(version=1, groups=3), conv(4, 6, 3), "3 equal groups"),
        (InvertedResidual(), nn.Linear(4, 4), "no convolution"),
    ],
    ids=lambda value: getattr(value, "id", None) or str(value)[:20],
)
def test_layers_are_refused_with_a_reason(block: Block, layer: nn.Module, words: str) -> None:
    assert words in block.refusal(Layer.of(layer))


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (Fire, {"wide": 0.0}),
        (Fire, {"wide": 1.0}),
        (Ghost, {"ratio": 1}),
        (Ghost, {"cheap": 2}),
        (Dilated, {"taps": 1}),
        (Shuffle, {"version": 3}),
        (Bottleneck, {"activation": "gelu"}),
        (DepthwiseSeparable, {"multiplier": 0}),
    ],
)
def test_fields_that_make_no_block_are_refused(cls: type[Block], fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        cls(**fields)


def test_an_identity_kernel_hands_its_input_on() -> None:
    layer = conv(3, 3, 5, padding=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(unit_kernel(Layer.of(layer), layer.weight))
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(layer(x), x)
