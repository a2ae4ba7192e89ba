"""Value-aware training: memory that a training step of ResNet-20 keeps for the backward pass, packed and not.

python benchmarks/value_aware.py [--quick]

Every row is a process of its own: bytes that autograd keeps for the backward pass (each memory once, parameters and
integers included as they are), the most that was allocated at any time of a whole step, as torch's profiler counts it
(what the packing itself needs for a moment included), seconds per step, and the cosine between the gradients and those
of the unpacked step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import save

RATIO = 0.02
CLAIMED = {"ResNet-152": 0.416, "Inception-v3": 0.537}
"""Share of the activation memory saved over the state of the art, with 3 bits and 2 % large values (abstract)."""


def resnet20() -> Any:
    """The CIFAR network of He et al. 2016, random weights."""
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            same = inputs == outputs and stride == 1
            self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            out: Tensor = (inner + self.short(x)).relu()
            return out

    widths = [16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [
        Block(before, width, 1 if before == width else 2)
        for before, width in zip([16, *widths[:-1]], widths, strict=True)
    ]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def step(model: Any, x: Any, y: Any, bits: int | None) -> Any:
    """One forward and backward pass; all gradients in one vector."""
    import torch

    from espalier.quantize.value_aware_memory import packed_activations

    model.zero_grad()
    with nullcontext() if bits is None else packed_activations(bits, RATIO, model=model):
        output = model(x)
    torch.nn.functional.cross_entropy(output, y).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def kept_bytes(model: Any, x: Any, bits: int | None) -> int:
    """Bytes that autograd keeps for the backward pass of one forward."""
    import torch

    from espalier.quantize.value_aware_memory import Packed, Packing

    packing, kept = Packing(bits or 8, RATIO, 1024, model), list[Any]()

    def pack(tensor: Any) -> Any:
        kept.append(tensor if bits is None else packing.pack(tensor))
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, packing.unpack):
        model(x)
    packed = {id(item): item.nbytes for item in kept if isinstance(item, Packed)}
    plain = [item.untyped_storage() for item in kept if not isinstance(item, Packed)]
    return sum(packed.values()) + sum({s.data_ptr(): s.nbytes() for s in plain}.values())


def peak_bytes(model: Any, x: Any, y: Any, bits: int | None) -> int:
    """The most that one step has allocated at any time, above what was there before."""
    import torch

    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step(model, x, y, bits)
    now = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(bits: int | None, batch: int, steps: int) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, x, y = resnet20().train(), torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    step(model, x[:4], y[:4], bits)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        found = step(model, x, y, bits)
        seconds.append(time.perf_counter() - started)
    exact = step(model, x, y, None)
    cosine = float(torch.nn.functional.cosine_similarity(found, exact, dim=0))
    return {
        "kept_bytes": kept_bytes(model, x, bits), "peak_bytes": peak_bytes(model, x, y, bits),
        "gradient_cosine": cosine, "seconds_per_step": statistics.median(seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 64 and 3 steps instead of batch 256 and 10")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    batch, steps = (64, 3) if given.quick else (256, 10)
    if given.row:
        print(json.dumps(measure(None if given.row == "plain" else int(given.row), batch, steps)))
        return
    rows, plain = [], dict[str, Any]()
    for name in ("plain", "8", "4", "3", "2"):
        again = ["--quick"] if given.quick else []
        command = [sys.executable, __file__, "--row", name, *again]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        plain = plain or dict(measured)
        measured["kept_saved"] = 1 - measured["kept_bytes"] / plain["kept_bytes"]
        measured["peak_saved"] = 1 - measured["peak_bytes"] / plain["peak_bytes"]
        print(name, {key: round(value, 4) for key, value in measured.items()}, flush=True)
        setting = {"model": "ResNet-20", "batch": batch, "steps": steps, "ratio": RATIO, "bits": name, "threads": 2}
        rows.append(
            {
                "id": "quantize.value-aware-memory",
                "row": f"{name}, batch {batch}",
                "claimed": CLAIMED if name == "3" else {},
                "measured": measured,
                "setting": setting,
                "seed": 0,
            }
        )
    save("value_aware", rows)


if __name__ == "__main__":
    main()
