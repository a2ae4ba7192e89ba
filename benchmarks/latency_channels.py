"""Half the channels gone, timed in onnxruntime and OpenVINO: how much of the saved arithmetic becomes time.

python benchmarks/latency_channels.py [--quick] [--threads 2] [--multiple 8] [--again] [--only NAME ...]

ResNet-18, ResNet-50, MobileNetV2 and ViT-tiny at 224 x 224, batch 1, fp32; weights are random, which changes no time.
One row per network and runtime. Original and pruned file are open in one process and called in turn, warm; the MAC
ratio is original over pruned, and so is the speed-up. Both files carry an open batch axis, as every export does.
Rows already in results/latency_channels.json are kept (``--again`` measures them anew). ``--quick``: ResNet-18 and
MobileNetV2, few repeats, into a file of its own. The environment: see zoo_requirements.txt, with openvino beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # torch's own; the runtimes get theirs by --threads
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402 - the thread counts above must be set first
from benchmarks.common import RESULTS, save  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from espalier.deploy import Exported, runtimes, to_onnx  # noqa: E402
from espalier.graph import macs, trace  # noqa: E402
from espalier.measure import Latency, latency  # noqa: E402
from espalier.prune import Channels, remove_channels  # noqa: E402

CONVOLUTIONAL = ("torchvision/resnet18", "torchvision/resnet50", "torchvision/mobilenet_v2")
NETWORKS = (*CONVOLUTIONAL, "timm/vit_tiny_patch16_224")
QUICK = ("torchvision/resnet18", "torchvision/mobilenet_v2")
RUNTIMES = ("onnxruntime", "openvino")
SPARSITY, TOLERANCE = 0.5, 1e-3
CLAIMED = {"speedup_over_mac_ratio_at_least": 0.8}
"""The aim on convolutional networks; nothing is claimed for others."""


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """For one sample."""
    return macs(trace(model, (x,)), batch=1).total


def outputs(model: nn.Module) -> int:
    """Output channels of all convolutions and linear layers together."""
    return sum(p.shape[0] for p in model.parameters() if p.ndim > 1)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def difference(done: Exported, runtime: str) -> float:
    """Largest relative difference of the file from the eager model, over the batch sizes checked."""
    return max(check.difference for check in done.checks if check.runtime == runtime)


def spread(found: Latency) -> list[float]:
    """10th and 90th percentile."""
    return [round(found.p10_ms, 3), round(found.p90_ms, 3)]


def key(name: str, runtime: str, threads: int, multiple: int) -> str:
    return f"{name.partition('/')[2]}, {runtime}, {threads} threads, multiples of {multiple}"


def measure(name: str, wanted: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one network in the ``wanted`` runtimes."""
    model, x = importlib.import_module("benchmarks.zoo_parts.models").build(name)
    x = x[:1].contiguous()
    slim = remove_channels(
        model, (x,), sparsity=SPARSITY, pattern=Channels(measure="units", multiple=options.multiple)
    )  # fmt: skip
    sides = {"original": model, "pruned": slim.model}
    counts = {side: multiply_adds(each, x) for side, each in sides.items()}
    ratio = counts["original"] / counts["pruned"]
    repeats, seconds = (15, 8.0) if options.quick else (200, 30.0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {
            side: to_onnx(each, x, Path(folder) / f"{side}.onnx", runtime=wanted, tolerance=TOLERANCE)
            for side, each in sides.items()
        }
        for runtime in wanted:
            sessions = {
                side: runtimes.open(done.path, runtime, threads=options.threads).module()
                for side, done in files.items()
            }
            timed = latency(sessions, lambda each: each(x), repeats=repeats, warmup=5, seconds=seconds)
            speedup = timed["original"].median_ms / timed["pruned"].median_ms
            measured = {
                "macs": [counts["original"], counts["pruned"]], "mac_ratio": round(ratio, 3),
                "median_ms": [round(timed[side].median_ms, 3) for side in sides],
                "p10_p90_ms": [spread(timed[side]) for side in sides],
                "speedup": round(speedup, 3), "speedup_over_mac_ratio": round(speedup / ratio, 3),
                "speedup_p10": round(timed["original"].p10_ms / timed["pruned"].p10_ms, 3),
                "runs": timed["original"].runs,
                "export_difference": [difference(files[side], runtime) for side in sides],
                "removal_difference": slim.difference,
                "parameters": [parameters(each) for each in sides.values()],
                "output_channels": [outputs(each) for each in sides.values()],
            }  # fmt: skip
            setting = {
                "batch": 1, "input": list(x.shape[1:]), "threads": options.threads, "precision": "fp32",
                "sparsity": SPARSITY, "measure": "units", "multiple": options.multiple, "form": slim.kind,
                "runtime": f"{runtime} {runtimes.available()[runtime]}", "quick": options.quick,
            }  # fmt: skip
            rows.append(
                {
                    "id": "latency_channels", "row": key(name, runtime, options.threads, options.multiple),
                    "claimed": CLAIMED if name in CONVOLUTIONAL else {}, "measured": measured, "setting": setting,
                    "seed": 0,
                }
            )  # fmt: skip
            del sessions
    return rows


def present(path: Path) -> set[str]:
    """Names of the rows that are there."""
    return {row["row"] for row in json.loads(path.read_text())} if path.exists() else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two networks, few repeats")
    parser.add_argument("--threads", type=int, default=2, help="of each runtime")
    parser.add_argument("--multiple", type=int, default=8, help="channel counts are rounded to it")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=())
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    file = "latency_channels" + ("_quick" if options.quick else "")
    done = set() if options.again else present(RESULTS / f"{file}.json")
    for name in options.only or (QUICK if options.quick else NETWORKS):
        wanted = [r for r in RUNTIMES if key(name, r, options.threads, options.multiple) not in done]
        if not wanted:
            continue
        found = measure(name, wanted, options)
        save(file, found)
        for row in found:
            said = row["measured"]
            print(
                f"{row['row']:60} MACs / {said['mac_ratio']:.2f}  {said['median_ms'][0]:.2f} -> "
                f"{said['median_ms'][1]:.2f} ms  speed-up {said['speedup']:.2f} = "
                f"{said['speedup_over_mac_ratio']:.2f} x MAC ratio  (p10, p90 {said['p10_p90_ms']}, "
                f"differences {said['export_difference']})",
                flush=True,
            )


if __name__ == "__main__":
    main()
