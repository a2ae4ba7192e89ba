"""GPTQ against rounding to nearest in 4 bits, and the seconds it takes for one large layer.

python benchmarks/gptq.py [--quick] [--data-dir DIR] [--again] [--only WORD ...]

stories260K (a trained language model of 260,000 parameters): text sampled from it at temperature 1 calibrates and
judges; the measure is the loss on that text and the KL divergence from the original. A small ViT, trained here on MNIST
(``--quick``: on the digits of scikit-learn): test loss and error. A random layer of 4096 x 4096: seconds on so many
threads as the machine has cores, of the solution alone, its Hessian being there. Rows already in results/gptq.json are
kept (``--again`` measures them anew); ``--quick`` has a file of its own. ``--only``: rows whose name holds the word.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from benchmarks.common import RESULTS, save
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as es
from espalier.core.context import Context
from espalier.core.task import Task
from espalier.data import standard
from espalier.quantize import Affine, Quantize
from espalier.quantize.gptq import GPTQ, solve_columns, unit_upper
from espalier.train import Finetune
from espalier.train.layers import damped

BITS, LIMIT_SECONDS = 4, 15.0
METHODS = {
    "nearest, per channel": Affine(),
    "gptq, per channel": GPTQ(),
    "gptq, per channel, act-order": GPTQ(act_order=True),
    "nearest, groups of 32, asymmetric": Affine(per="group", group=32, symmetric=False),
    "gptq, groups of 32, asymmetric": GPTQ(per="group", group=32, symmetric=False),
}


# --- stories260K ------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """(batch, length, heads, size) with neighbouring entries turned by the position's angles (length, size / 2)."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class LlamaBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, shared: int) -> None:
        super().__init__()
        self.size, self.heads, self.shared = width // heads, heads, shared
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, shared * self.size, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        y = self.attention_norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.size)) for layer in (self.wq, self.wk, self.wv))
        q, k = rotate(q, angle), rotate(k, angle)
        k, v = (each.repeat_interleave(self.heads // self.shared, 2) for each in (k, v))
        mixed = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        found: Tensor = x + self.w2(F.silu(self.w1(y)) * self.w3(y))
        return found


class Llama(nn.Module):
    """``sizes``: width, hidden width, layers, heads, key heads, words, longest text."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        width, hidden, layers, heads, shared, words, length = sizes
        self.embedding, self.norm = nn.Embedding(words, width), RMSNorm(width)
        self.layers = nn.ModuleList(LlamaBlock(width, hidden, heads, shared) for _ in range(layers))
        self.output = nn.Linear(width, words, bias=False)
        self.output.weight = self.embedding.weight
        frequency = 10_000.0 ** -(torch.arange(0, width // heads, 2) / (width // heads))
        self.register_buffer("angle", torch.outer(torch.arange(length), frequency), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.angle[: tokens.shape[1]])  # type: ignore[index]
        found: Tensor = self.output(self.norm(x))
        return found


def load_stories(path: Path) -> Llama:
    """The checkpoint: seven int32, then float32 tensors of each kind for all layers."""
    content = path.read_bytes()
    sizes = struct.unpack("7i", content[:28])
    model, numbers, place = Llama(sizes), np.frombuffer(content, np.float32, offset=28), 0

    def fill(*targets: nn.Parameter) -> None:
        nonlocal place
        for target in targets:
            part = numbers[place : place + target.numel()]
            target.data.copy_(torch.from_numpy(part.copy()).reshape(target.shape))
            place += target.numel()

    fill(model.embedding.weight)
    for name in ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3"):
        fill(*(getattr(layer, name).weight for layer in model.layers))
    fill(model.norm.weight)
    return model.eval()


@torch.no_grad()
def sample(model: Llama, count: int, length: int, seed: int) -> Tensor:
    """``count`` texts at temperature 1, each after the token that begins one (1)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.ones(count, 1, dtype=torch.long)
    while tokens.shape[1] < length:
        chances = model(tokens)[:, -1].softmax(1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], 1)
    return tokens


def next_word(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1), target[:, 1:].flatten())


@cache
def stories(folder: Path, quick: bool) -> tuple[nn.Module, Task, Tensor]:
    """The model, a task of sampled text, and text to judge on."""
    model = load_stories(folder / "stories260K" / "stories260K.bin")
    texts, length = (16, 48) if quick else (64, 192)
    calibration, judged = sample(model, texts, length, 0), sample(model, texts, length, 1)
    batches = [(part, part) for part in calibration.chunk(8)]
    return model, Task(train=batches, val=[(judged, judged)], loss=next_word), judged


@torch.no_grad()
def judge_stories(model: nn.Module, original: nn.Module, judged: Tensor) -> dict[str, float]:
    found, expected = model(judged), original(judged).log_softmax(-1)
    divergence = (expected.exp() * (expected - found.log_softmax(-1))).sum(-1).mean()
    return {"loss": float(next_word(found, judged)), "kl": float(divergence)}


