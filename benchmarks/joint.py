"""Pruned and quantized in one training against one after the other: LeNet-5 on MNIST, test error at equal bytes.

python benchmarks/joint.py [--quick] [--seeds 3] [--data-dir DIR]

Both start from the same dense network and train for the same epochs, the masks global and growing on a cubic schedule,
the weights with learned steps (LSQ), first and last layer in 8 bits. ``joint``: recipes.prune-quantize. ``after``: half
of the epochs prune, half quantize what is left. Each is trained at several sparsities and two learning rates; of these
the one with the smaller mean error on val stands for the method. Bytes are the length of ``model.weights.espalier``,
loaded again and evaluated. The comparison interpolates each method's test error between its own points, over the
logarithm of the bytes, at the sizes that both have reached, seed by seed. Rows are kept: a second call goes on where
the first stopped.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import arguments, begin, kept, save, spread
from benchmarks.subjects import blind, dense, stored, task_of

from espalier.core.context import Context
from espalier.core.recipe import Recipe
from espalier.prune import Cubic, Global, Prune
from espalier.quantize import LSQ, Quantize
from espalier.recipes import PruneQuantize
from espalier.train import AdamW

FILE = "joint"
POINTS = 5


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    mode: str
    images: int
    judged: int
    dense_epochs: int
    epochs: int
    bits: tuple[int, ...]
    sparsities: tuple[float, ...]
    rates: tuple[float, ...]
    every: int
    batch: int = 128


QUICK = Setting("quick", 10_000, 5_000, 6, 12, (2,), (0.97, 0.985), (3e-3,), 10)
FULL = Setting("full", 55_000, 10_000, 8, 12, (2, 3), (0.97, 0.98, 0.985, 0.99), (1.5e-3, 3e-3), 20)


def recipe(name: str, sparsity: float, bits: int, lr: float, setting: Setting) -> Recipe:
    """The steps of one method."""
    alike: dict[str, Any] = {"lr": lr, "optimizer": AdamW(weight_decay=0.0)}
    quantize = Quantize(weights=LSQ(), bits=bits)
    if name == "joint":
        step = PruneQuantize(
            strength=None, sparsity=sparsity, quantize=quantize, scope=Global(), schedule=Cubic(end=0.5),
            every=setting.every, epochs=setting.epochs, **alike,
        )  # fmt: skip
        return Recipe(steps=(step,))
    half = setting.epochs // 2
    prune = Prune(sparsity=sparsity, scope=Global(), schedule=Cubic(), every=setting.every, epochs=half, **alike)
    return Recipe(steps=(prune, quantize.replace(epochs=setting.epochs - half, **alike)))


def error_at(points: Sequence[Mapping[str, Any]], length: float) -> float:
    """The test error between the two points (``bytes``, ``test_error``) around ``length``, linear in log bytes."""
    ordered = sorted((math.log(point["bytes"]), point["test_error"]) for point in points)
    at = math.log(length)
    for (x0, y0), (x1, y1) in itertools.pairwise(ordered):
        if x0 <= at <= x1:
            return float(y0 if x0 == x1 else y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    raise ValueError(f"{length:.0f} bytes lie outside the points")


def at_equal_bytes(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Both errors at ``POINTS`` sizes, evenly spaced in log bytes where both have points; empty where none overlap."""
    low = max(min(point["bytes"] for point in points) for points in (ours, theirs))
    high = min(max(point["bytes"] for point in points) for points in (ours, theirs))
    if low > high:
        return []
    sizes = [min(high, low * (high / low) ** (n / (POINTS - 1))) for n in range(POINTS)]
    return [{"bytes": s, "ours": error_at(ours, s), "theirs": error_at(theirs, s)} for s in sizes]


def compare(rows: Mapping[str, Mapping[int, list[dict[str, Any]]]], ours: str, theirs: str) -> dict[str, Any]:
    """``theirs`` less ``ours`` in points of test error at equal bytes: positive where ours is ahead."""
    seeds = sorted(set(rows[ours]) & set(rows[theirs]))
    curves = {seed: at_equal_bytes(rows[ours][seed], rows[theirs][seed]) for seed in seeds}
    gains = [statistics.mean(p["theirs"] - p["ours"] for p in curve) for curve in curves.values() if curve]
    return {"curves": curves, **({"ahead_by": spread(gains)} if gains else {})}


def best(found: Mapping[tuple[str, float], Mapping[int, list[dict[str, Any]]]], name: str) -> float:
    """The learning rate with which the method has the smaller mean error on val."""
    rates = {lr: statistics.mean(p["val_error"] for points in seeds.values() for p in points)
             for (method, lr), seeds in found.items() if method == name}  # fmt: skip
    return min(rates, key=lambda lr: rates[lr])


def main() -> None:
    """Parse and run."""
    given = arguments(__doc__).parse_args()
    folder = begin(given)
    setting = QUICK if given.quick else FULL
    found: dict[int, dict[tuple[str, float], dict[int, list[dict[str, Any]]]]] = {bits: {} for bits in setting.bits}
    for seed in range(given.seeds):
        model, task = None, task_of("lenet5", setting.images, setting.judged, folder, seed, setting.batch)
        for bits in setting.bits:
            for name in ("joint", "after"):
                for lr in setting.rates:
                    for sparsity in setting.sparsities:
                        row = f"{setting.mode}, {bits} bits, {sparsity:.1%}, lr {lr:g}, seed {seed}"
                        measured = kept(FILE, vars(setting)).get((name, row))
                        if measured is None:
                            model = model or dense("lenet5", setting.dense_epochs, blind(task), folder, seed)
                            started = time.process_time()
                            steps = recipe(name, sparsity, bits, lr, setting)
                            result = steps(model, Context(task=blind(task), seed=seed))
                            seconds = round(time.process_time() - started, 1)
                            measured = {**stored(result, model, task), "cpu_seconds": seconds}
                            print(f"{name:6} {row:44} {measured}", flush=True)
                            save(FILE, [{"id": name, "row": row, "claimed": {}, "measured": measured, "seed": seed,
                                         "setting": {**vars(setting), "threads": given.threads}}])  # fmt: skip
                        found[bits].setdefault((name, lr), {}).setdefault(seed, []).append(measured)
    for bits, table in found.items():
        rates = {name: best(table, name) for name in ("joint", "after")}
        result = compare({name: table[name, lr] for name, lr in rates.items()}, "joint", "after")
        print(f"{bits} bits, joint against after: {result.get('ahead_by', 'no sizes in common')}", flush=True)
        save(FILE, [{
            "id": "recipes.prune-quantize", "row": f"{setting.mode}, {bits} bits, against one after the other",
            "claimed": {}, "measured": {**result, "rates": rates}, "seed": list(range(given.seeds)),
            "setting": {**vars(setting), "threads": given.threads},
        }])  # fmt: skip


if __name__ == "__main__":
    main()
