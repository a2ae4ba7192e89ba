"""Decompositions beside tensorly's own, and the layers they give beside dense ones and those of tensorly-torch.

python benchmarks/decompositions.py [--quick] [--again] [--only WORD ...]

``seconds`` rows: one weight, taken apart by espalier and by tensorly in turn, at equal ranks: convolutions of 64 to 512
channels, 3 x 3, and a matrix of 1024 x 1024. CP is at equal numbers: three modes here, tensorly's direct form has four.
``latency`` rows: the dense layer, espalier's row of plain layers and tensorly-torch's layer of the same kind at about
as many numbers (for a matrix its block tensor train), in turn, in torch. Weights are random with singular values that
fall as k^-0.7, which changes no time of a layer. One thread; medians with the 10th and 90th percentile. tensorly and
tensorly-torch: see benchmarks/requirements.txt; without the latter its columns are missing. Rows in
results/decompositions.json are kept (``--again`` measures them anew); ``--quick`` is the same in fewer repeats, into a
file of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tensorly  # noqa: E402 - the thread counts above must be set first
import torch  # noqa: E402
from benchmarks.common import RESULTS, save  # noqa: E402
from tensorly.decomposition import parafac, partial_tucker, tensor_train  # noqa: E402
from tensorly.tenalg import svd_interface  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from espalier.core.context import Context  # noqa: E402
from espalier.factorize import CP, SVD, ChannelSVD, Factorization, Ratio, TensorTrain, Tucker  # noqa: E402
from espalier.factorize.cp import composed, cp  # noqa: E402
from espalier.factorize.spectra import Decomposed  # noqa: E402
from espalier.factorize.tensor_train import chained, tt_svd  # noqa: E402
from espalier.factorize.tucker import tucker2  # noqa: E402
from espalier.measure import latency  # noqa: E402
from espalier.measure.speed import quantile  # noqa: E402

SWEEPS = {"tucker": 10, "cp": 20}
CHANNELS, SIDE, DECAY = (64, 128, 256, 512), 1024, 0.7
PLACES = {64: 32, 128: 16, 256: 14, 512: 7}
SHARES = (0.25, 0.1)
CLAIMED = {"times_faster": {"must": "above 1", "aim": 5}, "relative_error": "equal"}


# --- taking apart -----------------------------------------------------------------------------------------------------


def falling(*sizes: int) -> Tensor:
    """A tensor whose unfoldings along the first two sizes have falling singular values."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(*sizes, generator=generator)
    for mode in range(2):
        n = sizes[mode]
        basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
        fall = torch.arange(1, n + 1) ** -DECAY
        tensor = torch.tensordot(basis * fall, tensor, ([1], [mode])).movedim(0, mode)
    return tensor / tensor.std()


Answer = Callable[[], Tensor]
"""Takes apart and hands back a function of what came of it: putting together is not timed."""


def own_svd(matrix: Tensor, rank: int) -> Answer:
    left, right = Decomposed(matrix).balanced(rank)
    return lambda: left @ right


def their_svd(matrix: Tensor, rank: int) -> Answer:
    u, s, v = svd_interface(matrix, n_eigenvecs=rank, method="truncated_svd")
    return lambda: (u * s) @ v


def own_tucker(tensor: Tensor, rank: int) -> Answer:
    A, C, B = tucker2(tensor.flatten(2), (rank, rank), sweeps=SWEEPS["tucker"])
    return lambda: torch.einsum("or,rsk,is->oik", A, C, B).reshape(tensor.shape)


def their_tucker(tensor: Tensor, rank: int) -> Answer:
    found, _ = partial_tucker(tensor, rank=[rank, rank], modes=[0, 1], n_iter_max=SWEEPS["tucker"], tol=1e-4)
    core, (A, B) = found
    return lambda: torch.einsum("or,rskl,is->oikl", A, core, B)


def own_train(tensor: Tensor, rank: int) -> Answer:
    cores = tt_svd(tensor.movedim(0, -1)[None], (rank, rank, rank))
    return lambda: chained(cores)[0].movedim(-1, 0)


def their_train(tensor: Tensor, rank: int) -> Answer:
    train = tensor_train(tensor.movedim(0, -1), rank=[1, rank, rank, rank, 1])
    return lambda: train.to_tensor().movedim(-1, 0)


