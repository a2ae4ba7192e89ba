"""Our int8 files beside those of onnxruntime's and NNCF's own tools, timed in onnxruntime and OpenVINO.

python benchmarks/int8_latency.py [--quick] [--threads 2] [--again] [--only NAME ...]

ResNet-18 and -50, MobileNetV2, EfficientNet-B0, ViT-tiny and an encoder of BERT's size at batch 1. Weights are random
(batch norms have seen noise), which changes no time. One row per network and runtime. All files of a row are open in
one process and called in turn, warm: fp32, in OpenVINO bf16 as well, the tool's int8 and ours. ``ratio`` is ours over
the tool's, by the median. The tools: ``quantize_static`` (U8S8 QDQ, per channel) and ``nncf.quantize`` of the same fp32
file, calibrated on the same noise with smallest and largest value. Both figures of SQNR are against fp32 on noise.
Rows already in results/int8_latency.json are kept (``--again`` measures them anew). ``--quick``: ResNet-18, MobileNetV2
and ViT-tiny, few repeats, into a file of its own. The environment: see zoo_requirements.txt, with openvino and nncf
(``--no-deps``, and what it asks for) beside it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # torch's own; the runtimes get theirs by --threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402 - the thread counts above must be set first
import torch  # noqa: E402
from benchmarks.common import RESULTS, save  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from espalier.deploy import Int8Exported, runtimes, to_int8, to_onnx  # noqa: E402
from espalier.deploy.int8 import this_processor  # noqa: E402
from espalier.measure import Latency, latency  # noqa: E402

NETWORKS = (
    "torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2", "torchvision/efficientnet_b0",
    "timm/vit_tiny_patch16_224", "encoder/bert_base",
)  # fmt: skip
QUICK = ("torchvision/resnet18", "torchvision/mobilenet_v2", "timm/vit_tiny_patch16_224")
TRANSFORMERS = ("timm/vit_tiny_patch16_224", "encoder/bert_base")
RUNTIMES = {"onnxruntime": "quantize_static", "openvino": "nncf"}
CALIBRATION = 8
CLAIMED = {"ratio_at_most": 1.05}
"""The aim for each row: the median of ours over that of the runtime's own tool."""


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode and one sample."""
    torch.manual_seed(0)
    if name == "encoder/bert_base":
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval(), torch.randn(1, 128, 768)
    model, x = importlib.import_module("benchmarks.zoo_parts.models").build(name)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, *x.shape[1:]))
    return model.eval(), x[:1].contiguous()


def noise(like: Tensor) -> list[Tensor]:
    """The calibration batches of every tool."""
    return [torch.randn(like.shape, generator=torch.Generator().manual_seed(n)) for n in range(CALIBRATION)]


def static(fp32: Path, data: list[Tensor], out: Path, name: str) -> None:
    """onnxruntime's own tool, as its documentation advises for x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(data)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {runtimes.open(fp32).signature.inputs[0]: batch.numpy()}

    ready = fp32.with_suffix(".ready.onnx")
    quant_pre_process(str(fp32), str(ready), skip_symbolic_shape=name in TRANSFORMERS)
    quantize_static(
        str(ready), str(out), Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, per_channel=True, reduce_range=this_processor().saturates,
    )  # fmt: skip


def nncf(fp32: Path, data: list[Tensor], out: Path, name: str) -> None:
    """NNCF's post-training quantization of the OpenVINO model."""
    import logging

    import openvino as ov
    from nncf import Dataset, ModelType, quantize, set_log_level

    set_log_level(logging.ERROR)
    kind = {"model_type": ModelType.TRANSFORMER} if name in TRANSFORMERS else {}
    model = ov.Core().read_model(str(fp32))
    done = quantize(model, Dataset(data, lambda batch: batch.numpy()), subset_size=len(data), **kind)
    ov.save_model(done, str(out), compress_to_fp16=False)


TOOLS: dict[str, Callable[[Path, list[Tensor], Path, str], None]] = {"quantize_static": static, "nncf": nncf}


def sqnr(session: Any, wanted: np.ndarray, x: Tensor) -> float:
    """dB of the first output against fp32."""
    found = session.run([x.numpy()])[0]
    return round(float(10 * np.log10((wanted**2).sum() / max(float(((wanted - found) ** 2).sum()), 1e-30))), 1)


