"""The LeNets of examples/: their sizes, their stand-in data, and a run from end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import espalier as es
from espalier.core.errors import UsageError

FOLDER = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def lenet(monkeypatch, tmp_path):
    """The example, without MNIST, in an empty folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    for name in ("lenet", "mlp_784_256_10"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import lenet

    yield lenet
    lenet.data.cache_clear()


def _weights(model):
    return sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_the_networks_have_the_published_numbers_of_weights(lenet):
    assert _weights(lenet.LeNet300()) == 266_200
    assert _weights(lenet.LeNet5()) == 430_500
    for network in lenet.NETWORKS.values():
        assert network()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_dropout_is_no_part_of_the_state(lenet):
    for network in lenet.NETWORKS.values():
        assert set(network(dropout=0.5).state_dict()) == set(network().state_dict())
        torch.manual_seed(0)
        dropped = network(dropout=0.9).train()
        x = torch.rand(4, 1, 28, 28)
        assert not torch.equal(dropped(x), dropped(x))


def test_digits_stand_in_and_standard_error_says_so(lenet, capsys):
    name, task = lenet.data()
    assert name == "digits"
    assert "padded to 28 x 28, stand in" in capsys.readouterr().err
    images, labels = task.example()
    assert images.shape[1:] == (1, 28, 28)
    assert labels.max() <= 9
    border = torch.ones(28, 28, dtype=torch.bool)
    border[10:18, 10:18] = False
    assert images[:, 0, border].abs().max() == 0
    assert images.abs().max() > 0


def test_mnist_is_used_where_it_is(data_folder, lenet, monkeypatch):
    if not (data_folder / "mnist").is_dir():
        pytest.skip("ESPALIER_DATA lacks mnist")
    monkeypatch.setenv("ESPALIER_DATA", str(data_folder))
    assert lenet.data()[0] == "mnist"


def test_training_happens_once(lenet, tmp_path, capsys):
    first = lenet.trained("300-100", 1, tmp_path / "kept")
    assert (tmp_path / "kept" / "lenet-300-100-digits-1.safetensors").is_file()
    assert "training LeNet-300-100 on digits" in capsys.readouterr().err
    again = lenet.trained("300-100", 1, tmp_path / "kept")
    assert capsys.readouterr().err == ""
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(UsageError, match="300-100 and 5"):
        lenet.trained("6", 1, tmp_path)


def test_it_is_a_project_file(lenet, monkeypatch, tmp_path):
    from espalier.cli.project import load_project

    monkeypatch.setenv("LENET", "5")
    monkeypatch.setenv("LENET_EPOCHS", "1")
    monkeypatch.setenv("LENET_FOLDER", str(tmp_path / "kept"))
    project = load_project(FOLDER / "lenet.py")
    assert type(project.model).__name__ == "LeNet5"
    assert project.task.val is not None


@pytest.mark.slow
@pytest.mark.parametrize("net", ["300-100", "5"])
def test_it_runs_from_end_to_end(lenet, monkeypatch, tmp_path, capsys, net):
    monkeypatch.setattr(sys, "argv", ["lenet.py", "--net", net, "--epochs", "2", "--out", str(tmp_path / "out")])
    lenet.main()
    assert "times smaller" in capsys.readouterr().out
    loaded = es.load(tmp_path / "out" / "model.espalier")
    assert loaded(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    filled = es.load(tmp_path / "out" / "model.weights.espalier", into=lenet.NETWORKS[net]()).eval()
    x = torch.rand(5, 1, 28, 28)
    torch.testing.assert_close(filled(x), loaded(x), rtol=1e-4, atol=1e-4)
