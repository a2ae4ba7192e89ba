"""The 784-256-10 example prints what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def mlp(monkeypatch, tmp_path):
    """The example, without MNIST, in an empty folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    for name in ("lenet", "mlp_784_256_10"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import mlp_784_256_10

    return mlp_784_256_10


def test_the_network_has_its_203_264_weights(mlp):
    assert sum(p.numel() for p in mlp.network().parameters() if p.ndim > 1) == 784 * 256 + 256 * 10 == 203_264


def test_the_recipe_prunes_and_finetunes(mlp):
    steps = mlp.recipe(0.9, 3).steps
    assert [step.name for step in steps] == ["prune.prune", "train.finetune"]
    assert steps[0].sparsity == 0.9
    assert {step.epochs for step in steps} == {3}


@pytest.mark.slow
def test_the_table_shows_the_measured_files(mlp, monkeypatch, tmp_path, capsys):
    arguments = ["--epochs", "1", "--sparsities", "0.5", "0.95", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["mlp_784_256_10.py", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    mlp.main()
    table = capsys.readouterr().out
    assert "784-256-10 on digits, 1 epochs each" in table
    lengths = []
    for sparsity in ("0.5", "0.95"):
        run = tmp_path / "runs" / f"sparsity-{sparsity}"
        lengths.append((run / "model.espalier").stat().st_size)
        record = json.loads((run / "record.json").read_text())
        assert f"{lengths[-1]:,}" in table
        assert f"{record['compressed']['nonzero']:,}" in table
    assert lengths[1] < lengths[0] / 2
