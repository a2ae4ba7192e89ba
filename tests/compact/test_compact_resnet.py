"""CIFAR ResNets: size, function, pretrained weights, and that channels can be removed from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from espalier.compact import CifarResNet, load_pretrained, resnet20, resnet56
from espalier.core.errors import DataError, UsageError
from espalier.prune.removal import remove_channels


def test_sizes_of_the_paper() -> None:
    """0.27M and 0.85M parameters (He 2016, table 6)."""
    assert round(sum(p.numel() for p in resnet20().parameters()) / 1e6, 2) == 0.27
    assert round(sum(p.numel() for p in resnet56().parameters()) / 1e6, 2) in (0.85, 0.86)


def test_shortcuts_have_no_parameters() -> None:
    assert not [name for name, _ in resnet20().named_parameters() if "shortcut" in name]


@pytest.mark.parametrize("depth", [7, 21, 2])
def test_a_wrong_depth_is_refused(depth: int) -> None:
    with pytest.raises(UsageError, match="6 n"):
        CifarResNet(depth)


def test_channels_come_off_and_its_own_code_follows() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    found = remove_channels(resnet20().eval(), (x,), sparsity=0.5, measure="macs")
    assert found.kind == "module"
    assert isinstance(found.model, CifarResNet)
    assert found.difference < 1e-4
    assert found.model(x).shape == (2, 10)


def test_pretrained_weights_are_read() -> None:
    folder = Path(os.environ.get("ESPALIER_DATA", Path(__file__).parents[2].parent / "shared/data"))
    path = folder / "cifar10_resnets" / "resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip(f"the pretrained weights are not at {path.parent}")
    model = load_pretrained(resnet20(), path)
    assert not torch.equal(model.linear.bias, torch.zeros(10))


def test_a_broken_file_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.th").write_bytes(b"no weights")
    with pytest.raises(DataError, match="cannot be read"):
        load_pretrained(resnet20(), tmp_path / "x.th")
    torch.save({"state_dict": resnet56().state_dict()}, tmp_path / "y.th")
    with pytest.raises(DataError, match="does not fit"):
        load_pretrained(resnet20(), tmp_path / "y.th")
