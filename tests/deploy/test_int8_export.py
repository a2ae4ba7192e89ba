"""Int8 files run in int8, keep what training fixed, and agree with their simulation; what is refused leaves no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.deploy.deploy_nets import Block
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import deploy
from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError, NeedError, NumericError, UnknownNameError, UsageError
from espalier.core.forms import Form
from espalier.core.inputs import QuantizedInput
from espalier.core.parametrize import attach, slots
from espalier.core.representation import Affine, Representation
from espalier.deploy import installed
from espalier.deploy.int8 import PROFILES, Int8Exported, MinMax, Processor
from espalier.deploy.signature import signature_of
from espalier.quantize.minmax import MinMax as RangeOf
from espalier.quantize.percentile import Percentile
from espalier.quantize.ptq_int8 import PTQInt8
from espalier.tasks import classification

for _package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(_package, reason=f"{_package} is not installed; pip install espalier[deploy]")

import onnx  # noqa: E402 - only where it is installed
import onnx_ir as ir  # noqa: E402
from onnx import numpy_helper  # noqa: E402

from espalier.deploy.int8.count import coverage_of  # noqa: E402
from espalier.deploy.int8.job import Job  # noqa: E402
from espalier.deploy.int8.places import places  # noqa: E402
from espalier.deploy.int8.rules import broken_rules  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
VNNI = Processor("a processor with VNNI", frozenset({"avx512_vnni"}))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.MultiheadAttention(16, 2, batch_first=True), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        x = x + self.a(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


def network() -> Block:
    torch.manual_seed(0)
    model = Block()
    with torch.no_grad():
        for norm in (model.b1, model.b2):
            norm.weight.uniform_(-1.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def batches(like: Tensor, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(like.shape, generator=generator) for _ in range(count)]


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def constants(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(str(path)).graph.initializer}


def convert(model: nn.Module, x: Tensor, path: Path, **options: Any) -> Int8Exported:
    return deploy.to_int8(model, x, batches(x), path, **{"processor": VNNI, **options})


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Int8Exported]:
    return convert(network(), IMAGES, tmp_path_factory.mktemp("block") / "m.onnx")


def test_everything_fuses_in_onnxruntime(block: Int8Exported) -> None:
    assert block.coverage.layers == block.coverage.of_layers == 4
    assert block.coverage.mac_share == 1
    assert not block.coverage.in_float
    executed = block.coverage.executed
    assert (executed["QLinearConv"], executed["QLinearAdd"], executed["QGemm"]) == (3, 1, 1)
    assert not {"Conv", "Gemm", "Add", "Relu", "Clip", "ReduceMean"} & set(executed)
    assert executed["QuantizeLinear"] == 1, "only the input is quantized in a step of its own"
    assert block.sqnr > 30
    assert block.agreement.simulation is not None
    assert block.agreement.simulation > 30


def test_the_file_is_called_as_the_model_and_is_smaller(block: Int8Exported) -> None:
    assert block.free_batch
    found = deploy.open(block.path).module()(IMAGES[:1])
    wanted = network()(IMAGES[:1])
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, atol=0.1)
    assert {Path(name).name for name in block.files} == {"m.onnx"}
    stored = constants(block.path)
    assert stored["c2.weight/codes"].dtype == np.int8
    assert not [name for name, array in stored.items() if array.dtype == np.float32 and array.size > 64]


def test_no_tensor_is_quantized_twice(block: Int8Exported) -> None:
    graph = onnx.load(str(block.path)).graph
    made = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and (before := made.get(node.input[0])) is not None:
            assert before.op_type != "DequantizeLinear"


def test_the_same_bytes_again(block: Int8Exported, tmp_path: Path) -> None:
    again = convert(network(), IMAGES, tmp_path / "m.onnx")
    assert again.path.read_bytes() == block.path.read_bytes()
    assert str(tmp_path).encode() not in again.path.read_bytes()


def test_without_dot_products_weights_have_7_bits(tmp_path: Path) -> None:
    done = convert(network(), IMAGES, tmp_path / "m.onnx", processor=Processor("an old one", frozenset({"avx2"})))
    codes = [array for name, array in constants(done.path).items() if name.endswith("weight/codes")]
    assert len(codes) == 4
    assert max(int(np.abs(array).max()) for array in codes) == 63
    assert any("saturate" in note for note in done.notes)


def test_openvino_runs_every_layer_in_int8(tmp_path: Path) -> None:
    done = convert(network(), IMAGES, tmp_path / "m.xml", runtime="openvino")
    assert set(done.files) == {"m.xml", "m.bin"}
    assert done.kind == "openvino"
    assert not done.coverage.in_float
    assert sum(n for kind, n in done.coverage.executed.items() if kind == "Convolution u8") == 3
    assert done.files["m.bin"] < 2 * sum(p.numel() for p in network().parameters())
    assert done.sqnr > 30


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_attention_and_its_linear_layers(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / ("m.onnx" if runtime == "onnxruntime" else "m.xml")
    done = convert(Attention().eval(), torch.randn(2, 5, 16), path, runtime=runtime)
    assert done.coverage.layers == done.coverage.of_layers == 6
    assert not done.coverage.in_float
    assert done.sqnr > 30
    if runtime == "onnxruntime":
        assert done.coverage.executed["QGemm"] == 4
        assert not {"Gemm", "MatMul", "FusedMatMul"} & set(done.coverage.executed)


def test_linear_layers_of_two_and_three_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    for shape, rows in (((2, 6), 1), ((2, 5, 6), 5)):
        done = convert(model, torch.randn(shape), tmp_path / "m.onnx")
        assert done.coverage.layers == 2
        assert done.coverage.executed["QGemm"] == 2
        assert done.coverage.macs == (6 * 16 + 16 * 4) * rows


class ScaleShift(nn.Module):
    """What is left of a batch norm that was reduced to a scale and a shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        view = (1, -1, *[1] * (x.ndim - 2))
        return x * self.scale.view(view) + self.shift.view(view)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, ScaleShift])