# --- a small ViT ------------------------------------------------------------------------------------------------------


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.after(x))))
        return found


class ViT(nn.Module):
    def __init__(self, side: int, patch: int, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.place = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(ViTBlock(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        found: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return found


@cache
def vit(folder: Path, quick: bool) -> tuple[nn.Module, Task]:
    """Trained here, the same every time."""
    data = standard("digits") if quick else standard("mnist", folder)
    task = es.tasks.classification(data.train, data.val, data.test)
    torch.manual_seed(0)
    model = ViT(8, 2, 32, 2) if quick else ViT(28, 4, 64, 4)
    return Finetune(epochs=30 if quick else 4, lr=2e-3)(model, Context(task=task)).eval(), task


@torch.no_grad()
def judge_vit(model: nn.Module, original: nn.Module, task: Task) -> dict[str, float]:
    pairs = [(model(x), original(x), y) for x, y in task.data("test")]
    found, expected, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return {
        "loss": float(F.cross_entropy(found, labels)), "error_percent": 100 - task.measure(model, "test").value,
        "logit_mse": float((found - expected).square().mean()),
    }  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------------


def quantized(model: nn.Module, task: Task, method: Any) -> tuple[nn.Module, float]:
    """The model in 4 bits, first and last layer too, and the seconds that took."""
    started = time.perf_counter()
    done = Quantize(weights=method, bits=BITS, ends="same", batches=8)(model, Context(task=task)).eval()
    return done, time.perf_counter() - started


def stories_row(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    model, task, judged = stories(folder, quick)
    done, seconds = quantized(model, task, METHODS[name])
    before = judge_stories(model, model, judged)
    return {**judge_stories(done, model, judged), "float_loss": before["loss"], "seconds": seconds}


def vit_row(name: str, folder: Path, quick: bool) -> dict[str, Any]:
    model, task = vit(folder, quick)
    done, seconds = quantized(model, task, METHODS[name])
    before = judge_vit(model, model, task)
    return {
        **judge_vit(done, model, task), "float_loss": before["loss"], "float_error_percent": before["error_percent"],
        "seconds": seconds,
    }  # fmt: skip


def layer_row(size: int) -> dict[str, Any]:
    """Hessian and weights are random; the loss of the layer's output beside that of rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator) / size**0.5
    weight = torch.randn(size, size, generator=generator)
    hessian = (x.T @ x / len(x)).double()
    scale = weight.abs().amax(1, keepdim=True) / (2 ** (BITS - 1) - 1)
    before, threads = torch.get_num_threads(), os.cpu_count() or 1
    torch.set_num_threads(threads)
    started, busy = time.perf_counter(), time.process_time()
    upper = unit_upper(damped(hessian, 0.01))
    assert upper is not None
    half = 2 ** (BITS - 1)
    solved = solve_columns(weight, upper, scale, torch.zeros_like(scale), (1 - half, half - 1))
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    torch.set_num_threads(before)
    rounded = torch.round(weight / scale).clamp(1 - half, half - 1) * scale
    errors = [float(((each - weight) @ hessian.float() * (each - weight)).sum()) for each in (solved, rounded)]
    return {
        "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "threads": threads,
        "error_over_rounding": errors[0] / errors[1], "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def rows(folder: Path, quick: bool) -> dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]]:
    """Name -> how it is measured, and what is claimed of it."""
    size = 512 if quick else 4096
    found: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {}
    claim: dict[str, Any] = {"seconds_at_most": LIMIT_SECONDS}
    found[f"layer {size} x {size}"] = (lambda: layer_row(size)), claim
    for name in METHODS:
        aim: dict[str, Any] = {"loss": "below rounding to nearest"} if name.startswith("gptq") else {}
        found[f"stories260K, {name}"] = (lambda name=name: stories_row(name, folder, quick)), aim
        found[f"vit, {name}"] = (lambda name=name: vit_row(name, folder, quick)), aim
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little text, the digits, a layer of 512 x 512")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("ESPALIER_DATA", "../shared/data")))
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--only", nargs="*", default=(), help="rows whose name holds one of these words")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    name = "gptq_quick" if options.quick else "gptq"
    path = RESULTS / f"{name}.json"
    there = {row["row"] for row in json.loads(path.read_text())} if path.exists() else set()
    for row, (measure, claimed) in rows(options.data_dir, options.quick).items():
        if (row in there and not options.again) or (options.only and not any(word in row for word in options.only)):
            continue
        measured = measure()
        setting = {"bits": BITS, "batches": 8, "quick": options.quick}
        save(
            name, [{"id": "gptq", "row": row, "claimed": claimed, "measured": measured, "setting": setting, "seed": 0}]
        )
        print(row, measured, flush=True)


if __name__ == "__main__":
    main()
