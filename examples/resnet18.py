"""The worked example of the literature, put right: ResNet-18, 50 % pruned by sensitivity, 8 bits, distilled at T = 10.

``python examples/resnet18.py --images 500 --epochs 1`` goes the whole way in about a minute on two cores;
``--images 45000 --epochs 30`` is the long form, for a machine with a GPU. Images are those of CIFAR-10 from
ESPALIER_DATA (``--data-dir``), without it the scikit-learn digits as small colour pictures, and standard error says so.

The order matters. The gradients that sensitivity reads are computed before they are read; weights go first, then the
pruned network is the student of the untouched one, then its weights get 8 bits, zeros staying zeros. Distillation is
the sum over classes, averaged over images (``batchmean``) and times T squared. From 32 to 8 bits is four times, not
eight: the rest of what the file gains comes from the zeros and the coder, and the table says which step gained what.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as es
from espalier.core.errors import DataError
from espalier.core.recipe import Recipe
from espalier.data import Images, Loader, digits, standard


class Block(nn.Module):
    """Two 3 x 3 convolutions and the way around them (He 2015, figure 5 left; option B where sizes differ)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        around = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.around = nn.Identity() if same else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.around(x))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for 32 x 32 images: one 3 x 3 convolution, no pooling; 11.2 million parameters."""

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [Block(inputs, outputs, 2 if stage else 1), Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, classes)."""
        y = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def data(images: int, judged: int = 500) -> tuple[str, es.Task]:
    """``images`` pictures to train on, ``judged`` for val and for test each: a name and a task."""
    try:
        splits = standard("cifar10", variant="jpeg", seed=0)
        sets = ((splits.train.x, splits.train.y), (splits.val.x, splits.val.y), (splits.test.x, splits.test.y))
        name, scale = "cifar10", splits.train.normalisation
    except DataError as error:
        print(f"no CIFAR-10 ({error}) The scikit-learn digits stand in.", file=sys.stderr)
        small = digits()
        large = F.interpolate(small.images.float(), 32).to(small.images.dtype).expand(-1, 3, -1, -1)
        parts = Images(large, small.labels, small.classes).split(-1, 0.2, 0.2, seed=0)
        loaders = [Loader.of(part, batch_size=50) for part in parts]
        sets = tuple((loader.x, loader.y) for loader in loaders)
        name, scale = "digits", loaders[0].normalisation
    (x, y), *held = sets
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:images]
    train = Loader(x[chosen], y[chosen], batch_size=50, shuffle=True, normalisation=scale)
    val, test = (Loader(a[:judged], b[:judged], batch_size=250, normalisation=scale) for a, b in held)
    return name, es.tasks.classification(train, val, test)


def recipe(epochs: int) -> Recipe:
    """Prune, distil from the untouched network, quantize: what the survey literature does, in an order that works."""
    prune = es.prune.Prune(criterion=es.prune.Sensitivity(), scope=es.prune.Global(), sparsity=0.5)
    soft = es.distill.SoftTargets(temperature=10.0)
    distil = es.distill.Distill(teacher="original", losses=(soft,), epochs=epochs, lr=3e-4)
    return Recipe(steps=(prune, distil, es.quantize.Quantize(weights=es.quantize.Affine(), bits=8, epochs=0)))


def run(images: int, epochs: int, folder: Path, width: int = 64) -> Table:
    """Train the network, compress it, and tell what each step did; the last row is the file, loaded back."""
    name, task = data(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = ResNet18(width=width)
    model = es.train.Finetune(epochs=epochs, lr=1e-3)(model, es.Context(task=task, path="train"))
    record = es.compress(model, task, recipe(epochs), out=folder, timing_seconds=0).record
    table = Table(title=f"ResNet-18 on {images} images of {name}, {epochs} epochs each", title_justify="left")
    for column in ("step", "non-zero", "bytes", "val accuracy"):
        table.add_column(column, justify="right" if column != "step" else "left")
    steps = record["steps"]
    for label, state in [("original", steps[0]["before"]), *((step["method"], step["after"]) for step in steps)]:
        table.add_row(label, f"{state['nonzero']:,}", f"{state.get('bytes', 0):,}", f"{state['metric']:.1f} %")
    before, after, test = (record[key] for key in ("original", "compressed", "test"))
    table.add_row(
        f"the file, {before['file_bytes'] / after['file_bytes']:.1f}x smaller", f"{after['nonzero']:,}",
        f"{after['file_bytes']:,}",
        f"test {test['compressed']['value']:.1f} %, original {test['original']['value']:.1f} %",
    )  # fmt: skip
    return table


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="ResNet-18: prune by sensitivity, distil, quantize to 8 bits.")
    parser.add_argument("--images", type=int, default=500, help="to train on")
    parser.add_argument("--epochs", type=int, default=1, help="of training and of distillation each")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--data-dir", help="folder of CIFAR-10; else ESPALIER_DATA")
    parser.add_argument("--out", type=Path, help="folder for the run; else a temporary one")
    given = parser.parse_args()
    if given.data_dir:
        os.environ["ESPALIER_DATA"] = given.data_dir
    with tempfile.TemporaryDirectory() as temporary:
        Console().print(run(given.images, given.epochs, given.out or Path(temporary) / "run", given.width))


if __name__ == "__main__":
    main()
