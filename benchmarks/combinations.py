"""Which steps combine: LeNet-5 and ResNet-20 at 1/20 and 1/40 of their bytes, each step alone, in pairs, in chains.

python benchmarks/combinations.py [--quick] [--network lenet5|resnet20] [--seeds 3] [--only NAME ...] [--data-dir DIR]

The steps, always in this order: ``factorize`` (Tucker-2 for convolutions, SVD for matrices, ranks by one budget),
``prune`` (global magnitude, gradual), then ``share`` (k-means) or ``quantize`` (learned steps; 2 bits: ternary, 1 bit:
binary), and ``code`` (adaptive range coding in the file; without it, integers are packed or deflated, whichever is
smaller). ``share + quantize`` puts the shared values into 8 bits. Every combination starts from the same dense network
and trains for the same epochs, divided evenly among its steps.

Equal bytes: of each combination one number is free, the sparsity, the share of parameters that the ranks keep, or the
bits; before any training it is set by bisection so that the file of the network, its steps taken at once, is just not
larger than the target; bits are whole, so those files may be a good deal smaller. Where the training moves the bytes
by more than 2 %, the number is set once more for as much less, and the training done again. What cannot become so
small is recorded with the smallest file there is. Bytes are the length of ``model.weights.espalier`` after the
training, loaded again and evaluated. Rows are kept: a second call goes on where the first stopped.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import arguments, begin, kept, save
from benchmarks.subjects import blind, dense, stored, task_of, training

import espalier as es
from espalier import encode
from espalier.core.context import Context
from espalier.core.method import Technique
from espalier.core.recipe import Recipe
from espalier.factorize import Budget, Tucker
from espalier.measure import fp32_safetensors_bytes
from espalier.prune import Cubic, Global, Prune
from espalier.quantize import BWN, LSQ, TWN, Affine, Quantize
from espalier.runs.files import freeze_model
from espalier.share import KMeans
from espalier.train import AdamW, Finetune

FILE = "combinations"
Free = Literal["sparsity", "keep", "bits", ""]
HALVINGS = 9
ATTEMPTS, CLOSE = 2, 0.02
"""Trainings at most, and how near to the target the bytes are near enough: training may move what the file codes."""


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    network: str
    mode: str
    images: int
    judged: int
    dense_epochs: int
    epochs: int
    every: int
    ratios: tuple[int, ...] = (20, 40)
    batch: int = 128


SETTINGS = {
    ("lenet5", True): Setting("lenet5", "quick", 10_000, 5_000, 6, 6, 10, (40,)),
    ("lenet5", False): Setting("lenet5", "full", 55_000, 10_000, 8, 9, 20),
    ("resnet20", True): Setting("resnet20", "quick", 5_000, 2_500, 3, 3, 5, (20,)),
    ("resnet20", False): Setting("resnet20", "full", 45_000, 10_000, 10, 30, 20),
}


@dataclass(frozen=True)
class Combination:
    """Steps, the one number that is free, and what the others are set to."""

    steps: tuple[str, ...]
    free: Free
    keep: float = 0.5
    bits: int = 4

    @property
    def name(self) -> str:
        """The row of the table."""
        return " + ".join(self.steps)

    @property
    def coders(self) -> tuple[str, ...]:
        """Of the file."""
        return ("adaptive",) if "code" in self.steps else ("packed",)


COMBINATIONS = (
    Combination((), ""),
    Combination(("factorize",), "keep"),
    Combination(("prune",), "sparsity"),
    Combination(("share",), "bits"),
    Combination(("quantize",), "bits"),
    Combination(("code",), ""),
    Combination(("factorize", "prune"), "sparsity"),
    Combination(("factorize", "share"), "keep"),
    Combination(("factorize", "quantize"), "keep"),
    Combination(("factorize", "code"), "keep"),
    Combination(("prune", "share"), "sparsity"),
    Combination(("prune", "quantize"), "sparsity"),
    Combination(("prune", "code"), "sparsity"),
    Combination(("share", "quantize"), "bits"),
    Combination(("share", "code"), "bits"),
    Combination(("quantize", "code"), "bits"),
    Combination(("prune", "share", "code"), "sparsity"),
    Combination(("prune", "quantize", "code"), "sparsity"),
    Combination(("factorize", "prune", "share", "code"), "sparsity", keep=0.75),
    Combination(("factorize", "prune", "quantize", "code"), "sparsity", keep=0.75),
)


def recipe(combination: Combination, free: float, setting: Setting, *, trained: bool) -> Recipe:
    """The steps with the free number set; not ``trained``: all at once."""
    keep = free if combination.free == "keep" else combination.keep
    bits = round(free) if combination.free == "bits" else combination.bits
    named = [step for step in combination.steps if step != "code"]
    parts = ["share"] if named == ["share", "quantize"] else named  # what trains
    epochs = dict.fromkeys(parts, 0)
    if trained:
        epochs = {step: (setting.epochs + n) // len(parts) for n, step in enumerate(parts)}
    steps: list[Technique] = []
    for step in named:
        steps += _steps(step, keep, free, bits, epochs.get(step, 0), setting, after_share="share" in named)
    return Recipe(steps=tuple(steps))


def _steps(
    step: str, keep: float, sparsity: float, bits: int, epochs: int, setting: Setting, *, after_share: bool
) -> list[Technique]:  # fmt: skip
    alike = training(setting.network, epochs)
    single = {name: value for name, value in alike.items() if name != "precision"}  # bf16 would round once more
    if step == "factorize":
        rank = Budget(keep=keep)
        tune = [Finetune(**alike)] if epochs else []
        return [Tucker(rank=rank, others="svd"), *tune]
    if step == "prune":
        at_once = Prune(sparsity=sparsity, scope=Global())
        return [at_once.replace(schedule=Cubic(), every=setting.every, **alike) if epochs else at_once]
    if step == "share":  # a shared value gets the sum of many gradients, which plain descent does not bear
        tune = [Finetune(epochs=epochs, lr=5e-4, optimizer=AdamW(weight_decay=0.0), reestimate=True)] if epochs else []
        return [KMeans(bits=bits), *tune]
    if after_share:
        return [Quantize(weights=Affine(), bits=8, ends="same")]
    method = {1: BWN(), 2: TWN()}.get(bits, LSQ())
    at_once = Quantize(weights=method, bits=bits, ends="same")
    return [at_once.replace(**single) if epochs else at_once]


def length(combination: Combination, free: float, model: nn.Module, setting: Setting) -> int:
    """Bytes of the file with the steps taken at once."""
    result = recipe(combination, free, setting, trained=False)(model, Context())
    frozen = freeze_model(result, None)
    return len(
        encode.encode(
            frozen.tensors, aliases=frozen.aliases, plans=frozen.plan.to_json(), coders=combination.coders,
            floats="fp16",
        )
    )  # fmt: skip


def fitted(combination: Combination, model: nn.Module, setting: Setting, target: float) -> tuple[float, int] | int:
    """The free number and the bytes just below ``target``; the smallest length where none is that small."""
    if combination.free in ("", "bits"):
        tried = {
            bits: length(combination, bits, model, setting) for bits in (range(8, 0, -1) if combination.free else (0,))
        }
        fitting = [(bits, size) for bits, size in tried.items() if size <= target]
        return max(fitting) if fitting else min(tried.values())
    low, high = 0.0, 0.999  # of what is taken away
    flip = combination.free == "keep"

    def size_at(taken: float) -> int:
        return length(combination, 1 - taken if flip else taken, model, setting)

    found = size_at(high)
    if found > target:
        return found
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        size = size_at(middle)
        low, high, found = (low, middle, size) if size <= target else (middle, high, found)
    return 1 - high if flip else high, found


def measured(
    combination: Combination, model: nn.Module, task: es.Task, setting: Setting, target: float, seed: int
) -> Any:
    """One row."""
    if not combination.free:
        return {**stored(model, model, task, combination.coders), "target": target}
    row: dict[str, Any] = {}
    aim, started = target, time.process_time()
    for _ in range(ATTEMPTS):
        found = fitted(combination, model, setting, aim)
        if isinstance(found, int):
            row = row or {"out_of_reach": True, "smallest": found, "target": target}
            break
        free, before = found
        result = recipe(combination, free, setting, trained=True)(model, Context(task=blind(task), seed=seed))
        row = {combination.free: free, "target": target, "bytes_before_training": before,
               **stored(result, model, task, combination.coders)}  # fmt: skip
        if combination.free == "bits" or abs(row["bytes"] / target - 1) <= CLOSE:
            break
        aim *= target / row["bytes"]
    return row if "out_of_reach" in row else {**row, "cpu_seconds": round(time.process_time() - started, 1)}


def main() -> None:
    """Parse and run; what fails is said, and the others go on."""
    parser = arguments(__doc__)
    parser.add_argument("--network", choices=("lenet5", "resnet20"), default="lenet5")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these combinations, such as 'prune + code'")
    given = parser.parse_args()
    folder = begin(given)
    setting = SETTINGS[given.network, given.quick]
    failed: list[str] = []
    for seed in range(given.seeds):
        model, task = None, task_of(setting.network, setting.images, setting.judged, folder, seed, setting.batch)
        for combination in COMBINATIONS:
            name = combination.name or "nothing"
            if name not in (given.only or [name]):
                continue
            for ratio in setting.ratios if combination.free else setting.ratios[:1]:
                goal = f"1/{ratio}" if combination.free else "as it is"
                row = f"{setting.network}, {setting.mode}, {goal}, seed {seed}"
                if (name, row) in kept(FILE, vars(setting)):
                    continue
                model = model or dense(setting.network, setting.dense_epochs, blind(task), folder, seed)
                try:
                    found = measured(combination, model, task, setting, fp32_safetensors_bytes(model) / ratio, seed)
                except Exception:
                    failed.append(f"{name} ({row})")
                    print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
                    continue
                print(f"{name:38} {row:38} {found}", flush=True)
                fields = {"keep": combination.keep, "bits": combination.bits, "free": combination.free}
                described = {**vars(setting), "threads": given.threads, "fields": fields}
                save(FILE, [{"id": name, "row": row, "claimed": {}, "measured": found, "setting": described,
                             "seed": seed}])  # fmt: skip
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