def own_cp(tensor: Tensor, rank: int) -> Answer:
    method, generator = CP(), torch.Generator().manual_seed(0)
    factors = cp(tensor.flatten(2), rank, generator, sweeps=SWEEPS["cp"], penalty=method.penalty)
    return lambda: composed(factors).reshape(tensor.shape)


def their_cp(tensor: Tensor, rank: int) -> Answer:
    outputs, inputs, high, wide = tensor.shape
    equal = rank * (outputs + inputs + high * wide) // (outputs + inputs + high + wide)
    weights, factors = parafac(tensor, equal, n_iter_max=SWEEPS["cp"], init="random", random_state=0)
    return lambda: composed([factors[0] * weights, *factors[1:]])


PAIRS: dict[str, tuple[Callable[[Tensor, int], Answer], Callable[[Tensor, int], Answer]]] = {
    "channel-svd": (own_svd, their_svd), "tucker": (own_tucker, their_tucker), "tensor-train": (own_train, their_train),
    "cp": (own_cp, their_cp), "svd": (own_svd, their_svd),
}  # fmt: skip


def seconds_row(method: str, channels: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both in turn, and the relative error of both."""
    if method == "svd":
        tensor, rank = falling(SIDE, SIDE), SIDE // 8
    else:
        tensor, rank = falling(channels, channels, 3, 3), channels // (2 if method == "cp" else 4)
    given = tensor.flatten(1) if method == "channel-svd" else tensor
    spent: dict[str, list[float]] = {"own": [], "tensorly": []}
    errors = {}
    with tensorly.backend_context("pytorch"):
        for _ in range(repeats):
            for name, function in zip(spent, PAIRS[method], strict=True):
                started = time.perf_counter()
                answer = function(given, rank)
                spent[name].append(time.perf_counter() - started)
                errors[name] = float((answer().reshape(tensor.shape) - tensor).norm() / tensor.norm())
    ratios = [theirs / own for own, theirs in zip(spent["own"], spent["tensorly"], strict=True)]
    return {
        "rank": rank, "seconds": {name: spread(each) for name, each in spent.items()},
        "times_faster": spread(ratios), "relative_error": {name: round(each, 5) for name, each in errors.items()},
        "runs": repeats, "threads": torch.get_num_threads(),
    }  # fmt: skip


def spread(values: list[float]) -> list[float]:
    """Median, 10th and 90th percentile."""
    return [float(f"{quantile(values, share):.4g}") for share in (0.5, 0.1, 0.9)]


# --- running ----------------------------------------------------------------------------------------------------------


def row_of(method: Factorization, layer: nn.Module, x: Tensor, share: float) -> nn.Module:
    """The layer as a row of plain layers."""
    from espalier.core.task import Task

    found = method.replace(rank=Ratio(keep=share))
    model: Any = found(nn.Sequential(layer), Context(task=Task(train=[(x,)], val=[(x,)])))
    return model[0]  # type: ignore[no-any-return]


def theirs(layer: nn.Module, kind: str, share: float, implementation: str) -> nn.Module | None:
    """tensorly-torch's layer with fresh weights, of about ``share`` of the numbers; None where it cannot be had."""
    if importlib.util.find_spec("tltorch") is None:
        return None
    import tltorch

    try:
        if isinstance(layer, nn.Linear):
            sizes = [(8, 8, n // 64) for n in (layer.in_features, layer.out_features)]
            return tltorch.FactorizedLinear(*sizes, factorization=kind, rank=share, implementation=implementation)
        assert isinstance(layer, nn.Conv2d)
        made = tltorch.FactorizedConv(
            layer.in_channels, layer.out_channels, layer.kernel_size, order=2, padding=1, rank=share,
            factorization=kind, implementation=implementation, fixed_rank_modes="spatial" if kind == "tucker" else None,
        )  # fmt: skip
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.02)
    except Exception as error:
        print(f"tensorly-torch, {kind}, {implementation}: {type(error).__name__}: {error}"[:300])
        return None
    return made  # type: ignore[no-any-return]


def latency_row(method: Factorization, kind: str, channels: int, share: float, repeats: int) -> dict[str, Any]:
    """Milliseconds of the dense layer, the row of layers and tensorly-torch's two forms, in turn."""
    torch.manual_seed(0)
    if channels:
        layer: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)
        layer.weight.data = falling(channels, channels, 3, 3)  # type: ignore[union-attr,assignment]
        x = torch.randn(4, channels, PLACES[channels], PLACES[channels])
    else:
        layer, x = nn.Linear(SIDE, SIDE), torch.randn(32, SIDE)
    models: dict[str, nn.Module] = {"dense": layer, "own": row_of(method, layer, x, share)}
    for implementation in ("factorized", "reconstructed") if kind else ():
        made = theirs(layer, kind, share, implementation)
        if made is not None and runs(made, x):
            models[f"tensorly-torch, {implementation}"] = made
    times = latency(models, lambda model: model(x), repeats=repeats, batch=len(x), threads=1)
    whole = numbers(layer)
    return {
        "ms": {name: [round(each.median_ms, 3), round(each.p10_ms, 3), round(each.p90_ms, 3)]
               for name, each in times.items()},
        "times_faster_than_dense": {
            name: round(times["dense"].median_ms / each.median_ms, 2) for name, each in times.items() if name != "dense"
        },
        "share_of_numbers": {name: round(numbers(model) / whole, 3) for name, model in models.items()},
        "runs": times["dense"].runs, "threads": times["dense"].threads,
    }  # fmt: skip


def runs(model: nn.Module, x: Tensor) -> bool:
    """Whether the model gives anything for ``x``."""
    try:
        with torch.no_grad():
            return bool(model(x).shape[0] == len(x))
    except Exception as error:
        print(f"tensorly-torch: {type(error).__name__}: {error}"[:300])
        return False


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- rows -------------------------------------------------------------------------------------------------------------

LAYERS: tuple[tuple[Factorization, str], ...] = ((Tucker(), "tucker"), (CP(sweeps=5, starts=1), "cp"),
                                                 (TensorTrain(), "tt"), (ChannelSVD(), ""))  # fmt: skip
MATRICES: tuple[tuple[Factorization, str], ...] = ((SVD(), "blocktt"), (TensorTrain(cores=3), "blocktt"))
Job = tuple[str, str, Callable[[], dict[str, Any]]]


def jobs(*, quick: bool) -> Iterator[Job]:
    """Method, row, how it is measured."""
    for channels in CHANNELS:
        repeats = max(3, (21 if not quick else 9) * 64 // channels)
        for method in ("channel-svd", "tucker", "tensor-train", "cp"):
            yield method, f"seconds, {channels} channels, 3 x 3", partial(seconds_row, method, channels, repeats)
    yield "svd", f"seconds, {SIDE} x {SIDE}", partial(seconds_row, "svd", 0, 5 if quick else 11)
    times = 30 if quick else 100
    for share in SHARES:
        for channels in CHANNELS:
            for method, kind in LAYERS:
                row = f"latency, {channels} channels at {PLACES[channels]} x {PLACES[channels]}, batch 4, {share:g}"
                yield method.id, row, partial(latency_row, method, kind, channels, share, times)
        for method, kind in MATRICES:
            row = f"latency, {SIDE} x {SIDE}, batch 32, {share:g}"
            yield method.id, row, partial(latency_row, method, kind, 0, share, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--only", nargs="*", default=(), help="rows whose method or name holds one of these words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name = "decompositions_quick" if options.quick else "decompositions"
    path = RESULTS / f"{name}.json"
    there = {(row["id"], row["row"]) for row in json.loads(path.read_text())} if path.exists() else set()
    for method, row, measure in jobs(quick=options.quick):
        key = f"factorize.{method}", row
        if (key in there and not options.again) or (options.only and not any(w in " ".join(key) for w in options.only)):
            continue
        measured = measure() | {"load_average": round(os.getloadavg()[0], 1)}
        setting = {"sweeps": SWEEPS, "tensorly": tensorly.__version__, "quick": options.quick}
        claimed = CLAIMED if row.startswith("seconds") else {}
        saved = {"id": key[0], "row": row, "claimed": claimed, "measured": measured, "setting": setting, "seed": 0}
        save(name, [saved])
        print(*key, measured, flush=True)


if __name__ == "__main__":
    main()