def summary(found: Latency) -> dict[str, Any]:
    """Median, 10th and 90th percentile, in ms."""
    return {"median_ms": round(found.median_ms, 3), "p10_p90_ms": [round(found.p10_ms, 3), round(found.p90_ms, 3)]}


def key(name: str, runtime: str, threads: int) -> str:
    return f"{name.partition('/')[2]}, {runtime}, {threads} threads"


def measure(name: str, runtime: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one network in one runtime."""
    model, x = network(name)
    tool, data = RUNTIMES[runtime], noise(x)
    suffix = ".onnx" if runtime == "onnxruntime" else ".xml"
    with tempfile.TemporaryDirectory() as folder:
        fp32, theirs, ours = (Path(folder) / file for file in ("fp32.onnx", f"theirs{suffix}", f"ours{suffix}"))
        to_onnx(model, x, fp32, runtime=runtime, tolerance=1e-3)
        done: Int8Exported = to_int8(model, x, data, ours, runtime=runtime)
        TOOLS[tool](fp32, data, theirs, name)
        sides: dict[str, Any] = {"fp32": (fp32, "fp32")}
        if runtime == "openvino":
            sides["bf16"] = (fp32, "bf16")
        sides |= {tool: (theirs, "fp32"), "ours": (ours, "fp32")}
        sessions = {
            side: runtimes.open(file, runtime, threads=options.threads, precision=precision)
            for side, (file, precision) in sides.items()
        }
        wanted = sessions["fp32"].run([x.numpy()])[0]
        noises = {side: sqnr(session, wanted, x) for side, session in sessions.items() if side != "fp32"}
        repeats, seconds = (60, 20.0) if options.quick else (300, 60.0)
        modules = {side: _Called(session) for side, session in sessions.items()}
        timed = latency(modules, lambda each: each(x), repeats=repeats, warmup=5, seconds=seconds)
        sizes = {side: file.stat().st_size + _weights(file) for side, (file, _) in sides.items()}
        del sessions, modules
        gc.collect()
    measured = {
        "ratio": round(timed["ours"].median_ms / timed[tool].median_ms, 3),
        "ratio_p10": round(timed["ours"].p10_ms / timed[tool].p10_ms, 3),
        "speedup_over_fp32": round(timed["fp32"].median_ms / timed["ours"].median_ms, 2),
        **{side: summary(found) for side, found in timed.items()},
        "sqnr_db": noises, "bytes": sizes, "runs": timed["ours"].runs, "coverage": str(done.coverage),
    }  # fmt: skip
    setting = {
        "batch": 1, "input": list(x.shape[1:]), "threads": options.threads, "calibration": len(data), "tool": tool,
        "runtime": f"{runtime} {runtimes.available()[runtime]}", "processor": str(this_processor()),
        "quick": options.quick,
    }  # fmt: skip
    return {
        "id": "int8_latency", "row": key(name, runtime, options.threads), "claimed": CLAIMED, "measured": measured,
        "setting": setting, "seed": 0,
    }  # fmt: skip


class _Called(nn.Module):
    """A session under torch's interface, also one whose file stores no call of ours."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Any:
        return self.session.run([x.numpy()])


def _weights(file: Path) -> int:
    beside = file.with_suffix(".bin")
    return beside.stat().st_size if file.suffix == ".xml" and beside.exists() else 0


def present(path: Path) -> set[str]:
    """Names of the rows that are there."""
    return {row["row"] for row in json.loads(path.read_text())} if path.exists() else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three networks, few repeats")
    parser.add_argument("--threads", type=int, default=2, help="of each runtime")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    file = "int8_latency" + ("_quick" if options.quick else "")
    done = set() if options.again else present(RESULTS / f"{file}.json")
    for name in options.only or (QUICK if options.quick else NETWORKS):
        for runtime, tool in RUNTIMES.items():
            if key(name, runtime, options.threads) in done:
                continue
            row = measure(name, runtime, options)
            save(file, [row])
            said = row["measured"]
            print(
                f"{row['row']:46} fp32 {said['fp32']['median_ms']:.2f}  {tool} {said[tool]['median_ms']:.2f}  ours "
                f"{said['ours']['median_ms']:.2f} ms  ratio {said['ratio']:.2f} (p10 {said['ratio_p10']:.2f})  SQNR "
                f"{said['sqnr_db']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
