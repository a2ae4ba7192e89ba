"""Ready networks: published sizes, every image size and width, one step of training, traced, written and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from espalier.compact import ShuffleNetV2, SqueezeNet, build, networks
from espalier.compact.widths import rounded, strides
from espalier.core.errors import UnknownNameError, UsageError
from espalier.core.recipe import FileOptions
from espalier.core.task import classification
from espalier.runs.files import freeze_model, load, write_self_contained

PUBLISHED = {
    "squeezenet-1.0": 1_248_424,
    "squeezenet-1.1": 1_235_496,
    "mobilenet-v1": 4_231_976,
    "mobilenet-v2": 3_504_872,
    "shufflenet-v2": 2_278_604,
    "ghostnet": 5_182_508,
}
"""Parameters at width 1 for 1000 classes; the papers give 4.2 and 5.2 million for MobileNet and GhostNet."""


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **fields: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, **fields)


@pytest.mark.parametrize("name", networks())
def test_sizes_are_the_published_ones(name: str) -> None:
    model = on_meta(name)
    assert count(model) == PUBLISHED[name]
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert model.features(torch.empty(2, 3, 224, 224, device="meta")).shape[2] in (7, 13)


def test_shufflenet_of_half_the_width() -> None:
    assert count(on_meta("shufflenet-v2", width=0.5)) == 1_366_792
    assert count(on_meta("shufflenet-v2", width=1.5)) == 3_503_624
    assert count(on_meta("shufflenet-v2", width=2.0)) == 7_393_996


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("width", [0.1, 1.3])
def test_any_width_and_size(name: str, width: float) -> None:
    sizes = []
    for size, channels in ((28, 1), (32, 3), (224, 3)):
        model = on_meta(name, width=width, size=size, channels=channels, classes=10)
        assert model(torch.empty(2, channels, size, size, device="meta")).shape == (2, 10)
        sizes.append(count(model))
        if size < 64:
            assert model.features(torch.empty(2, channels, size, size, device="meta")).shape[2:] >= (3, 3)
    assert max(sizes) - min(sizes) < 0.2 * max(sizes)
    assert (sizes[1] < count(on_meta(name, size=32, classes=10))) == (width < 1)


@pytest.mark.parametrize("name", networks())
def test_it_trains(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, width=0.25, size=28, channels=1, classes=10)
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize(
    "name", ["squeezenet-1.1", *(pytest.param(n, marks=pytest.mark.slow) for n in networks() if n != "squeezenet-1.1")]
)
def test_a_file_holds_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name, width=0.25, size=28, channels=1, classes=10).eval()
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    frozen = freeze_model(model, classification(val=[(x, y)]))
    assert not frozen.refusal
    write_self_contained(frozen, tmp_path / "file", FileOptions(), "fp32")
    loaded = load(tmp_path / "file").eval()
    with torch.no_grad():
        wanted = model(x[:3])
        torch.testing.assert_close(loaded(x[:3]), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_small_images_keep_their_size_at_first() -> None:
    assert strides(224, (2, 1, 2, 2)) == [2, 1, 2, 2]
    assert strides(32, (2, 1, 2, 2)) == [1, 1, 1, 2]
    assert SqueezeNet(size=32).features[0].kernel_size == (3, 3)


def test_widths_are_never_a_tenth_too_small() -> None:
    for channels in range(1, 400):
        found = rounded(channels)
        assert found % 8 == 0
        assert found >= max(8, 0.9 * channels)
        assert found - channels <= 8
    assert ShuffleNetV2(width=0.3).features[5][0].sizes == (17, 17)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 0.0}, "width=0.0"),
        ({"size": 4}, "size=4"),
        ({"classes": 0, "channels": 0}, "(?s)classes=0.*channels=0"),
    ],
)
def test_what_is_no_network_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build("mobilenet-v2", **fields)


def test_a_wrong_name_is_refused_with_the_right_one() -> None:
    with pytest.raises(UnknownNameError, match="mobilenet-v2"):
        build("mobilenetv2")
