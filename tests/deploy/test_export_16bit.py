"""Weights stored in 16 bits: the file halves, computes in fp32 on rounded weights, and says what was lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from espalier import deploy
from espalier.core.errors import ModelError, NumericError, UsageError
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, slots
from espalier.deploy.sixteen_bits import SMALLEST, Rounding

for _package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; pip install espalier[deploy]")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()  # fmt: skip


def rounded(model: nn.Module, weights: str) -> nn.Module:
    """torch's own rounding of what is large enough."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() >= SMALLEST:
                parameter.copy_(parameter.to(DTYPES[weights]))
    return model


def stored(path: Path) -> dict[str, Any]:
    """Element type of every tensor of ``SMALLEST`` elements or more, as the file itself has it."""
    if path.suffix == ".onnx":
        import onnx

        graph = onnx.load(path).graph
        return {
            tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type)
            for tensor in graph.initializer
            if np.prod(tensor.dims) >= SMALLEST
        }
    import openvino as ov

    operations = ov.Core().read_model(path).get_ops()
    return {
        op.get_friendly_name(): op.get_element_type().get_type_name()
        for op in operations
        if op.get_type_name() == "Constant" and np.prod(op.get_output_shape(0)) >= SMALLEST
    }


NAMES = {("fp16", ".onnx"): "FLOAT16", ("bf16", ".onnx"): "BFLOAT16", ("fp16", ".xml"): "f16", ("bf16", ".xml"): "bf16"}


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_the_file_halves_and_computes_with_rounded_weights_in_fp32(weights: str, suffix: str, tmp_path: Path) -> None:
    model, path = network(), tmp_path / f"m{suffix}"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write = deploy.to_onnx if suffix == ".onnx" else deploy.to_openvino
    done = write(model, X, path, weights=weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(done.files)

    storage = done.storage
    assert storage is not None
    assert set(stored(path).values()) == {NAMES[weights, suffix]}
    assert len(stored(path)) == storage.tensors == 3
    assert storage.elements == sum(p.numel() for p in model.parameters() if p.numel() >= SMALLEST)
    heavy = path if suffix == ".onnx" else path.with_suffix(".bin")
    assert heavy.stat().st_size < 0.505 * 4 * sum(p.numel() for p in model.parameters()) + 3000
    assert done.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert storage.fp32_bytes - done.bytes > 0.95 * 2 * storage.elements

    wanted = rounded(network(), weights)(X)
    for runtime in ("onnxruntime", "openvino")[suffix == ".xml" :]:
        assert torch.allclose(deploy.open(path, runtime).module()(X), wanted, atol=1e-6)
    assert torch.allclose(deploy.open(path, "openvino", precision="bf16").module()(X), wanted, atol=0.02)
    assert {(check.runtime, check.batch) for check in done.checks} >= {("openvino", 1), ("openvino", 3)}
    assert done.difference < 1e-6
    true = model(X).detach()
    gap = float(10 * torch.log10(true.square().sum() / (true - wanted.detach()).square().sum()))
    assert storage.sqnr == pytest.approx(gap, abs=0.1)
    assert storage.sqnr > (60 if weights == "fp16" else 40)
    assert done.weights == done.to_json()["weights"] == weights
    assert f"{storage.fp32_bytes:,} bytes in fp32 and {done.bytes:,} here" in done.notes[-3]
    assert "smaller, not faster" in done.notes[-2]


class Awkward(nn.Module):
    """A norm that the exporter folds, a table of positions and a mask made of the least number."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.q = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.register_buffer("places", torch.arange(4000.0, 4512.0).reshape(32, 16))
        self.register_buffer("least", torch.full((32, 32), torch.finfo(torch.float32).min).triu(1))
        nn.init.uniform_(self.b.running_mean), nn.init.uniform_(self.b.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(self.b(self.c(x)).transpose(1, 2) + self.places)
        return (self.q(x) @ x.transpose(1, 2) + self.least).softmax(-1) @ x


def test_masks_and_positions_stay_and_bf16_runs_where_fp16_overflows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Awkward().eval(), torch.randn(2, 8, 32)
    file = tmp_path / "m.onnx"
    done = deploy.to_onnx(model, x, file, weights="bf16", external_data=True, runtime="onnxruntime")
    assert set(done.files) == {"m.onnx", "m.onnx.data"}
    assert done.storage is not None
    reasons = {"numbers at the end of fp32's range", "whole numbers that 16 bits would round"}
    assert set(done.storage.kept.values()) == reasons
    assert done.difference < 1e-5
    assert torch.isfinite(deploy.open(file).module()(x)).all()
    with pytest.raises(NumericError, match=r"least holds 496 numbers beyond the 65504 .* Store the weights as bf16"):
        deploy.to_openvino(model, x, tmp_path / "other" / "m.xml", weights="fp16")
    assert not list((tmp_path / "other").iterdir())


def test_an_overflow_leaves_no_file_and_what_becomes_zero_is_said(tmp_path: Path) -> None:
    model = network()
    mask = torch.rand(64, 1152, generator=torch.Generator().manual_seed(0)) > 0.5
    attach(slots(model)["3.weight"], Mask(mask))
    with torch.no_grad():
        model[5].weight[:5, 0] = 1e-9
        model[0].weight[0, 0, 0, 0] = -1e5
    with pytest.raises(NumericError, match=r"0\.weight holds 1 number beyond the 65504 .* largest 100000: .* bf16"):
        deploy.to_safetensors(model, tmp_path / "m.safetensors", weights="fp16")
    assert not list(tmp_path.iterdir())
    wide = deploy.to_safetensors(model, tmp_path / "m.safetensors", weights="bf16").storage
    assert wide is not None
    assert wide.zeroed == {}
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 65504
    done = deploy.to_onnx(model, X, tmp_path / "m.onnx", weights="fp16", runtime="onnxruntime")
    assert done.storage is not None
    assert done.storage.zeroed == {"5.weight": 5}, "zeros of the mask are none of them"
    assert "5 weights are too small for fp16 and now zero (5.weight: 5); bf16 keeps them" in done.notes


def test_scales_and_codes_of_quantizers_are_left_alone(tmp_path: Path) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.m = nn.Linear(300, 300), nn.Linear(300, 4)
            self.register_buffer("scale", torch.linspace(0.011, 0.02, 300))
            self.register_buffer("zero", torch.zeros(300, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            return self.m(torch.fake_quantize_per_channel_affine(self.l(x), self.scale, self.zero, 1, -128, 127))

    torch.manual_seed(0)
    done = deploy.to_onnx(Rounded().eval(), torch.randn(2, 300), tmp_path / "m.onnx", weights="fp16")
    assert done.storage is not None
    assert done.storage.kept == {"scale": "a quantizer reads it"}
    assert stored(tmp_path / "m.onnx")["scale"] == "FLOAT"


def test_safetensors_take_16_bits_and_load_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model

    done = deploy.to_safetensors(network(), tmp_path / "m.safetensors", weights="bf16")
    found = load_file(tmp_path / "m.safetensors")
    assert found["3.weight"].dtype == torch.bfloat16
    assert found["3.bias"].dtype == torch.float32
    assert done.storage is not None
    assert done.bytes < 0.52 * done.storage.fp32_bytes
    again = nn.Sequential(*network())
    load_model(again, tmp_path / "m.safetensors")
    assert torch.equal(again(X), rounded(network(), "bf16")(X))


@pytest.mark.parametrize("wrong", ["fp17", "half", "int8", ""])
def test_an_unknown_storage_is_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot be stored as '{wrong}'. (Did you mean|Allowed: bf16, fp16, fp32)"):
        deploy.to_onnx(network(), X, tmp_path / "m.onnx", weights=wrong)
    assert not list(tmp_path.iterdir())


def test_a_network_with_nothing_to_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no floating-point weight of 256 elements or more .* Export it in fp32"):
        deploy.to_safetensors(nn.Linear(5, 5), tmp_path / "m.safetensors", weights="fp16")
    assert not list(tmp_path.iterdir())


def test_ties_go_to_even_and_infinities_stay() -> None:
    fill = torch.full((SMALLEST,), 1.0 + 2**-11)
    fill[:3] = torch.tensor([1.0 + 3 * 2**-11, -torch.inf, 65519.0])
    narrow = Rounding("fp16")("w", fill)
    assert narrow is not None
    assert narrow[:4].tolist() == [1.0 + 2**-9, -torch.inf, 65504.0, 1.0]
