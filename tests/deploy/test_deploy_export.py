"""Exported files run and agree; what cannot be exported, or disagrees, gets a sentence and leaves no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.deploy.deploy_nets import Pair, Recurrent
from torch import Tensor, nn

import espalier as es
from espalier import deploy
from espalier.core.errors import ModelError, NeedError, RunError, UsageError
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, slots
from espalier.graph import Runner, trace
from espalier.prune.removal import remove_channels

for _package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; pip install espalier[deploy]")


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(),
        nn.Linear(216, 4),
    ).eval()  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.o = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        return self.o(x + self.a(x, x, x, need_weights=False)[0]).mean(1)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[Any, Any]] = {
    "convolutions": (convolutions, IMAGES),
    "attention": (Attention, torch.randn(2, 5, 6)),
    "recurrent": (Recurrent, torch.randn(2, 4, 5)),
    "several": (Pair, {"left": torch.randn(2, 4), "right": torch.randn(2, 5)}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_runs_and_agrees(name: str, tmp_path: Path) -> None:
    build, example = MODELS[name]
    model = build().eval()
    done = deploy.to_onnx(model, example, tmp_path / "m.onnx", runtime="onnxruntime")
    assert done.difference < 1e-4
    assert {check.batch for check in done.checks} >= {1, 2, 3}
    session = deploy.open(tmp_path / "m.onnx").module()
    call = example if isinstance(example, dict) else {}
    args = () if isinstance(example, dict) else (example,)
    found, wanted = session(*args, **call), model(*args, **call)
    for key in wanted if isinstance(wanted, dict) else (0,):
        a, b = (found[key], wanted[key]) if isinstance(wanted, dict) else (found, wanted)
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_openvino_keeps_fp32(tmp_path: Path) -> None:
    model = convolutions()
    done = deploy.to_openvino(model, IMAGES, tmp_path / "m.xml")
    assert done.difference < 1e-4
    assert set(done.files) == {"m.xml", "m.bin"}
    assert done.files["m.bin"] >= 4 * sum(p.numel() for p in model.parameters() if p.ndim > 1)


@pytest.mark.filterwarnings("ignore")
def test_pruned_models_and_graphs_export(tmp_path: Path) -> None:
    small = remove_channels(convolutions(), (IMAGES,), sparsity=0.5).model
    assert deploy.to_onnx(small, IMAGES, tmp_path / "a.onnx", runtime="onnxruntime").difference < 1e-4
    graph = trace(small, (IMAGES,))
    runner = Runner(graph, {**small.state_dict(), **graph.constants}).eval()
    assert deploy.to_onnx(runner, None, tmp_path / "b.onnx", runtime="onnxruntime").difference < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_masks_are_baked_and_the_model_is_left_alone(tmp_path: Path) -> None:
    model = convolutions()
    slot = slots(model)["5.weight"]
    attach(slot, Mask(torch.rand(slot.shape) > 0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert deploy.to_onnx(model, IMAGES, tmp_path / "m.onnx", runtime="onnxruntime").difference < 1e-4
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        deploy.to_onnx(convolutions(), IMAGES, tmp_path / f"{name}.onnx", runtime="onnxruntime")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


class Counting(nn.Module):
    """Gives something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.l(x) + self.calls


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_disagrees_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="disagrees with the model"):
        deploy.to_onnx(Counting(), torch.randn(2, 3), tmp_path / "m.onnx", runtime="onnxruntime")
    assert not list(tmp_path.iterdir())


class Asking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_gets_the_reason_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ModelError, match=r"Asking cannot be exported; torch\.export says: .*Change Python control flow"
    ):
        deploy.to_onnx(Asking(), torch.randn(2, 3), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(NeedError, match="deploy"):
        deploy.to_onnx(convolutions(), IMAGES, tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [("none.onnx", RunError, "no file"), ("x.txt", UsageError, "reads"), ("broken.onnx", ModelError, "does not read")],
)
def test_broken_files_get_sentences(tmp_path: Path, source: str, error: type[Exception], words: str) -> None:
    if not source.startswith("none"):
        (tmp_path / source).write_bytes(b"nothing")
    with pytest.raises(error, match=words):
        deploy.open(tmp_path / source)


def test_wrong_suffix_and_example(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must end in"):
        deploy.to_onnx(convolutions(), IMAGES, tmp_path / "m.bin")
    with pytest.raises(ModelError, match="does not run on the example"):
        deploy.to_onnx(convolutions(), torch.randn(2, 5), tmp_path / "m.onnx")


def test_safetensors_are_the_plain_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = convolutions()
    done = deploy.to_safetensors(model, tmp_path / "m.safetensors")
    assert done.bytes == (tmp_path / "m.safetensors").stat().st_size
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["0.weight"], model[0].weight)


def test_latency_beside_torch(tmp_path: Path) -> None:
    from espalier.measure.runtimes import runtime_latency

    deploy.to_onnx(convolutions(), IMAGES, tmp_path / "m.onnx", runtime="onnxruntime")
    found = runtime_latency(convolutions(), [tmp_path / "m.onnx"], (IMAGES,), repeats=3)
    assert set(found) == {"torch", "onnxruntime", "openvino"}
    assert es.deploy is deploy
