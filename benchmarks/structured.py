"""Weights made from few numbers, at 2 and 4 times fewer bytes: the error before and after fine-tuning.

python benchmarks/structured.py [--quick] [--only WORD ...] [--again] [--seed 0] [--data-dir DIR]

LeNet-5 on MNIST, trained here; the published ResNet-20 on CIFAR-10 (JPEG), fine-tuned to the JPEG images first;
stories260K, judged on text sampled from it (``benchmarks/gptq.py``) by the KL divergence from the original. Every
method gets the largest setting whose file, in fp32, is 2 or 4 times shorter than the file of the network it starts
from. What is judged is that file, loaded again. A method that cannot be so small has its smallest setting, and
``reached`` is false. ``dense`` rows: the network itself, and after the epochs of the fine-tuning. Nothing is chosen by
val or test. ``circulant product`` rows: milliseconds of one layer in torch, one thread, by a matrix and by FFT.

Rows in results/structured.json are kept (``--again`` measures them anew); ``--quick`` has a file of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks.common import RESULTS, save
from benchmarks.gptq import Llama, judge_stories, next_word, sample, stories
from benchmarks.subjects import blind, dense, task_of, training
from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning
from espalier.core.method import Technique
from espalier.core.model import copy_model
from espalier.core.recipe import FileOptions
from espalier.core.selection import weights
from espalier.core.structures import Circulant as Rule
from espalier.core.task import Task
from espalier.runs.files import freeze_model, load, write_weights
from espalier.share import Circulant, Hashed, KMeans, Monarch, Tied, Toeplitz
from espalier.share.by_fft import CirculantLinear
from espalier.train import Finetune

FACTORS = (2, 4)
SHARES = tuple(step / 100 for step in range(1, 61))
"""Of the numbers: what ``keep`` may be, from the smallest file to the largest."""


TEXTS = 2  # seed of the text that is trained on; that of the judged text is another


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row. ``images``: to train on; texts, of stories260K."""

    images: int
    judged: int
    dense_epochs: int
    epochs: int


QUICK = {
    "lenet5": Setting(10_000, 5_000, dense_epochs=5, epochs=2),
    "resnet20": Setting(2_000, 2_000, dense_epochs=2, epochs=1),
    "stories260K": Setting(256, 16, dense_epochs=0, epochs=10),
}
FULL = {
    "lenet5": Setting(55_000, 10_000, dense_epochs=8, epochs=5),
    "resnet20": Setting(20_000, 5_000, dense_epochs=3, epochs=3),
    "stories260K": Setting(1024, 64, dense_epochs=0, epochs=20),
}


# --- what is done -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One method: ``make`` gives the step for a setting out of ``sizes``, which rise with the length of the file.

    ``inner``: the output layer is left out, or its classes would become equal.
    """

    id: str
    what: str
    make: Callable[[Any], Technique]
    sizes: Sequence[Any] = SHARES
    inner: bool = False
    networks: tuple[str, ...] = ("lenet5", "resnet20", "stories260K")


SHARING = (
    Entry("share.kmeans", "codebook", lambda bits: KMeans(bits=bits), sizes=range(1, 17)),
    Entry("share.circulant", "blocks", lambda keep: Circulant(keep=keep)),
    Entry("share.circulant", "blocks, signs flipped", lambda keep: Circulant(keep=keep, flips=True)),
    Entry("share.toeplitz", "displacement", lambda keep: Toeplitz(keep=keep)),
    Entry("share.monarch", "slices of rank 1", lambda keep: Monarch(keep=keep)),
    Entry("share.hashed", "hashed", lambda keep: Hashed(keep=keep)),
    Entry("share.tied", "neurons, filters", lambda keep: Tied(keep=keep), inner=True),
    Entry("share.tied", "one kernel for each filter", lambda _: Tied(what="kernels"), sizes=(None,),
          networks=("lenet5", "resnet20")),
)  # fmt: skip
ENTRIES = SHARING
"""Further families are further lists of entries, added here."""


# --- what it is done to -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A trained network, what trains it, and how well a changed one does."""

    model: nn.Module
    task: Task
    tune: Finetune
    judge: Callable[[nn.Module], dict[str, float]]


