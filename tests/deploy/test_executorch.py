"""ExecuTorch files run and agree, in fp32 and in int8; where the package is missing, a sentence names the extra."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.deploy.deploy_nets import Block, Pair, Recurrent
from torch import Tensor, nn

from espalier import deploy
from espalier.cli.main import main
from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError, NeedError, NumericError, UsageError
from espalier.core.method import Technique
from espalier.core.parametrize import freeze
from espalier.deploy.check import sqnr
from espalier.quantize import Quantize
from espalier.quantize.affine import AffineInput
from espalier.quantize.ptq_int8 import PTQInt8
from espalier.tasks import classification

HOME = Path(__file__).resolve().parents[2]
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def package() -> None:
    pytest.importorskip("executorch", reason="executorch is not installed; pip install 'espalier[executorch]'")


installed = pytest.mark.usefixtures("package")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.o = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return self.o(x + self.a(y, y, y, need_weights=False)[0]).mean(1)


class Fixed(nn.Module):
    """Its batch is a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x.reshape(2, 6))


class Counting(nn.Module):
    """Gives something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.l(x) + self.calls


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Rounding(nn.Module):
    """Rounds by torch's own operators: to 16 bits, per channel, and to 4 codes of the 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 6)
        self.register_buffer("scales", torch.linspace(0.01, 0.06, 6))
        self.register_buffer("zeros", torch.zeros(6, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 1e-3, 0, -32768, 32767)
        x = torch.fake_quantize_per_channel_affine(self.l(x), self.scales, self.zeros, 1, -128, 127)
        return torch.fake_quantize_per_tensor_affine(x, 0.25, 1, 0, 3)


def block() -> Block:
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        for norm in (model.b1, model.b2):
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                         nn.Linear(100, 5)).eval()  # fmt: skip


def quantized(model: nn.Module, technique: Technique) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    data = [(torch.randn(64, 3, 8, 8, generator=generator), torch.randint(0, 5, (64,), generator=generator))]
    return technique(model, Context(task=classification(data, data))).eval()


def counted(done: deploy.Exported) -> str:
    return next(note for note in done.notes if "run in int8" in note)


# --- without the package ------------------------------------------------------------------------------------------


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "executorch" else find(name, *a))


@pytest.mark.usefixtures("absent")
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    with pytest.raises(NeedError, match=r"needs executorch, which is not installed: .*'espalier\[executorch\]'"):
        deploy.to_executorch(perceptron(), IMAGES, tmp_path / "m.pte")
    (tmp_path / "m.pte").write_bytes(b"nothing")
    with pytest.raises(NeedError, match=r"espalier\[executorch\]"):
        deploy.open(tmp_path / "m.pte")
    assert "executorch" not in deploy.available()


def test_suffixes_and_runtimes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.pte"):
        deploy.to_executorch(perceptron(), IMAGES, tmp_path / "m.onnx")
    for name, runtime in (("m.pte", "onnxruntime"), ("m.onnx", "executorch")):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UsageError, match="reads"):
            deploy.open(tmp_path / name, runtime)


