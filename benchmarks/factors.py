"""Layers as products of smaller ones, at 2 and 4 times fewer bytes: the error before and after fine-tuning.

python benchmarks/factors.py [--quick] [--only WORD ...] [--again] [--seed 0] [--data-dir DIR]

The networks, their training, the files and how they are judged are those of benchmarks/structured.py, whose rows of
shared weights these stand beside: the same ids of rows, the same fine-tuning. Every method keeps the largest share of
the numbers with which the fp32 file, loaded again, is 2 or 4 times shorter than the network's; ``reached`` is false
where no share does. Ranks come from one budget for the network; in rows of equal shares from each layer alone. SVD
splits what a method does not. Rows in results/factors.json are kept (``--again`` measures them anew); ``--quick`` has a
file of its own.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.structured import FACTORS, FULL, QUICK, About, Entry, Job, dense_row, filed, fitting, measure, subject
from torch import nn

import espalier.factorize as f
from espalier.core.context import Context
from espalier.core.method import Technique

BATCHES = 8


def at(method: f.Factorization, rule: type[f.Budget] | type[f.Ratio] = f.Budget) -> Callable[[float], Technique]:
    """The method at a share of the numbers; what it does not split by SVD."""
    return lambda keep: method.replace(rank=rule(keep=keep), others="svd")


CONVOLUTIONS = (
    f.ChannelSVD(),
    f.SpatialSVD(),
    f.Tucker(),
    f.CP(starts=1, sweeps=50),
    f.BasisFilters(),
    f.TensorTrain(),
)
ENTRIES = (
    *(Entry(method.name, method.id, at(method), networks=("lenet5", "resnet20")) for method in CONVOLUTIONS),
    Entry("factorize.svd", "svd", at(f.SVD()), networks=("stories260K",)),
    Entry("factorize.ratio", "channel-svd, equal shares", at(f.ChannelSVD(), f.Ratio)),
    Entry("factorize.autoencoder", "autoencoder of the outputs", at(f.Autoencoder(batches=BATCHES))),
    Entry("factorize.autoencoder", "autoencoder with a ReLU", at(f.Autoencoder(hidden="relu", batches=BATCHES))),
    Entry("factorize.activation-aware-svd", "activation-aware", at(f.ActivationAwareSVD(batches=BATCHES))),
)


def trained_low(keep: float, epochs: int) -> Technique:
    """Truncated while it trains; with no epochs the same sizes without the training."""
    return f.LowRankTraining(epochs=epochs, form="truncated", rank=f.Budget(keep=keep), lr=1e-3)


def method_row(entry: Entry, factor: int, about: About) -> dict[str, Any]:
    """Sizes and errors of one method at one size."""
    chosen, setting, seed = subject(*about), about[1], about[3]

    def context() -> Context:
        return Context(task=chosen.task, seed=seed)

    original, _ = filed(chosen.model, chosen.model)
    keep, reached = fitting(entry, chosen.model, original / factor, context)
    step = trained_low(keep, setting.epochs) if entry.id == "factorize.low-rank-training" else entry.make(keep)
    started = time.perf_counter()
    smaller = step(chosen.model, context()).eval()
    splitting = time.perf_counter() - started
    started = time.perf_counter()
    tuned = chosen.tune(smaller, context()).eval()
    seconds = time.perf_counter() - started
    (_, before), (length, after) = filed(smaller, chosen.model), filed(tuned, chosen.model)
    return {
        "bytes": length, "original_bytes": original, "times_fewer": round(original / length, 3), "reached": reached,
        "keep": keep, "parameters": numbers(smaller), "before": chosen.judge(before), "after": chosen.judge(after),
        "seconds_of_splitting": round(splitting, 2), "seconds_of_training": round(seconds, 2),
    }  # fmt: skip


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def jobs(folder: Path, seed: int, *, quick: bool) -> Iterator[Job]:
    """Method, row, how it is measured, and its setting."""
    low = Entry("factorize.low-rank-training", "truncated while training", partial(trained_low, epochs=0))
    for name, setting in (QUICK if quick else FULL).items():
        described, about = {"network": name, **dataclasses.asdict(setting)}, (name, setting, folder, seed, quick)
        yield "dense", f"{name}, seed {seed}", partial(dense_row, about), described
        for factor in FACTORS:
            for entry in (entry for entry in (*ENTRIES, low) if name in entry.networks):
                row = f"{name}, {entry.what}, {factor} times fewer bytes, seed {seed}"
                yield entry.id, row, partial(method_row, entry, factor, about), described


if __name__ == "__main__":
    measure(__doc__, "factors", jobs)
