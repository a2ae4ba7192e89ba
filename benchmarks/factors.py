"""Layers as products of smaller ones, at 2 and 4 times fewer bytes: the error before and after fine-tuning.

python benchmarks/factors.py [--quick] [--only WORD ...] [--again] [--seed 0] [--data-dir DIR]

The networks, their training, the files and how they are judged are those of benchmarks/structured.py, whose rows of
shared weights these stand beside: the same ids of rows, the same fine-tuning. Every method keeps the largest share of
each layer's numbers with which the fp32 file, loaded again, is 2 or 4 times shorter than the network's; ``reached`` is
false where no share does. Methods for convolutions take matrices by SVD, and the other way round, so that each works on
the whole network. Rows in results/factors.json are kept (``--again`` measures them anew); ``--quick`` has a file of its
own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks.common import RESULTS, save
from benchmarks.structured import FACTORS, FULL, QUICK, About, Entry, dense_row, filed, fitting, subject
from torch import nn

import espalier.factorize as f
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning
from espalier.core.method import Technique
from espalier.core.recipe import Recipe

BATCHES = 8


def whole(first: f.Factorization, second: f.Factorization | None = None) -> Callable[[float], Technique]:
    """``first``, then what it does not split by ``second``, both at a share of each layer's numbers."""

    def made(keep: float) -> Technique:
        rank = f.Ratio(keep=keep)
        steps = [method.replace(rank=rank) for method in (first, second) if method is not None]
        return steps[0] if len(steps) == 1 else Recipe(steps=tuple(steps))

    return made


def one_budget(keep: float) -> Technique:
    """Output-aware, at the ranks of one budget for all layers."""
    return f.Autoencoder(rank=f.Budget(keep=keep), batches=BATCHES)


ENTRIES = (
    Entry("factorize.svd", "svd, convolutions by channel-svd", whole(f.SVD(), f.ChannelSVD())),
    Entry("factorize.spatial-svd", "spatial-svd", whole(f.SpatialSVD(), f.SVD())),
    Entry("factorize.tucker", "tucker", whole(f.Tucker(), f.SVD())),
    Entry("factorize.cp", "cp", whole(f.CP(starts=1, sweeps=50), f.SVD())),
    Entry("factorize.tensor-train", "tensor-train", whole(f.TensorTrain(), f.SVD())),
    Entry("factorize.basis-filters", "basis-filters", whole(f.BasisFilters(), f.SVD())),
    Entry("factorize.autoencoder", "autoencoder of the outputs", whole(f.Autoencoder(batches=BATCHES), f.SVD())),
    Entry("factorize.autoencoder", "autoencoder with a ReLU", whole(f.Autoencoder(hidden="relu"), f.SVD())),
    Entry("factorize.activation-aware-svd", "activation-aware", whole(f.ActivationAwareSVD(batches=BATCHES), f.SVD())),
    Entry("factorize.budget", "autoencoder, one budget", one_budget),
)


def trained_low(keep: float, epochs: int) -> Technique:
    """Truncated while it trains; with no epochs the same sizes without the training."""
    return f.LowRankTraining(epochs=epochs, form="truncated", rank=f.Ratio(keep=keep), lr=1e-3)


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


Job = tuple[str, str, Callable[[], dict[str, Any]], dict[str, Any]]


def jobs(folder: Path, seed: int, *, quick: bool) -> Iterator[Job]:
    """Method, row, how it is measured, and its setting."""
    low = Entry("factorize.low-rank-training", "truncated while training", partial(trained_low, epochs=0))
    for name, setting in (QUICK if quick else FULL).items():
        described, about = {"network": name, **dataclasses.asdict(setting)}, (name, setting, folder, seed, quick)
        yield "dense", f"{name}, seed {seed}", partial(dense_row, about), described
        for factor in FACTORS:
            for entry in (*ENTRIES, low):
                row = f"{name}, {entry.what}, {factor} times fewer bytes, seed {seed}"
                yield entry.id, row, partial(method_row, entry, factor, about), described


def main() -> None:
    """Measure what is not there yet; a failure is a row, and is tried again the next time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, little text, few epochs")
    parser.add_argument("--only", nargs="*", default=(), help="rows whose method or name holds one of these words")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("ESPALIER_DATA", "../shared/data")))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", EspalierWarning)
    name = "factors_quick" if given.quick else "factors"
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else ()
    there = {(row["id"], row["row"]) for row in rows if "failed" not in row["measured"]}
    for method, row, measure, setting in jobs(given.data_dir, given.seed, quick=given.quick):
        if (method, row) in there and not given.again:
            continue
        if given.only and not any(word in f"{method} {row}" for word in given.only):
            continue
        try:
            measured = measure()
        except Exception as error:
            measured = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        saved = {"id": method, "row": row, "claimed": {}, "measured": measured, "setting": setting, "seed": given.seed}
        save(name, [saved])
        print(method, row, measured, flush=True)


if __name__ == "__main__":
    main()
