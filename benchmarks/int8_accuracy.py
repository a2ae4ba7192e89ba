"""What int8 costs in accuracy, with real weights: our files beside those of NNCF and of onnxruntime's own tool.

python benchmarks/int8_accuracy.py [--quick] [--seeds 5] [--networks NAME ...] [--variants NAME ...] [--again]

ResNet-20 and -56 on the 1,017 lossless CIFAR-10 test images, SqueezeNet v1.0 on the 500 test images of the fixed split
of 1,000 ImageNet images. Ours is ``quantize.ptq-int8`` as it is by default, then ``to_int8`` with those codes and
grids, for OpenVINO and for onnxruntime. The others quantize our fp32 export: ``nncf.quantize`` (default preset) and
``quantize_static`` (QDQ, U8S8, per channel, smallest and largest value). Within a seed all of them calibrate on the
same images: 300 training images of CIFAR-10, 150 of the 200 calibration images of ImageNet (so seeds share most).

One row per network, tool and seed, then one per comparison: means over the seeds, and the bootstrap interval over
images of the difference in accuracy (each image's answers averaged over the seeds first). ``lost`` and ``gained`` are
the images that changed against fp32, so that any two rows can be paired later. ``minus_memory`` is the file's accuracy
less that of the quantized model in torch; the other tools quantize a file and have no such model. ``val_sqnr_db`` is on
images held apart (training images of CIFAR-10, the 300 val images of ImageNet): choose by that, not by the test images.
``--variants`` adds our other settings. Rows in results/int8_accuracy.json are kept (``--again`` measures them anew).
``--quick``: two seeds, the same rows. The environment: see int8_requirements.txt.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402 - the thread counts above must be set first
import torch  # noqa: E402
from benchmarks.common import RESULTS, save  # noqa: E402
from benchmarks.int8_latency import nncf, static  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import espalier as es  # noqa: E402
from espalier.compact import load_pretrained, resnet20, resnet56  # noqa: E402
from espalier.core.context import Context  # noqa: E402
from espalier.data import Loader, Normalisation, cifar10  # noqa: E402
from espalier.deploy import runtimes, to_int8, to_onnx  # noqa: E402
from espalier.deploy.int8 import this_processor  # noqa: E402
from espalier.measure.pairing import summarise  # noqa: E402
from espalier.quantize import Entropy, Equalise, Mse, Percentile, PTQInt8  # noqa: E402

NAME = "int8_accuracy"
BATCHES = 8
"""Of the calibration: what ptq-int8 looks at by default."""
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "mse": {"observer": Mse()},
    "percentile": {"observer": Percentile()},
    "entropy": {"observer": Entropy()},
    "equalised": {"equalise": Equalise()},
    "uncorrected": {"correct": None},
}
"""Settings of ours; the first is the default."""
AIM = {"below_nncf_at_most": 0.5, "below_fp32_at_most": 0.3, "sqnr_db_at_least": 25, "minus_memory_at_most": 0.3}
CIFAR = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


# --- networks and images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Inputs as the network takes them, and their labels."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.x[rows], self.y[rows])

    def batches(self, size: int) -> Sequence[Tensor]:
        return torch.split(self.x, size)


@dataclass(frozen=True)
class Network:
    """``pool`` is drawn from for calibration, ``drawn`` images a seed; ``val`` and ``test`` overlap with nothing."""

    model: nn.Module
    pool: Images
    drawn: int
    val: Images
    test: Images
    published: dict[str, float]

    def calibration(self, seed: int) -> Images:
        order = torch.randperm(len(self.pool.x), generator=torch.Generator().manual_seed(seed))
        return self.pool[order[: self.drawn]]


class Fire(nn.Module):
    """A narrow convolution, then two wide ones side by side."""

    def __init__(self, channels: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(channels, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze1x1(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet v1.0 (Iandola et al. 2016, arXiv:1602.07360) with the names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv10 = nn.Conv2d(3, 96, 7, 2), nn.Conv2d(512, 1000, 1, padding=1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        for number, sizes in enumerate(
            ((96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192), (384, 48, 192),
             (384, 64, 256), (512, 64, 256)), 2,
        ):  # fmt: skip
            self.add_module(f"fire{number}", Fire(*sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        for number in range(2, 10):
            x = self.get_submodule(f"fire{number}")(x)
            x = self.pool(x) if number in (4, 8) else x
        return F.relu(self.conv10(x)).mean((2, 3))


def resnet(build: Callable[[], Any], file: str, published: float, folder: Path) -> Network:
    """Of the training images the first 500 of a fixed order are val: the network knows them, so for SQNR only."""
    model = load_pretrained(build(), folder / "cifar10_resnets" / file).eval()
    train, test = (Images(CIFAR(part.images), part.labels) for part in cifar10(folder, variant="lossless"))
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
    return Network(model, train[order[500:]], 300, train[order[:500]], test, {"accuracy": published})


def squeezenet(folder: Path) -> Network:
    """The fixed split of the 1,000 images: 200 to calibrate on, 300 val, 500 test."""
    from PIL import Image

    model = SqueezeNet().eval()
    weights = folder / "imagenet_squeezenet" / "squeezenet_v1_0_dc.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    with np.load(folder / "imagenet_1000" / "images_256.npz", allow_pickle=False) as arrays:
        packed, offsets, labels = (arrays[name] for name in ("jpeg", "offsets", "labels"))
    raw, means = packed.tobytes(), np.array([104, 117, 123], np.float32)
    x = np.empty((len(labels), 3, 227, 227), np.float32)
    for row, (start, end) in enumerate(pairwise(offsets)):
        image = np.asarray(Image.open(io.BytesIO(raw[start:end])).convert("RGB"), np.float32)
        x[row] = (image[14:241, 14:241, ::-1] - means).transpose(2, 0, 1)
    every = Images(torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64)))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return Network(model, every[order[:200]], 150, every[order[200:500]], every[order[500:]], {})


NETWORKS: dict[str, Callable[[Path], Network]] = {
    "resnet20": lambda folder: resnet(resnet20, "resnet20-12fca82f.th", 91.64, folder),
    "resnet56": lambda folder: resnet(resnet56, "resnet56-4bfd9763.th", 92.72, folder),
    "squeezenet": squeezenet,
}


# --- one measurement -------------------------------------------------------------------------------------------------


def logits(call: Callable[[Tensor], Any], images: Images, size: int = 25) -> np.ndarray:
    """Outputs for all images, one row each."""
    with torch.no_grad():
        return np.concatenate([np.asarray(call(batch)) for batch in images.batches(size)])


def in_runtime(file: Path, runtime: str) -> Callable[[Tensor], Any]:
    """A file as a function."""
    session = runtimes.open(file, runtime, threads=1)
    return lambda batch: session.run([np.ascontiguousarray(batch.numpy())])[0]


def sqnr(wanted: np.ndarray, got: np.ndarray) -> float:
    """dB over all images together."""
    noise = float(((wanted.astype(np.float64) - got) ** 2).sum())
    return round(float(10 * np.log10((wanted.astype(np.float64) ** 2).sum() / max(noise, 1e-30))), 2)


def right(found: np.ndarray, images: Images, top: int = 1) -> np.ndarray:
    """1.0 for each image whose label is among the ``top`` largest outputs."""
    best = torch.from_numpy(found).topk(top).indices
    return (best == images.y[:, None]).any(1).double().numpy()


def joined(rows: Iterable[Any]) -> str:
    """Numbers of images as text: one line in the file."""
    return " ".join(str(int(row)) for row in rows)


def bits_of(text: str, count: int) -> np.ndarray:
    """The reverse: 1.0 at each number."""
    found = np.zeros(count)
    found[[int(number) for number in text.split()]] = 1.0
    return found


def bytes_of(file: Path) -> int:
    """With the weights beside an OpenVINO file."""
    beside = file.with_suffix(".bin")
    return file.stat().st_size + (beside.stat().st_size if file.suffix == ".xml" and beside.exists() else 0)


class Bench:
    """One network: what is there, what is asked for, and what fp32 says."""

    def __init__(self, name: str, folder: Path, *, again: bool) -> None:
        self.name, self.folder, self.again = name, folder, again
        self.processor = str(this_processor())
        self.there = set() if again else {row["row"] for row in rows()}

    @cached_property
    def network(self) -> Network:
        return NETWORKS[self.name](self.folder)

    @cached_property
    def fp32(self) -> dict[str, np.ndarray]:
        """Outputs of the original for val and test."""
        return {part: logits(self.network.model, getattr(self.network, part)) for part in ("val", "test")}

    def wanted(self, tool: str, seed: int | None) -> bool:
        """Whether a row is missing."""
        return self.key(tool, seed) not in self.there

    def key(self, tool: str, seed: int | None) -> str:
        return f"{self.name}, {tool}" + ("" if seed is None else f", seed {seed}")

    def save(self, tool: str, seed: int | None, measured: dict[str, Any], started: float, runtime: str = "") -> None:
        """One row, said and written."""
        network = self.network
        measured["seconds"] = round(time.perf_counter() - started, 1)
        setting = {
            "network": self.name, "tool": tool, "calibration": network.drawn, "of": len(network.pool.x),
            "test": len(network.test.x), "val": len(network.val.x), "processor": self.processor,
            "runtime": f"{runtime} {runtimes.available()[runtime]}" if runtime else "torch",
        }  # fmt: skip
        claimed = dict(network.published) if seed is None else AIM if tool.startswith("ours") else {}
        row = {"id": NAME, "row": self.key(tool, seed), "claimed": claimed, "measured": measured,
               "setting": setting, "seed": seed}  # fmt: skip
        save(NAME, [row])
        shown = {key: value for key, value in measured.items() if key not in ("lost", "gained", "wrong", "coverage")}
        print(f"{row['row']:46} {shown}", flush=True)

    def judged(self, call: Callable[[Tensor], Any]) -> tuple[dict[str, Any], np.ndarray]:
        """Accuracy, images that changed and SQNR of one candidate, and its test outputs."""
        found, val = logits(call, self.network.test), logits(call, self.network.val)
        test, before = self.network.test, right(self.fp32["test"], self.network.test)
        after = right(found, test)
        lost, gained = np.flatnonzero(before > after), np.flatnonzero(after > before)
        paired = summarise(100 * (before - after))
        measured = {
            "accuracy": round(100 * float(after.mean()), 3), "below_fp32": round(paired.drop, 3),
            "interval": [round(paired.low, 3), round(paired.high, 3)], "discordant": len(lost) + len(gained),
            "other_answer": int((found.argmax(1) != self.fp32["test"].argmax(1)).sum()),
            "sqnr_db": sqnr(self.fp32["test"], found), "val_sqnr_db": sqnr(self.fp32["val"], val),
        }  # fmt: skip
        if found.shape[1] > 10:
            measured["top5"] = round(100 * float(right(found, test, 5).mean()), 3)
            measured["val_accuracy"] = round(100 * float(right(val, self.network.val).mean()), 3)
        return {**measured, "lost": joined(lost), "gained": joined(gained)}, found

    def baseline(self, folder: Path) -> Path:
        """The fp32 export, and the row of the original."""
        file = folder / "fp32.onnx"
        to_onnx(self.network.model, self.network.test.x[:2], file, tolerance=1e-3)
        if self.wanted("fp32", None):
            started = time.perf_counter()
            test = self.network.test
            hits = right(self.fp32["test"], test)
            measured: dict[str, Any] = {
                "accuracy": round(100 * float(hits.mean()), 3),
                "bytes": bytes_of(file),
                "wrong": joined(np.flatnonzero(hits == 0)),
            }
            if self.fp32["test"].shape[1] > 10:
                measured["top5"] = round(100 * float(right(self.fp32["test"], test, 5).mean()), 3)
                measured["val_accuracy"] = round(100 * float(right(self.fp32["val"], self.network.val).mean()), 3)
            self.save("fp32", None, measured, started)
        return file

    def ours(self, seed: int, variant: str, targets: Sequence[str], folder: Path) -> None:
        """The model in torch after ptq-int8, and its files."""
        names = {target: f"ours{f' ({variant})' if variant else ''}, {target}" for target in ("torch", *targets)}
        missing = [target for target, tool in names.items() if self.wanted(tool, seed)]
        if not missing:
            return
        started = time.perf_counter()
        images = self.network.calibration(seed)
        loader = Loader(images.x, images.y, batch_size=-(-len(images.x) // BATCHES))
        step = PTQInt8(batches=BATCHES, **VARIANTS[variant])
        model = step(self.network.model, Context(task=es.tasks.classification(loader), seed=seed))
        measured, in_memory = self.judged(model)
        if "torch" in missing:
            self.save(names["torch"], seed, measured, started)
        for target in missing:
            if target == "torch":
                continue
            started = time.perf_counter()
            file = folder / f"ours{'.xml' if target == 'openvino' else '.onnx'}"
            done = to_int8(
                model, self.network.test.x[:2], loader_inputs(loader), file, runtime=target,
                observer=step.observer.streaming, reference=self.network.model,
            )  # fmt: skip
            found, answers = self.judged(in_runtime(file, target))
            found["minus_memory"] = round(found["accuracy"] - measured["accuracy"], 3)
            found["sqnr_db_to_memory"] = sqnr(in_memory, answers)
            found |= {"bytes": bytes_of(file), "coverage": str(done.coverage)}
            self.save(names[target], seed, found, started, target)

    def theirs(self, seed: int, tool: str, runtime: str, fp32: Path, folder: Path) -> None:
        """The runtime's own tool on our fp32 export."""
        label = f"{tool}, {runtime}"
        if not self.wanted(label, seed):
            return
        started = time.perf_counter()
        images = self.network.calibration(seed)
        file = folder / f"theirs{'.xml' if runtime == 'openvino' else '.onnx'}"
        single = tool == "nncf"  # counts items of its data set as samples
        size = 1 if single else -(-len(images.x) // BATCHES)
        (nncf if single else static)(fp32, list(images.batches(size)), file, self.name)
        found, _ = self.judged(in_runtime(file, runtime))
        self.save(label, seed, {**found, "minus_memory": None, "bytes": bytes_of(file)}, started, runtime)


def loader_inputs(loader: Loader) -> Iterable[Tensor]:
    """The images of each batch."""
    return (x for x, _ in loader)


# --- comparisons -----------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """What is in the file."""
    path = RESULTS / f"{NAME}.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def compared(name: str) -> list[dict[str, Any]]:
    """Of one network: each tool over its seeds against fp32, and ours against the others on the seeds both have."""
    found = {row["row"]: row for row in rows() if row["setting"].get("network") == name}
    base = found.get(f"{name}, fp32")
    if base is None:
        return []
    count = base["setting"]["test"]
    before = 1 - bits_of(base["measured"]["wrong"], count)
    by_tool: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found.values():
        if row["seed"] is not None:
            by_tool.setdefault(row["setting"]["tool"], {})[row["seed"]] = row["measured"]
    hits = {
        tool: {
            seed: before - bits_of(measured["lost"], count) + bits_of(measured["gained"], count)
            for seed, measured in seeds.items()
        }
        for tool, seeds in by_tool.items()
    }
    made = []
    for tool, seeds in by_tool.items():
        values = list(seeds.values())
        measured = {**_difference([before] * len(seeds), list(hits[tool].values())), **_over_seeds(values)}
        made.append(_comparison(name, tool, "fp32", sorted(seeds), measured))
    for one, other in (
        ("ours, openvino", "nncf, openvino"), ("ours, onnxruntime", "nncf, openvino"),
        ("ours, onnxruntime", "quantize_static, onnxruntime"),
    ):  # fmt: skip
        both = sorted(by_tool.get(one, {}).keys() & by_tool.get(other, {}).keys())
        if both:
            measured = _difference([hits[other][seed] for seed in both], [hits[one][seed] for seed in both])
            ours, theirs = (mean(by_tool[tool][seed]["sqnr_db"] for seed in both) for tool in (one, other))
            measured["sqnr_db_ahead"] = round(ours - theirs, 2)
            made.append(_comparison(name, one, other, both, measured))
    return made


def _difference(before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, Any]:
    """Points by which ``after`` is below ``before``: mean, 95 % interval over images, and images that changed."""
    paired = summarise(100 * (np.mean(before, 0) - np.mean(after, 0)))
    changed = [int((one != other).sum()) for one, other in zip(before, after, strict=True)]
    each = [round(100 * float((one - other).mean()), 3) for one, other in zip(before, after, strict=True)]
    return {
        "below": round(paired.drop, 3), "interval": [round(paired.low, 3), round(paired.high, 3)],
        "below_by_seed": each, "discordant_by_seed": changed,
        "lost_by_seed": [int((one > other).sum()) for one, other in zip(before, after, strict=True)],
    }  # fmt: skip


def _over_seeds(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and the standard deviation over seeds where there are several."""
    accuracies = [value["accuracy"] for value in values]
    found: dict[str, Any] = {
        "accuracy": round(mean(accuracies), 3),
        "accuracy_sd": round(stdev(accuracies), 3) if len(accuracies) > 1 else None,
        "sqnr_db": round(mean(value["sqnr_db"] for value in values), 2),
        "sqnr_db_least": min(value["sqnr_db"] for value in values),
        "val_sqnr_db": round(mean(value["val_sqnr_db"] for value in values), 2),
    }
    if "top5" in values[0]:
        found["top5"] = round(mean(value["top5"] for value in values), 3)
        found["val_accuracy"] = round(mean(value["val_accuracy"] for value in values), 3)
    if "bytes" in values[0]:
        found["bytes"] = round(mean(value["bytes"] for value in values))
    if values[0].get("minus_memory") is not None:
        found["minus_memory"] = round(mean(value["minus_memory"] for value in values), 3)
        found["minus_memory_by_seed"] = [value["minus_memory"] for value in values]
    return found


def _comparison(name: str, one: str, other: str, seeds: list[int], measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{NAME}_compared", "row": f"{name}: {one} against {other}", "claimed": AIM if one in OURS else {},
        "measured": measured, "setting": {"compared": name, "one": one, "other": other, "seeds": seeds}, "seed": None,
    }  # fmt: skip


OURS = ("ours, openvino", "ours, onnxruntime")


def said(row: dict[str, Any]) -> str:
    """A comparison in one line."""
    measured = row["measured"]
    low, high = measured["interval"]
    text = f"{row['row']:70} below by {measured['below']:+.2f} [{low:+.2f}, {high:+.2f}]"
    text += f"  discordant {measured['discordant_by_seed']}"
    if "accuracy" in measured:
        text += f"  {measured['accuracy']:.2f} +- {measured['accuracy_sd'] or 0:.2f} %  {measured['sqnr_db']:.1f} dB"
    return text


# --- the whole -------------------------------------------------------------------------------------------------------


def installed() -> dict[str, bool]:
    """Packages; says which rows are left out for want of one."""
    there = {name: importlib.util.find_spec(name) is not None for name in ("openvino", "onnxruntime", "nncf")}
    without = {"openvino": "ours in OpenVINO, and NNCF", "onnxruntime": "quantize_static, and ours in onnxruntime",
               "nncf": "NNCF"}  # fmt: skip
    for name, has in there.items():
        if not has:
            print(f"{name} is not installed, so there will be no rows of {without[name]}: see int8_requirements.txt")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)}: not installed, and every tool starts from the fp32 export, which needs it"
        )
    return there


def run(options: argparse.Namespace, folder: Path) -> None:
    """All rows that are not there yet."""
    there = installed()
    targets = [name for name in ("openvino", "onnxruntime") if there[name]]
    tools = [("nncf", "openvino")] if there["nncf"] and there["openvino"] else []
    tools += [("quantize_static", "onnxruntime")]
    for name in options.networks:
        bench = Bench(name, folder, again=options.again)
        labels = [f"{tool}, {runtime}" for tool, runtime in tools]
        labels += [f"ours{f' ({v})' if v else ''}, {t}" for v in ("", *options.variants) for t in ("torch", *targets)]
        left = [(label, seed) for seed in range(options.seeds) for label in labels if bench.wanted(label, seed)]
        if left or bench.wanted("fp32", None):
            with tempfile.TemporaryDirectory() as place:
                fp32 = bench.baseline(Path(place))
                for seed in range(options.seeds):
                    for tool, runtime in tools:
                        bench.theirs(seed, tool, runtime, fp32, Path(place))
                    for variant in ("", *options.variants):
                        bench.ours(seed, variant, targets, Path(place))
                    gc.collect()
        found = compared(name)
        save(NAME, found)
        print("\n".join(said(row) for row in found), flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two calibration seeds")
    parser.add_argument("--seeds", type=int, default=5, help="calibration seeds")
    parser.add_argument("--networks", nargs="*", choices=tuple(NETWORKS), default=tuple(NETWORKS))
    parser.add_argument("--variants", nargs="*", choices=[name for name in VARIANTS if name], default=())
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--data-dir", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.seeds = min(options.seeds, 2)
    folder = options.data_dir or Path(
        os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(options, folder)


if __name__ == "__main__":
    main()
