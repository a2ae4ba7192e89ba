"""Quantization sensitivity: the metric is that of the network really quantized so; on the command line and the page."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from espalier.cli.inspection import describe, table
from espalier.cli.main import app
from espalier.cli.project import Project
from espalier.core.context import Context
from espalier.core.errors import NeedError, UsageError
from espalier.core.model import digest
from espalier.core.task import Task
from espalier.quantize import AffineInput, Quantize
from espalier.quantize.analysis import Switches, analyse
from espalier.report.steps import steps
from espalier.report.story import _quantization, _step
from espalier.runs.checkpoint import EpochFile
from espalier.train import Finetune

STEPS = {
    "weights": Quantize(bits=2, ends="same"),
    "both": Quantize(bits=3, activations=AffineInput(), activation_bits=2, ends="same"),
    "ends": Quantize(bits=2, ends="float"),
}


@pytest.fixture(scope="module")
def trained(task: Task) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    return Finetune(epochs=4, lr=3e-3)(net, Context(task=task))


@pytest.mark.parametrize("name", ["weights", "both"])
def test_values_are_those_of_networks_quantized_so(name, trained, task):
    step, context = STEPS[name], Context(task=task)
    before = digest(trained)
    found = analyse(trained, context, step)
    assert digest(trained) == before
    assert found["full"] == context.measure(trained).value
    assert [row["name"] for row in found["layers"]] == ["0.weight", "4.weight", "6.weight"]
    # one layer's inputs are calibrated on the network as it is, so all are put at once and the others taken away
    if step.activations is None:
        assert found["all"] == context.measure(step(trained, Context(task=task))).value
        layers = ("0", "4", "6")
        for layer, row in zip(layers, found["layers"], strict=True):
            on = step.replace(layers=(layer,))(trained, Context(task=task))
            off = step.replace(layers=tuple(other for other in layers if other != layer))(trained, Context(task=task))
            assert (row["on"], row["off"]) == (context.measure(on).value, context.measure(off).value)
        assert len({row["on"] for row in found["layers"]}) > 1
    else:
        assert [row["input_bits"] for row in found["layers"]] == [2, 2, 2]
        weights_only = analyse(trained, context, step.replace(activations=None, activation_bits=None))
        assert any(
            one["on"] != two["on"] for one, two in zip(found["layers"], weights_only["layers"], strict=True)
        )  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_switches_go_back(trained, task):
    context = Context(task=task)
    switches = Switches(trained, STEPS["both"], context)
    full = context.measure(trained).value
    values = [switches.measure(names, "val").value for names in ((), ("4.weight",), ("0.weight", "6.weight"), ())]
    assert values[0] == values[3] == full
    assert len(set(values)) > 1
    direct = STEPS["both"](trained, Context(task=task))
    everything = switches.measure(tuple(switches.switches), "val").value
    assert abs(everything - context.measure(direct).value) < 5  # calibrated with another seed


def test_layers_that_stay_have_no_row(trained, task):
    found = analyse(trained, Context(task=task), STEPS["ends"])
    assert [row["name"] for row in found["layers"]] == ["4.weight"]
    assert found["layers"][0]["on"] == found["all"]
    assert found["layers"][0]["off"] == found["full"]
    with pytest.raises(UsageError, match="would quantize nothing here"):
        analyse(trained, Context(task=task), Quantize(layers=("0",), ends="float"))
    with pytest.raises(NeedError, match="training data"):
        analyse(trained, Context(task=Task(val=task.val)), STEPS["both"])


def test_a_stopped_analysis_goes_on(trained, task, tmp_path, monkeypatch):
    class Stopping(EpochFile):
        def save(self, epoch, tensors, data):
            super().save(epoch, tensors, data)
            if epoch == 2:
                raise KeyboardInterrupt

    context, path = Context(task=task), tmp_path / "kept.part"
    with pytest.raises(KeyboardInterrupt):
        analyse(trained, context, STEPS["weights"], store=Stopping(path))
    whole = analyse(trained, context, STEPS["weights"])
    measured: list[tuple[str, ...]] = []
    measure = Switches.measure
    monkeypatch.setattr(
        Switches, "measure", lambda self, names, split: (measured.append(tuple(names)), measure(self, names, split))[1]
    )
    again = analyse(trained, context, STEPS["weights"], store=EpochFile(path))
    assert again == whole
    assert measured == [(), ("0.weight", "4.weight", "6.weight"), ("6.weight",), ("0.weight", "4.weight")]
    measured.clear()
    analyse(trained, context, STEPS["weights"].replace(bits=3), store=EpochFile(path))  # another question
    assert len(measured) == 8


# --- where it is shown -----------------------------------------------------------------------------------------------


def project(trained: nn.Module, task: Task) -> Project:
    return Project(model=trained, task=task, models={})


def test_inspect_shows_two_columns(trained, task, tmp_path):
    found = describe(project(trained, task), "2", tmp_path)
    rows = {layer["name"]: layer["quantization"] for layer in found["layers"]}
    assert rows["0.bias"] is None
    assert rows["4.weight"] in found["quantization"]["layers"]
    assert json.loads(json.dumps(found))["quantization"]["all"] == found["quantization"]["all"]
    assert [column.header for column in table(found).columns][-2:] == ["one on", "one off"]
    assert len(table(describe(project(trained, task))).columns) == 6
    assert any("with all layers in 2 bits" in line for line in found["summary"])
    both = describe(project(trained, task), "4/3", tmp_path)
    assert both["quantization"]["layers"][0]["input_bits"] == 3
    for wrong in ("four", "4/", "/8", "4/8/2"):
        with pytest.raises(UsageError, match="write bits of the weights, as in 4"):
            describe(project(trained, task), wrong, tmp_path)


PROJECT = """
import torch
from torch import nn
from espalier.data import standard
from espalier.tasks import classification

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def task():
    digits = standard("digits")
    return classification(digits.train, digits.val)