def test_norms_behind_linear_layers_are_folded(norm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Linear(16, 4))
    model(5 + 3 * torch.randn(64, 6))
    done = convert(model.eval(), torch.randn(2, 6), tmp_path / "m.onnx")
    assert not {"BatchNormalization", "Mul", "Add", "Relu"} & set(ops(done.path))
    assert done.coverage.executed["QGemm"] == 2
    assert done.sqnr > 30


def test_transposed_convolutions_with_groups_and_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), ScaleShift(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 4, 5, 5)
    done = convert(model, x, tmp_path / "m.onnx", runtime="tensorrt")
    assert not {"Mul", "Add"} & set(ops(done.path))
    assert done.coverage.layers == 2
    assert done.coverage.macs == 4 * 25 * 3 * 9 + 2 * 6 * 49
    assert done.sqnr > 25
    on_x86 = convert(model, x, tmp_path / "b.onnx")
    assert on_x86.coverage.left["0"] == "onnxruntime has no int8 ConvTranspose"


class Coded(Form):
    """Symmetric integer codes of ``bits`` bits, one scale per output channel: a training form for these tests."""

    kind = "coded-for-a-test"
    phase = "codes"

    def __init__(self, bits: int, axis: int | None = 0) -> None:
        super().__init__()
        self.bits, self.axis = bits, axis

    def parts(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        most = 2 ** (self.bits - 1) - 1
        others = [place for place in range(latent.ndim) if place != self.axis]
        scale = latent.abs().amax(others) / most if self.axis is not None else latent.abs().max() / most
        view = [-1 if place == self.axis else 1 for place in range(latent.ndim)]
        return torch.round(latent / (scale.reshape(view) if self.axis is not None else scale)), scale

    def forward(self, latent: Tensor) -> Tensor:
        return torch.from_numpy(self.freeze(latent).dense())

    def freeze(self, latent: Tensor) -> Representation:
        codes, scale = self.parts(latent.detach())
        return Affine(
            shape=tuple(latent.shape), codes=codes.to(torch.int8).numpy(), scale=scale.numpy(),
            zero_point=np.zeros(scale.shape, np.int32), bits_per_code=self.bits, axis=self.axis,
        )  # fmt: skip

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> Form:
        return cls(4)


def test_trained_codes_arrive_bit_for_bit_through_folding_and_transposition(tmp_path: Path) -> None:
    model = nn.Sequential(network(), nn.Unflatten(1, (1, 5)), nn.Linear(5, 7, bias=False)).eval()
    wanted: dict[str, Affine] = {}
    for name, bits, axis in (("0.c2.weight", 4, 0), ("0.fc.weight", 8, None), ("2.weight", 3, 0)):
        slot = slots(model)[name]
        form = Coded(bits, axis)
        attach(slot, form)
        frozen = form.freeze(slot.latent)
        assert isinstance(frozen, Affine)
        wanted[name] = frozen
    done = convert(model, IMAGES, tmp_path / "m.onnx")
    stored = constants(done.path)
    codes = stored["0.c2.weight/codes"]
    sign = np.sign(model[0].b2.weight.detach().numpy()).astype(np.int8).reshape(-1, 1, 1, 1)
    assert (sign < 0).any()
    assert np.array_equal(codes, wanted["0.c2.weight"].codes * sign)
    assert np.array_equal(stored["0.fc.weight/codes"], wanted["0.fc.weight"].codes)
    assert np.array_equal(stored["0.fc.weight/scale"], np.full(5, wanted["0.fc.weight"].scale, np.float32))
    transposed = next(array for array in stored.values() if array.shape == (5, 7) and array.dtype == np.int8)
    assert np.array_equal(transposed, wanted["2.weight"].codes.T)
    assert done.bits["0.c2"] == 4
    assert any("weights of 3 and 4 bits stand in 8 bits each" in note for note in done.notes)


def test_codes_that_do_not_fit_are_rounded_anew_and_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    attach(slots(model)["0.weight"], Coded(8))
    done = convert(model, torch.randn(2, 6), tmp_path / "m.onnx", processor=Processor("unknown"))
    assert any("trained codes of 0.weight" in note and "rounded anew" in note for note in done.notes)


class Trained(nn.Module):
    """Grids of 4 bits in front of a convolution and behind its relu; weights on 8 and 5 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.25, 7, 0, 15)
        weight = torch.fake_quantize_per_tensor_affine(self.c1.weight, 0.002, 0, -128, 127)
        x = F.relu(F.conv2d(x, weight, self.c1.bias))
        x = torch.fake_quantize_per_tensor_affine(x, 0.0625, 0, 0, 15)
        weight = torch.fake_quantize_per_channel_affine(
            self.c2.weight, torch.full((4,), 0.02), torch.zeros(4, dtype=torch.int32), 0, -16, 15
        )
        return F.conv2d(x, weight, self.c2.bias)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_trained_grids_are_kept_and_cut_where_training_cut(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Trained().eval()
    wide = 4 * IMAGES
    done = deploy.to_int8(model, wide, [wide], tmp_path / "m.onnx", runtime=runtime, processor=VNNI)
    scales = {float(a) for name, a in constants(done.path).items() if name.endswith("/scale") and a.ndim == 0}
    assert {0.25, 0.0625} <= scales
    assert done.coverage.layers == 2
    assert not done.coverage.in_float
    assert (done.bits["c1"], done.bits["c2"]) == (8, 5)
    assert done.free_batch
    assert done.sqnr > 40, "the file rounds and cuts where the model does, though its codes have room for more"


class Shared(nn.Module):
    """The tensor behind ``c1`` is read on a trained grid, twice the same, and by a residual sum."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.out, self.codes = nn.Conv2d(4, 2, 1), codes

    def grid(self, x: Tensor) -> Tensor:
        top, scale = self.codes - 1, 2.0 / (self.codes - 1)
        return torch.fake_quantize_per_tensor_affine(torch.clamp(x, 0.0, top * scale), scale, 0, 0, 255)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c1(x))
        return self.out(F.relu(self.c2(self.grid(x)) + self.c3(self.grid(x)) + x))


