"""Binary against ternary weights in a recurrent layer: an LSTM that says whether a phrase of SST-2 is kind.

python benchmarks/recurrent.py [--quick] [--seeds 3] [--only twn ...] [--threads 1] [--data-dir DIR]

The claim is that of Ott et al. (arXiv:1608.06902): binary weights do badly in recurrent layers where ternary ones do
not. A network (embedding, LSTM, linear layer) is trained in fp32; every row goes on from it for the same number of
epochs with the LSTM's weights quantized, embedding and last layer in fp32, and fp32 goes on as long. Three pairs: fixed
thresholds (binary, ternary), fitted scales (bwn, twn), loss-aware scales (lab, lat). Val is a seeded 5,000 of the
training phrases; test are the 872 dev sentences, read once, paired with the fp32 row. ``bytes``: the LSTM's weights as
they lie in a file. Rows are kept: a second call goes on where the first stopped. ``--quick``: 10,000 phrases, fewer
epochs, one seed.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, save

import espalier as es
from espalier import api
from espalier.core.context import Context
from espalier.core.parametrize import freeze
from espalier.core.quantized import WeightQuantizer
from espalier.encode import encode
from espalier.measure import paired
from espalier.quantize import Affine, Quantize
from espalier.quantize.binary import Binary
from espalier.quantize.bwn import BWN
from espalier.quantize.lab import LAB
from espalier.quantize.lat import LAT
from espalier.quantize.ternary import Ternary
from espalier.quantize.twn import TWN
from espalier.train import Finetune

FILE = "recurrent"
VAL = 5_000
UNKNOWN = 1
ROWS: dict[str, tuple[WeightQuantizer, int] | None] = {
    "fp32": None,
    "affine": (Affine(), 8),
    "binary": (Binary(scale="glorot"), 1),
    "ternary": (Ternary(scale="glorot"), 2),
    "bwn": (BWN(), 1),
    "twn": (TWN(per="channel"), 2),
    "lab": (LAB(), 1),
    "lat": (LAT(), 2),
}
Phrase = tuple[list[str], int]


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row. ``start``: epochs in fp32 before; ``epochs``: those of every row."""

    mode: str
    phrases: int
    start: int
    epochs: int
    words: int = 100
    units: int = 128
    batch: int = 128
    lr: float = 2e-3


QUICK = Setting("quick", phrases=10_000, start=3, epochs=2)
FULL = Setting("full", phrases=60_000, start=4, epochs=4)


class Classifier(nn.Module):
    """The last state of one LSTM over a phrase, packed; two classes."""

    def __init__(self, vocabulary: int, setting: Setting) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, setting.words, padding_idx=0)
        self.drop = nn.Dropout(0.4)
        self.lstm = nn.LSTM(setting.words, setting.units, batch_first=True)
        self.head = nn.Linear(setting.units, 2)

    def forward(self, words: Tensor, lengths: Tensor) -> Any:
        """Logits (n, 2) of ``words`` (n, longest), 0 where a phrase has ended."""
        inputs = self.drop(self.embed(words))
        _, (last, _) = self.lstm(pack_padded_sequence(inputs, lengths.cpu(), batch_first=True, enforce_sorted=False))
        return self.head(self.drop(last[-1]))


class Phrases:
    """Re-iterable batches ``(words, lengths, labels)``, padded to the longest phrase of the batch."""

    def __init__(self, phrases: list[Phrase], vocabulary: dict[str, int], batch: int, *, shuffle: bool = False) -> None:
        self.rows = [torch.tensor([vocabulary.get(word, UNKNOWN) for word in words]) for words, _ in phrases]
        self.labels = torch.tensor([label for _, label in phrases])
        self.batch, self.shuffle = batch, shuffle

    def __len__(self) -> int:
        return (len(self.rows) + self.batch - 1) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count = len(self.rows)
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for first in range(0, count, self.batch):
            chosen = order[first : first + self.batch]
            rows = [self.rows[index] for index in chosen.tolist()]
            lengths = torch.tensor([len(row) for row in rows])
            yield pad_sequence(rows, batch_first=True), lengths, self.labels[chosen]


