"""The worked example on ResNet-18: half the weights, 8 bits, distilled at T = 10, on 500 images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The example, without CIFAR-10, in an empty folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "nowhere"))
    monkeypatch.delitem(sys.modules, "resnet18", raising=False)
    import resnet18

    return resnet18


def test_it_is_resnet18(example):
    model = example.ResNet18(classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert sum(1 for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))) == 18 + 3
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_it_goes_the_whole_way(example, tmp_path, capsys):
    table = example.run(500, 1, tmp_path / "run", width=8)
    assert "digits stand in" in capsys.readouterr().err
    assert table.row_count == 5
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    names = [step["method"] for step in record["steps"]]
    assert names == ["prune.prune", "distill.distill", "quantize.quantize"]
    before, after = record["original"], record["compressed"]
    convolutions = sum(p.numel() for p in example.ResNet18(width=8).parameters() if p.ndim > 1)
    assert after["nonzero"] <= before["nonzero"] - 0.49 * convolutions
    assert after["file_bytes"] < before["file_bytes"] / 5
    assert (tmp_path / "run" / "report.html").is_file()
