"""The two LeNets of the compression literature, as a project file: ``espalier compress examples/lenet.py``.

MNIST comes from the folder in ESPALIER_DATA (``--data-dir``); without it the scikit-learn digits, padded to 28 x 28,
stand in, and standard error says so. The network is trained once and kept as safetensors. Environment:
LENET (``300-100`` or ``5``), LENET_EPOCHS, LENET_FOLDER (where trained weights are kept; ``runs``).

On its own, ``python examples/lenet.py --net 5 --epochs 2 --out runs/lenet-5`` trains and compresses in one go.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as es
from espalier.core.errors import DataError, UsageError
from espalier.data import Images, Loader, digits, standard


class LeNet300(nn.Module):
    """784-300-100-10, ReLU: 266,200 weights (LeCun, Bottou, Bengio, Haffner 1998). ``dropout`` after hidden layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, 1, 28, 28) -> logits (N, 10)."""
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))
        logits: Tensor = self.fc3(self.dropout(F.relu(self.fc2(x))))
        return logits


class LeNet5(nn.Module):
    """Caffe's LeNet: 20 and 50 maps of 5 x 5, max pooling, 500 units: 430,500 weights. ``dropout`` after the units,
    ``input_dropout`` before them."""

    def __init__(self, dropout: float = 0.0, input_dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)
        self.dropout, self.input_dropout = nn.Dropout(dropout), nn.Dropout(input_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (N, 1, 28, 28) -> logits (N, 10)."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(self.input_dropout(x.flatten(1))))))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"300-100": LeNet300, "5": LeNet5}


def padded_digits(batch_size: int) -> es.Task:
    """The digits in the middle of 28 x 28 pixels, 60/20/20."""
    small = digits()
    images = Images(F.pad(small.images, (10, 10, 10, 10)), small.labels, small.classes)
    train, val, test = images.split(-1, 0.2, 0.2, seed=0)
    return es.tasks.classification(
        Loader.of(train, batch_size=batch_size, shuffle=True),
        Loader.of(val, batch_size=1000),
        Loader.of(test, batch_size=1000),
    )


@cache
def data(batch_size: int = 128) -> tuple[str, es.Task]:
    """MNIST where the folder is there, else the digits: a name and a task."""
    try:
        mnist = standard("mnist", batch_size=batch_size)
    except DataError as error:
        print(f"no MNIST ({error}) The scikit-learn digits, padded to 28 x 28, stand in.", file=sys.stderr)
        return "digits", padded_digits(batch_size)
    return "mnist", es.tasks.classification(mnist.train, mnist.val, mnist.test)


def trained(net: str, epochs: int, folder: Path) -> nn.Module:
    """The network after ``epochs`` epochs of AdamW, from ``folder`` if it was trained before."""
    if net not in NETWORKS:
        raise UsageError(f"no LeNet is called {net!r}; there is {' and '.join(NETWORKS)}.")
    name, task = data()
    path = folder / f"lenet-{net}-{name}-{epochs}.safetensors"
    model: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[net]()
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    print(f"training LeNet-{net} on {name} for {epochs} epochs, once; kept as {path}", file=sys.stderr)
    penalty = es.train.L2(strength=1e-5)
    model = es.train.Finetune(epochs=epochs, lr=2e-3, penalties=(penalty,))(model, es.Context(task=task, path="train"))
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(model.state_dict(), partial)
    partial.replace(path)
    return model


def model() -> nn.Module:
    """For ``espalier compress``."""
    folder = Path(os.environ.get("LENET_FOLDER", "runs"))
    return trained(os.environ.get("LENET", "300-100"), int(os.environ.get("LENET_EPOCHS", "10")), folder)


def task() -> es.Task:
    """For ``espalier compress``."""
    return data()[1]


def main() -> None:
    """Train, compress, show."""
    parser = argparse.ArgumentParser(description="Compress a LeNet.")
    parser.add_argument("--net", choices=NETWORKS, default="300-100")
    parser.add_argument("--epochs", type=int, default=10, help="of training, of pruning, and half of it of fine-tuning")
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--data-dir", help="folder of MNIST; else ESPALIER_DATA")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where trained weights are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/lenet"), help="run directory, new or empty")
    given = parser.parse_args()
    if given.data_dir:
        os.environ["ESPALIER_DATA"] = given.data_dir
    original = trained(given.net, given.epochs, given.folder)
    recipe = es.recipes.DeepCompression(strength=given.strength)
    recipe = replace(
        recipe,
        prune=recipe.prune.replace(epochs=given.epochs),
        finetune=recipe.finetune.replace(epochs=max(1, given.epochs // 2)),
    )
    result = es.compress(original, task(), recipe, out=given.out)
    print(result)
    print(f"{result.file}\n{given.out / 'report.html'}")


if __name__ == "__main__":
    main()
