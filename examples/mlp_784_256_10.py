"""A 784-256-10 network, pruned and fine-tuned through the API, at four sparsities.

``python examples/mlp_784_256_10.py --epochs 5`` prints one row per sparsity: what is left of the weights, the length
of the file, and the test accuracy of the model loaded back from that file. Nothing here is a prediction.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import espalier as es
from espalier.core.recipe import Recipe
from lenet import data


def network() -> nn.Module:
    """784-256-10 with ReLU: 203,264 weights."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def recipe(sparsity: float, epochs: int) -> Recipe:
    """Magnitude pruning of all layers together while training, then fine-tuning under the masks."""
    return Recipe(
        steps=(
            es.prune.Prune(
                criterion=es.prune.Magnitude(),
                scope=es.prune.Global(),
                schedule=es.prune.Cubic(),
                sparsity=sparsity,
                epochs=epochs,
            ),
            es.train.Finetune(epochs=epochs, lr=3e-4),
        )
    )


def compare(sparsities: Sequence[float], epochs: int, folder: Path) -> Table:
    """Train the network, compress it to every sparsity, and tell what the re-loaded files are worth."""
    name, task = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    model = es.train.Finetune(epochs=epochs, lr=2e-3)(model, es.Context(task=task, path="train"))
    table = Table(title=f"784-256-10 on {name}, {epochs} epochs each", title_justify="left")
    for column in ("sparsity", "non-zero", "bytes", "smaller", "test accuracy"):
        table.add_column(column, justify="right")
    for sparsity in sparsities:
        result = es.compress(
            model, task, recipe(sparsity, epochs), out=folder / f"sparsity-{sparsity}", timing_seconds=0
        )
        before, after, test = (result.record[key] for key in ("original", "compressed", "test"))
        if sparsity == sparsities[0]:
            kept = test["original"]
            row = ("-", f"{before['nonzero']:,}", f"{before['file_bytes']:,}", "1.0x")
            table.add_row(*row, f"{kept['value']:.2f} ± {kept['stderr']:.2f} %")
        smaller = before["file_bytes"] / after["file_bytes"]
        row = (f"{sparsity:g}", f"{after['nonzero']:,}", f"{after['file_bytes']:,}", f"{smaller:.1f}x")
        table.add_row(*row, f"{test['compressed']['value']:.2f} ± {test['compressed']['stderr']:.2f} %")
    return table


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description="Prune and fine-tune a 784-256-10 network.")
    parser.add_argument("--epochs", type=int, default=5, help="of training, pruning and fine-tuning each")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--data-dir", help="folder of MNIST; else ESPALIER_DATA")
    parser.add_argument("--out", type=Path, help="folder for the runs; else a temporary one")
    given = parser.parse_args()
    if given.data_dir:
        os.environ["ESPALIER_DATA"] = given.data_dir
    with tempfile.TemporaryDirectory() as temporary:
        Console().print(compare(given.sparsities, given.epochs, given.out or Path(temporary)))


if __name__ == "__main__":
    main()