About = tuple[str, Setting, Path, int, bool]
"""What :func:`subject` asks for."""


@cache
def subject(name: str, setting: Setting, folder: Path, seed: int, quick: bool) -> Subject:
    """Trained once for all rows."""
    if name == "stories260K":
        model, _, judged = stories(folder, quick)
        assert isinstance(model, Llama)
        text = sample(model, setting.images, judged.shape[1], TEXTS)
        task = Task(train=[(part, part) for part in text.chunk(-(-len(text) // 16))], loss=next_word)
        return Subject(model, task, Finetune(epochs=setting.epochs), lambda found: judge_stories(found, model, judged))
    task = task_of(name, setting.images, setting.judged, folder, seed)

    def judge(model: nn.Module) -> dict[str, float]:
        score = task.measure(model.eval(), "test")
        return {"test_error": round(100 - score.value, 3), "stderr": round(score.stderr, 3)}

    trained = dense(name, setting.dense_epochs, blind(task), folder, seed)
    return Subject(trained, blind(task), Finetune(**training(name, setting.epochs)), judge)


def filed(model: nn.Module, original: nn.Module) -> tuple[int, nn.Module]:
    """The length of the file of ``model``, and what comes out of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.espalier"
        write_weights(freeze_model(model, None), path, FileOptions(), "fp32")
        return path.stat().st_size, load(path, into=copy_model(original)).eval()


# --- rows -------------------------------------------------------------------------------------------------------------


def step_of(entry: Entry, size: Any, model: nn.Module) -> Technique:
    """The step, on the layers that the entry works on."""
    step = entry.make(size)
    return step.replace(layers=weights(model).names[:-1]) if entry.inner else step


def fitting(entry: Entry, model: nn.Module, allowed: float, context: Callable[[], Context]) -> tuple[Any, bool]:
    """The largest setting whose file has ``allowed`` bytes at most, and whether there is one."""

    def length(size: Any) -> int:
        step = step_of(entry, size, model)
        if isinstance(step, Toeplitz):
            step = step.replace(sweeps=0)  # values do not matter here
        return filed(step(model, context()), model)[0]

    low, high = -1, len(entry.sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(entry.sizes[middle]) <= allowed else (low, middle - 1)
    return entry.sizes[max(low, 0)], low >= 0


def method_row(entry: Entry, factor: int, about: About) -> dict[str, Any]:
    """Sizes and errors of one method at one size."""
    chosen, seed = subject(*about), about[3]

    def context() -> Context:
        return Context(task=chosen.task, seed=seed)

    original, _ = filed(chosen.model, chosen.model)
    size, reached = fitting(entry, chosen.model, original / factor, context)
    started = time.perf_counter()
    shared = step_of(entry, size, chosen.model)(chosen.model, context()).eval()
    projecting = time.perf_counter() - started
    started = time.perf_counter()
    tuned = chosen.tune(shared, context()).eval()
    seconds = time.perf_counter() - started
    (_, before), (length, after) = filed(shared, chosen.model), filed(tuned, chosen.model)
    return {
        "bytes": length, "original_bytes": original, "times_fewer": round(original / length, 3),
        "reached": reached,
        "size": size, "relative_error": round(distance(chosen.model, shared), 4), "before": chosen.judge(before),
        "after": chosen.judge(after), "seconds_of_projection": round(projecting, 2),
        "seconds_of_training": round(seconds, 2),
    }  # fmt: skip


def distance(model: nn.Module, shared: nn.Module) -> float:
    """Of all weights from where they were, as a share of their norm."""
    pairs = [(a.value(), b.value()) for a, b in zip(weights(model), weights(shared), strict=True)]
    lost, whole = (sum(float(x.square().sum()) for x in part) for part in zip(*[(b - a, a) for a, b in pairs]))  # noqa: B905
    return float((lost / whole) ** 0.5)


def dense_row(about: About) -> dict[str, Any]:
    """The network itself, and after the same training."""
    chosen, seed = subject(*about), about[3]
    more = chosen.tune(chosen.model, Context(task=chosen.task, seed=seed)).eval()
    return {
        "bytes": filed(chosen.model, chosen.model)[0],
        "before": chosen.judge(chosen.model), "after": chosen.judge(more),
    }  # fmt: skip


@torch.inference_mode()
def product_row(side: int, batch: int, block: int) -> dict[str, Any]:
    """Median milliseconds of one circulant layer, in turn by a matrix and by FFT; and how far apart they are."""
    structure = Rule(shape=(side, side), block=block, flips=0, seed=0)
    columns = torch.randn(structure.part_shapes()["columns"], generator=torch.Generator().manual_seed(0)) / side**0.5
    matrix = nn.Linear(side, side, bias=False)
    matrix.weight.copy_(structure.dense({"columns": columns}))
    fast = CirculantLinear(structure, columns, None)
    x = torch.randn(batch, side, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"matrix": [], "fft": []}
    for _ in range(21):
        for name, layer in (("matrix", matrix), ("fft", fast)):
            started = time.perf_counter()
            answer = layer(x)
            seconds[name].append(time.perf_counter() - started)
    found = {f"{name}_ms": round(1e3 * sorted(each)[len(each) // 2], 4) for name, each in seconds.items()}
    gap = float((answer - matrix(x)).norm() / answer.norm())
    return {**found, "times_faster": round(found["matrix_ms"] / found["fft_ms"], 2), "relative_difference": gap}


Job = tuple[str, str, Callable[[], dict[str, Any]], dict[str, Any]]


def jobs(folder: Path, seed: int, *, quick: bool) -> Iterator[Job]:
    """Method, row, how it is measured, and its setting."""
    for side in (1024,) if quick else (1024, 4096):
        for batch in (1, 64):
            for block in (8, 64, side):
                row = f"circulant product, {side} x {side}, blocks of {block}, batch {batch}"
                yield "share.circulant", row, partial(product_row, side, batch, block), {"threads": 1}
    for name, setting in (QUICK if quick else FULL).items():
        described, about = {"network": name, **dataclasses.asdict(setting)}, (name, setting, folder, seed, quick)
        yield "dense", f"{name}, seed {seed}", partial(dense_row, about), described
        for factor in FACTORS:
            for entry in (entry for entry in ENTRIES if name in entry.networks):
                row = f"{name}, {entry.what}, {factor} times fewer bytes, seed {seed}"
                yield entry.id, row, partial(method_row, entry, factor, about), described


def measure(doc: str | None, name: str, jobs: Callable[..., Iterator[Job]]) -> None:
    """Measure those of ``jobs`` that are not there yet; a failure is a row, and is tried again the next time."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, little text, few epochs")
    parser.add_argument("--only", nargs="*", default=(), help="rows whose method or name holds one of these words")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("ESPALIER_DATA", "../shared/data")))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", EspalierWarning)
    name = f"{name}_quick" if given.quick else name
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text()) if path.exists() else ()
    there = {(row["id"], row["row"]) for row in rows if "failed" not in row["measured"]}
    for method, row, job, setting in jobs(given.data_dir, given.seed, quick=given.quick):
        if (method, row) in there and not given.again:
            continue
        if given.only and not any(word in f"{method} {row}" for word in given.only):
            continue
        try:
            measured = job()
        except Exception as error:
            measured = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        saved = {"id": method, "row": row, "claimed": {}, "measured": measured, "setting": setting, "seed": given.seed}
        save(name, [saved])
        print(method, row, measured, flush=True)


if __name__ == "__main__":
    measure(__doc__, "structured", jobs)