PROJECT = """
import torch
from torch import nn
import espalier as es

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def task():
    data = es.data.standard("digits")
    return es.tasks.classification(data.train, data.val, data.test)
"""


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    (folder / "project.py").write_text(PROJECT)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ESPALIER_DATA", str(folder))
    monkeypatch.delitem(sys.modules, "project", raising=False)
    monkeypatch.setattr(sys, "argv", ["espalier", "export", "project.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "executorhc"], "Did you mean 'executorch'"),
        (["--to", "executorch", "--weights", "fp16"], "--weights fp16 is for onnx"),
        (["--to", "executorch", "--runtime", "openvino"], "give --to int8"),
        (["--to", "executorch"], "pip install 'espalier[executorch]'"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, tmp_path, *arguments) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*.pte"))


def test_the_extra_is_pinned_and_no_part_of_the_usual_install() -> None:
    extras = tomllib.loads((HOME / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["executorch"]) <= set((HOME / "constraints.txt").read_text().split())
    assert not any("executorch" in each for name, needed in extras.items() if name != "executorch" for each in needed)
    usual = next(line for line in (HOME / "Makefile").read_text().splitlines() if line.startswith("EXTRAS"))
    assert "executorch" not in usual


# --- fp32 ---------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Any, Any]] = {
    "convolutions": (block, IMAGES),
    "recurrent": (Recurrent, torch.randn(2, 4, 5)),
    "attention": (Attention, torch.randn(2, 5, 8)),
    "several": (Pair, {"left": torch.randn(2, 4), "right": torch.randn(2, 5)}),
}


@installed
@pytest.mark.parametrize("name", MODELS)
def test_a_file_runs_and_agrees_at_several_batches(name: str, tmp_path: Path) -> None:
    build, example = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = deploy.to_executorch(model, example, tmp_path / "m.pte")
    assert (done.kind, done.free_batch, list(done.files)) == ("executorch", True, ["m.pte"])
    assert done.difference < 1e-5
    assert {check.batch for check in done.checks} >= {1, 2, 3} - ({2} if name == "convolutions" else set())
    assert any("the batch is open" in note for note in done.notes)
    assert any(note.startswith("XNNPACK runs") and "linear" in note for note in done.notes)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    session = deploy.open(tmp_path / "m.pte").module()
    found, wanted = (m(**example) if isinstance(example, dict) else m(example) for m in (session, model))
    for key in wanted if isinstance(wanted, dict) else ():
        assert torch.allclose(found[key], wanted[key], atol=1e-5)


@installed
def test_more_samples_than_the_file_has_memory_for_run_in_pieces(tmp_path: Path) -> None:
    model = block()
    deploy.to_executorch(model, IMAGES, tmp_path / "m.pte")
    session = deploy.open(tmp_path / "m.pte", "executorch").module()
    many = torch.randn(11, 3, 8, 8)
    assert torch.allclose(session(many), model(many), atol=1e-5)
    with pytest.raises(ModelError, match=r"'x' of shape \(samples, 3, 8, 8\); got \(2, 3, 9, 8\)"):
        session(torch.randn(2, 3, 9, 8))


@installed
def test_a_batch_that_the_model_fixes_is_told(tmp_path: Path) -> None:
    model = Fixed().eval()
    done = deploy.to_executorch(model, torch.randn(2, 6), tmp_path / "m.pte")
    assert not done.free_batch
    assert any("the batch is fixed at 2" in note for note in done.notes)
    with pytest.raises(ModelError, match=r"of shape \(2, 6\)"):
        deploy.open(tmp_path / "m.pte").module()(torch.randn(3, 6))


@installed
def test_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        deploy.to_executorch(quantized(block(), PTQInt8()), IMAGES, tmp_path / f"{name}.pte")
    assert (tmp_path / "a.pte").read_bytes() == (tmp_path / "b.pte").read_bytes()


@installed
def test_what_disagrees_or_cannot_be_exported_leaves_no_file_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match="disagrees with the model in executorch"):
        deploy.to_executorch(Counting(), torch.randn(2, 3), tmp_path / "m.pte")
    with pytest.raises(ModelError, match=r"Asking cannot be exported; torch\.export says"):
        deploy.to_executorch(Asking(), torch.randn(2, 3), tmp_path / "m.pte")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@installed
@pytest.mark.parametrize("kept", [0, 7, 3000, -500])
def test_a_damaged_file_is_refused(kept: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    deploy.to_executorch(block(), IMAGES, tmp_path / "m.pte")
    (tmp_path / "m.pte").write_bytes((tmp_path / "m.pte").read_bytes()[:kept])
    with pytest.raises(ModelError, match="executorch does not read"):
        deploy.open(tmp_path / "m.pte")
    assert capfd.readouterr() == ("", "")


@installed
@pytest.mark.filterwarnings("ignore")
def test_files_of_others_run(tmp_path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    model = nn.Linear(4, 2).eval()
    program = torch.export.export(model, (torch.ones(2, 4),))
    (tmp_path / "m.pte").write_bytes(to_edge_transform_and_lower(program).to_executorch().buffer)
    found = deploy.open(tmp_path / "m.pte")(**{"input.0": np.ones((2, 4), np.float32)})
    assert np.allclose(found["output.0"], model(torch.ones(2, 4)).detach().numpy(), atol=1e-6)


@installed
def test_sessions_of_different_threads_take_turns(tmp_path: Path) -> None:
    model = block()
    deploy.to_executorch(model, IMAGES, tmp_path / "m.pte")
    one, two = (deploy.open(tmp_path / "m.pte", threads=threads).module() for threads in (1, 2))
    for session in (one, two, one, two):
        assert torch.allclose(session(IMAGES), model(IMAGES), atol=1e-5)


@installed
def test_latency_beside_torch(tmp_path: Path) -> None:
    from espalier.measure.runtimes import runtime_latency

    deploy.to_executorch(block(), IMAGES, tmp_path / "m.pte")
    found = runtime_latency(block(), [tmp_path / "m.pte"], (IMAGES,), repeats=3)
    assert set(found) == {"torch", "executorch"}


# --- int8 ---------------------------------------------------------------------------------------------------------

BOTH = Quantize(bits=8, activation_bits=8, activations=AffineInput())


@installed
@pytest.mark.parametrize("technique", [PTQInt8(), BOTH], ids=["norms folded before", "norms in the model"])
def test_every_layer_on_grids_becomes_int8(technique: Technique, tmp_path: Path) -> None:
    model = quantized(block(), technique)
    done = deploy.to_executorch(model, IMAGES, tmp_path / "m.pte")
    assert counted(done) == "4 of 4 layers run in int8"
    assert not any("quantize" in note for note in done.notes)
    other = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(8))
    assert sqnr([model(other)], [deploy.open(tmp_path / "m.pte").module()(other)]) > 25


@installed
def test_int8_is_a_quarter_of_the_bytes_and_codes_are_those_of_the_model(tmp_path: Path) -> None:
    model = quantized(perceptron(), PTQInt8())
    wide = deploy.to_executorch(perceptron(), IMAGES, tmp_path / "wide.pte")
    done = deploy.to_executorch(model, IMAGES, tmp_path / "m.pte", calibration=[IMAGES, IMAGES + 1])
    assert wide.bytes > 3.5 * done.bytes
    assert counted(done) == "3 of 3 layers run in int8"
    assert "1 result without a grid in the model got one by calibration" in done.notes
    codes = freeze(model)[0]["3.weight"].codes
    assert codes.astype(np.int8).tobytes() in (tmp_path / "m.pte").read_bytes()
    assert sqnr([model(IMAGES)], [deploy.open(tmp_path / "m.pte").module()(IMAGES)]) > 35


@installed
def test_what_has_no_grids_stays_in_fp32_and_says_why(tmp_path: Path) -> None:
    from espalier.quantize.affine import Affine

    part = quantized(perceptron(), Quantize(bits=8, activation_bits=8, activations=AffineInput(), layers=("1", "3")))
    assert counted(deploy.to_executorch(part, IMAGES, tmp_path / "m.pte")) == (
        "2 of 3 layers run in int8; in fp32: 5 (weight without integer codes)"
    )
    lopsided = quantized(perceptron(), Quantize(bits=8, weights=Affine(symmetric=False), activation_bits=8,
                                                activations=AffineInput()))  # fmt: skip
    assert "0 of 3 layers run in int8; in fp32: 1, 3, 5 (weight with asymmetric codes)" in (
        deploy.to_executorch(lopsided, IMAGES, tmp_path / "m.pte").notes
    )


@installed
def test_grids_that_int8_cannot_hold_are_computed_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Rounding().eval(), torch.randn(4, 6)
    done = deploy.to_executorch(model, x, tmp_path / "m.pte")
    assert counted(done).startswith("0 of 1 layers")
    found = deploy.open(tmp_path / "m.pte").module()(x)
    assert torch.equal(found, model(x))
    assert set(found.unique().tolist()) <= {-0.25, 0.0, 0.25, 0.5}


@installed
def test_calibration_without_batches_or_with_nan_is_refused(tmp_path: Path) -> None:
    model = quantized(perceptron(), PTQInt8())
    with pytest.raises(DataError, match="no batches"):
        deploy.to_executorch(model, IMAGES, tmp_path / "m.pte", calibration=iter(()))
    with pytest.raises(NumericError, match="not finite"):
        deploy.to_executorch(model, IMAGES, tmp_path / "m.pte", calibration=[IMAGES * float("nan")])
    assert not list(tmp_path.iterdir())


# --- the command --------------------------------------------------------------------------------------------------


@installed
def test_the_command_writes_measures_and_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, tmp_path, "--to", "executorch") == 0
    said = capsys.readouterr().out
    assert "model.pte" in said
    assert "executorch, batch 1: outputs within" in said
    assert "accuracy on val: torch" in said
    assert "executorch" in said.split("accuracy on val")[1]
    assert (tmp_path / "model.pte").is_file()