"""


def test_the_command_hands_it_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project.py").write_text(PROJECT)
    ran = CliRunner().invoke(app, ["inspect", "project.py", "--quantization", "4/8", "--json", "--out", "kept"])
    found = json.loads(ran.stdout)
    assert [row["name"] for row in found["quantization"]["layers"]] == ["1.weight", "3.weight"]
    assert found["layers"][0]["quantization"]["input_bits"] == 8
    assert (tmp_path / "kept" / "quantization.part").is_file()


def test_the_report_shows_it(trained, task):
    found = analyse(trained, Context(task=task), STEPS["both"])
    mixed = {
        "by": "hessian", "measure": "bits", "budget": 4.0, "used": 3.5,
        "layers": [{"layer": "0.weight", "bits": 4, "bytes": 1200, "sensitivity": 0.25}, {"layer": "broken"}],
    }  # fmt: skip
    details = {"quantization sensitivity": found, "mixed bits": mixed}
    (step,) = steps([{"path": "a/01-mixed-bits", "details": details}], "accuracy", "%", higher=True)
    shown = step.quantization
    assert shown.full == found["full"]
    assert shown.everything == found["all"]
    assert shown.layers[1] == (
        "4.weight",
        "weight 3 bits, input 2 bits",
        *(found["layers"][1][k] for k in ("on", "off")),
    )
    page = str(_quantization(shown))
    worst = min(found["layers"], key=lambda row: (row["on"], -row["off"]))["name"]
    assert page.index(worst) == min(page.index(row["name"]) for row in found["layers"])
    assert "all but it quantized" in str(_step(step))
    (per_layer,) = step.per_layer
    assert per_layer.range == "3.5 of 4 bits in 1 layer"
    assert per_layer.entries == (("0.weight", "4 bits, 1.20 kB, hessian 0.25"),)
    for broken in (None, [], {"layers": 3}, {"full": 1, "all": "x", "layers": [{"on": 1}]}):
        (step,) = steps([{"path": "a", "details": {"quantization sensitivity": broken}}], "", "", higher=True)
        assert step.quantization is None
