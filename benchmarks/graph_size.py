"""Bytes of the architecture inside the file, and that it computes the same: LeNet-5, CIFAR ResNet-20/56, SqueezeNet.

python benchmarks/graph_size.py [--data-dir DIR]   (pretrained weights where the folder is there, else random ones)
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save
from examples.lenet import LeNet5
from tests.graph.networks import ResNet, SqueezeNet

import espalier as es
from espalier.core.recipe import FileOptions
from espalier.core.task import Task
from espalier.runs.files import freeze_model, write_self_contained, write_weights


def pretrained(model: nn.Module, folder: Path | None, name: str, prefix: str = "") -> str:
    """Fill ``model`` from the data folder; says which weights it has."""
    path = folder / name if folder is not None and name else None
    if path is None or not path.exists():
        return "random weights"
    state = torch.load(path, weights_only=True, map_location="cpu")
    state = {key.removeprefix(prefix): value for key, value in state.get("state_dict", state).items()}
    model.load_state_dict(state)
    return "pretrained weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("ESPALIER_DATA"))
    folder = parser.parse_args().data_dir
    folder = Path(folder) if folder else None
    torch.manual_seed(0)
    cases = [
        ("LeNet-5 (Caffe)", LeNet5(), (1, 28, 28), "", ""),
        ("ResNet-20 (CIFAR)", ResNet(3), (3, 32, 32), "cifar10_resnets/resnet20-12fca82f.th", "module."),
        ("ResNet-56 (CIFAR)", ResNet(9), (3, 32, 32), "cifar10_resnets/resnet56-4bfd9763.th", "module."),
        ("SqueezeNet 1.0", SqueezeNet(), (3, 227, 227), "", ""),
    ]
    rows = []
    for label, model, shape, name, prefix in cases:
        weights = pretrained(model, folder, name, prefix)
        model.eval()
        x = torch.randn(3, *shape)
        frozen = freeze_model(model, Task(val=[x]))
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.espalier"
            info = write_self_contained(frozen, path, FileOptions(coders=("rans",)), "fp32")
            known = write_weights(frozen, Path(place) / "weights.espalier", FileOptions(coders=("rans",)), "fp32")
            loaded = es.load(path)
            with torch.no_grad():
                difference = float((loaded(x[:2]) - model(x[:2])).abs().max() / model(x[:2]).abs().max())
        measured = {
            "graph_bytes": info.graph,
            "header_bytes": info.header,
            "header_bytes_without_graph": known.header,
            "nodes": len(frozen.graph.nodes),
            "largest_relative_difference": difference,
        }
        print(label, measured)
        rows.append({"id": "graph", "row": label, "claimed": {}, "measured": measured,
                     "setting": {"weights": weights, "batch_norm": "scale and shift"}, "seed": 0})  # fmt: skip
    save("graph_size", rows)


if __name__ == "__main__":
    main()