@pytest.mark.parametrize("codes", [256, 16])
def test_a_tensor_read_on_its_grid_and_beside_it(codes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    done = convert(Shared(codes).eval(), IMAGES, tmp_path / "m.onnx")
    assert not done.coverage.in_float
    assert done.coverage.executed["QLinearConv"] == 4
    assert done.coverage.executed["QLinearAdd"] == 2
    assert done.sqnr > 25
    twice = [note for note in done.notes if "rounded to 8 bits before the trained 4" in note]
    assert len(twice) == (codes == 16), "equal grids are one, and 256 codes serve all readers"
    assert ops(done.path)["Clip"] == (codes == 16), "the clamp of training became a cut of the codes"


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        self.b.weight.data *= 5

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))


def test_a_concatenation_has_one_scale(tmp_path: Path) -> None:
    done = convert(Joined().eval(), IMAGES, tmp_path / "m.onnx")
    graph = onnx.load(str(done.path)).graph
    made = {out: node for node in graph.node for out in node.output}
    stored = constants(done.path)
    joined = next(node for node in graph.node if node.op_type == "Concat")
    reader = next(node for node in graph.node if joined.output[0] in node.input)
    scales = {float(stored[made[name].input[1]]) for name in joined.input} | {float(stored[reader.input[1]])}
    assert len(scales) == 1
    assert done.coverage.executed["QLinearConcat"] == 1