def read(path: Path) -> list[Phrase]:
    """The labelled phrases of a file, in its order."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    return [(text.split(), int(label)) for label, text in rows if text.split()]


def task_of(setting: Setting, folder: Path, seed: int) -> tuple[es.Task, int]:
    """Seeded training and validation phrases, the dev sentences as test, and the size of the vocabulary."""
    phrases = read(folder / "text/sst2/train.tsv")
    order = torch.randperm(len(phrases), generator=torch.Generator().manual_seed(seed)).tolist()
    held, train = ([phrases[place] for place in part] for part in (order[:VAL], order[VAL : VAL + setting.phrases]))
    counts = collections.Counter(word for words, _ in train for word in words)
    common = [word for word, count in counts.most_common() if count > 1]
    vocabulary = {word: place for place, word in enumerate(common, UNKNOWN + 1)}
    splits = (
        Phrases(train, vocabulary, setting.batch, shuffle=True),
        Phrases(held, vocabulary, 500),
        Phrases(read(folder / "text/sst2/dev.tsv"), vocabulary, 500),
    )
    return es.tasks.classification(*splits), len(vocabulary) + UNKNOWN + 1


def size(model: nn.Module) -> int:
    """Bytes of a file that holds the LSTM's weights alone."""
    tensors, _ = freeze(model)
    return len(encode({name: frozen for name, frozen in tensors.items() if name.startswith("lstm.weight")}))


def step_of(found: tuple[WeightQuantizer, int] | None, setting: Setting) -> Finetune | Quantize:
    """The training of one row."""
    if found is None:
        return Finetune(epochs=setting.epochs, lr=setting.lr)
    method, bits = found
    return Quantize(
        weights=method, bits=bits, layers=("lstm",), ends="same", epochs=setting.epochs, lr=setting.lr
    )  # fmt: skip


def run(setting: Setting, folder: Path, seeds: int, only: list[str]) -> None:
    """All rows that are not there yet."""
    path = RESULTS / f"{FILE}.json"
    there = {(row["id"], row["row"]) for row in (json.loads(path.read_text()) if path.exists() else ())}
    for seed in range(seeds):
        label = f"{setting.mode}, seed {seed}"
        left = [name for name in ROWS if (name, label) not in there and name in (only or [name])]
        if not left:
            continue
        task, vocabulary = task_of(setting, folder, seed)
        torch.manual_seed(seed)
        context = Context(task=task, seed=seed)
        base = Finetune(epochs=setting.start, lr=setting.lr)(Classifier(vocabulary, setting), context)
        started = time.perf_counter()
        reference = step_of(None, setting)(base, Context(task=task, seed=seed))
        alone = time.perf_counter() - started
        for name in left:
            started = time.perf_counter()
            model = step_of(ROWS[name], setting)(base, Context(task=task, seed=seed)) if ROWS[name] else reference
            seconds = time.perf_counter() - started if ROWS[name] else alone
            measured = {
                "val": task.measure(model, "val").value, "test": task.measure(model, "test").value,
                "paired_test": paired(reference, model, task, "test").to_json(), "bytes": size(model),
                "seconds": round(seconds, 1),
            }  # fmt: skip
            described = {"data": "SST-2", "vocabulary": vocabulary, **asdict(setting)}
            save(FILE, [{"id": name, "row": label, "claimed": {}, "measured": measured, "setting": described,
                         "seed": seed}])  # fmt: skip
            print(label, name, {key: value for key, value in measured.items() if key != "paired_test"}, flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, default=None)
    given = parser.parse_args()
    folder = given.data_dir or Path(
        os.environ.get("ESPALIER_DATA", Path(__file__).resolve().parents[2] / "shared/data")
    )
    torch.set_num_threads(given.threads)
    api.fill_registry()
    run(QUICK if given.quick else FULL, folder, given.seeds or (1 if given.quick else 3), given.only)


if __name__ == "__main__":
    main()