def test_tensorrt_files_keep_its_rules(tmp_path: Path) -> None:
    done = convert(network(), IMAGES, tmp_path / "m.onnx", runtime="tensorrt")
    stored = constants(done.path)
    zeros = [array for name, array in stored.items() if name.endswith("zero_point")]
    assert zeros
    assert all(array.dtype == np.int8 and not array.any() for array in zeros)
    assert stored["fc.weight/scale"].shape == (5,)
    assert stored["fc.bias"].dtype == np.float32
    assert done.agreement.simulation is None
    assert done.sqnr > 25
    assert any("was not run" in note for note in done.notes)


def test_a_broken_rule_is_named(tmp_path: Path) -> None:
    done = convert(nn.Sequential(nn.Linear(6, 5)).eval(), torch.randn(2, 6), tmp_path / "m.onnx")
    broken = " ".join(broken_rules(ir.load(done.path)))
    assert "the zero point must be int8 and 0" in broken
    assert "bias must be fp32" in broken


def test_layers_kept_in_fp32_and_unsupported_ones_are_listed(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.r, self.o = nn.Linear(5, 8), nn.LSTM(8, 7, batch_first=True), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.r(F.relu(self.up(x)))[0])

    done = convert(Mixed().eval(), torch.randn(2, 4, 5), tmp_path / "m.onnx", keep_fp32=["up"])
    assert done.coverage.layers == 1
    assert done.coverage.left["up"] == "kept in fp32 as asked"
    assert "LSTM has no int8 form" in done.coverage.left["r"]
    assert 0 < done.coverage.parameter_share < 0.2
    assert "1 of 3 layers" in str(done.coverage)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A linear layer, exported in fp32 and waiting for its calibration data."""
    model = nn.Linear(4, 2).eval()
    call = ((torch.randn(2, 4),), {})
    signature = signature_of(model, *call, model(*call[0]))
    staged = tmp_path_factory.mktemp("job") / "m.onnx"
    made = Job(profile=PROFILES["onnxruntime"], processor=VNNI, signature=signature, staged=staged, bare=model)
    made.prepare(call)
    return made


DATA: dict[str, tuple[list[Any], type[Exception], str]] = {
    "none": ([], DataError, "no calibration data"),
    "no samples": ([torch.zeros(0, 4)], DataError, "has no samples"),
    "other shape": ([torch.zeros(2, 5)], DataError, "does not run on calibration batch 0"),
    "nan": ([torch.ones(2, 4), torch.full((2, 4), torch.nan)], NumericError, "batch 1 holds NaN"),
    "dead": ([torch.zeros(2, 4)], NumericError, "zero on all calibration data.*keep_fp32"),
    "overflow": ([torch.full((2, 4), 1e35)], NumericError, "its scale .* is outside"),
}


@pytest.mark.parametrize("case", DATA)
def test_calibration_data_that_is_refused(case: str, prepared: Job) -> None:
    data, kind, message = DATA[case]
    with pytest.raises(kind, match=message):
        prepared.write(prepared.bare, data, MinMax, lambda _: None)


def test_names_that_nothing_answers_to(prepared: Job) -> None:
    with pytest.raises(UnknownNameError, match="no layer answers to keep_fp32 'head'"):
        places(prepared.network.graph, prepared.profile, ["head"])
    with pytest.raises(UnknownNameError, match="Did you mean 'onnxruntime'"):
        convert(nn.Linear(4, 2), torch.randn(2, 4), Path("m.onnx"), runtime="onxruntime")


def test_nothing_in_int8_is_an_error(prepared: Job) -> None:
    with pytest.raises(ModelError, match=r"0 of 1 layers.*kept in fp32 as asked"):
        coverage_of(prepared.network, places(prepared.network.graph, prepared.profile, ["*"]))


def test_a_file_that_disagrees_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = deploy.runtimes.OnnxRuntime.run

    def wrong(session: Any, arrays: Any) -> Any:
        fused = session._session.get_session_options().graph_optimization_level.value
        return [array * (1.2 if fused else 1.0) for array in true(session, arrays)]

    monkeypatch.setattr(deploy.runtimes.OnnxRuntime, "run", wrong)
    with pytest.raises(ModelError, match="disagrees with the simulation of the same file: 14"):
        convert(nn.Linear(4, 2).eval(), torch.randn(2, 4), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = installed.version
    monkeypatch.setattr(installed, "version", lambda package: None if package == "openvino" else there(package))
    with pytest.raises(NeedError, match=r"openvino.*espalier\[deploy\]"):
        convert(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "m.xml", runtime="openvino")


def test_an_observer_is_passed_in(tmp_path: Path) -> None:
    class Half(MinMax):
        def range(self) -> tuple[float, float]:
            low, high = super().range()
            return low / 2, high / 2

    model = nn.Sequential(nn.Linear(6, 5)).eval()
    full = constants(convert(model, torch.randn(2, 6), tmp_path / "a.onnx").path)
    half = constants(convert(model, torch.randn(2, 6), tmp_path / "b.onnx", observer=Half).path)
    assert float(half["input/scale"]) == pytest.approx(float(full["input/scale"]) / 2, rel=1e-6)


def test_bf16_is_openvinos(block: Int8Exported, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="OpenVINO's"):
        deploy.open(block.path, precision="bf16")
    with pytest.raises(UsageError, match="no precision"):
        deploy.open(block.path, "openvino", precision="half")
    deploy.to_onnx(network(), IMAGES, tmp_path / "m.onnx", runtime="openvino")
    wanted = network()(IMAGES)
    for precision in ("bf16", "auto"):
        found = deploy.open(tmp_path / "m.onnx", "openvino", precision=precision).module()(IMAGES)
        assert torch.allclose(found, wanted, atol=0.1)


class Fire(nn.Module):
    """Pools and concatenations between convolutions: what a trained grid must pass through unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 6, 1), nn.Conv2d(12, 5, 1)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(45, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.max_pool2d(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1), 2)
        x = F.relu(self.squeeze(x))
        x = self.out(torch.cat([F.relu(self.c(x)), F.relu(self.d(x))], 1))
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def fire() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Fire().eval(), torch.randn(32, 3, 14, 14)
    data = [(x[i : i + 16], torch.zeros(16, dtype=torch.long)) for i in (0, 16)]
    return PTQInt8()(model, Context(task=classification(data))), x


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_grid_behind_pools_and_concatenations_is_the_only_one(
    runtime: str, fire: tuple[nn.Module, Tensor], tmp_path: Path
) -> None:
    quantized, x = fire
    done = deploy.to_int8(quantized, x[:2], [x / 2], tmp_path / "m.onnx", runtime=runtime, processor=VNNI)
    assert done.sqnr > 55, "calibration on other data changes nothing: every grid is the model's own"
    assert not done.coverage.in_float
    stored = constants(done.path)
    scales = {float(a) for name, a in stored.items() if name.endswith("/scale") and a.ndim == 0}
    trained = {float(m.state["scale"]) for m in quantized.modules() if isinstance(m, QuantizedInput)}
    assert scales == {float(np.float32(scale)) for scale in trained}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_one_linear_layer_of_many_in_int8(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    for only in "024":
        left = [name for name in "024" if name != only]
        done = convert(model, torch.randn(2, 8), tmp_path / f"{only}.onnx", runtime=runtime, keep_fp32=left)
        assert (done.coverage.layers, done.coverage.in_float) == (1, ()), "also where what reads it stays in fp32"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_layers_that_share_a_weight(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    model[2].weight = model[0].weight
    done = convert(model, torch.randn(2, 8), tmp_path / "m.onnx", runtime=runtime)
    assert (done.coverage.layers, done.coverage.in_float) == (2, ())
    assert done.sqnr > 30


def test_grids_that_tensorrt_cannot_hold_are_said_in_one_line(fire: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    quantized, x = fire
    done = deploy.to_int8(quantized, x[:2], [x], tmp_path / "m.onnx", runtime="tensorrt")
    assert sum("quantized anew" in note for note in done.notes) == 1
    assert not broken_rules(ir.load(done.path))


def test_the_observers_of_quantization_watch_exports(tmp_path: Path) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 100.0
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    found = {
        name: float(
            constants(deploy.to_int8(model, x[:2], [x, x], tmp_path / f"{name}.onnx", observer=o).path)["input/scale"]
        )
        for name, o in {"all": MinMax, "minmax": RangeOf().streaming, "share": Percentile(share=0.99).streaming}.items()
    }
    assert found["minmax"] == pytest.approx(found["all"], rel=1e-6)
    assert found["share"] < found["all"] / 10
