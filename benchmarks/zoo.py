"""Half the parameters of every network of the zoo, and what still holds afterwards: espalier beside torch-pruning.

python benchmarks/zoo.py [--tool espalier|torch-pruning|trace] [--list torchvision|timm] [--quick] [--only NAME ...]

One row per model in results/zoo_TOOL.json. Rows already there are kept (``--again`` measures them anew), so the sweep
may be interrupted. Every model has a process of its own (forked, so this runs on Linux and macOS) with a time limit:
a crash, a hang or a lack of memory costs one row. Runs single-threaded. The environment: see zoo_requirements.txt.

Assertions: the pruned model runs; same output shapes; kept parameters within 2 points of one half; boundaries listed;
equal to the masked reference (relative 1e-4); equal after saving and loading (1e-4); equal in onnxruntime (1e-3);
one training step. ``null`` stands for what a tool does not offer. ``prune_cpu`` is processor time, which a busy
neighbour moves less than ``prune``, the time on the clock.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402 - the thread counts above must be set first
from benchmarks.common import RESULTS, save  # noqa: E402
from benchmarks.zoo_parts import models  # noqa: E402
from benchmarks.zoo_parts.checks import parameters_of  # noqa: E402

TOOLS = {"espalier": "espalier_tool", "torch-pruning": "torch_pruning_tool", "trace": "trace_tool"}
PRUNE_LIMIT, CHECK_LIMIT = 240.0, 420.0
ASSERTIONS = {
    "trace": ("traces", "runner"),
    **dict.fromkeys(
        ("espalier", "torch-pruning"),
        ("prunes", "runs", "same_shapes", "budget", "boundaries_listed", "masked_reference", "saved", "onnx", "trains"),
    ),
}


def megabytes() -> float:
    """Peak resident memory of this process so far."""
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale, 1)


def measure(pipe: Connection, tool: str, name: str, limit: float) -> None:
    """The work on one model, in its own process: the row so far is sent after every stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - exporters and pruners print
    side = importlib.import_module(f"benchmarks.zoo_parts.{TOOLS[tool]}")
    row: dict[str, Any] = {"ok": {}, "reasons": {}, "differences": {}, "seconds": {}, "megabytes": {}}
    first = ASSERTIONS[tool][0]
    try:
        started = time.perf_counter()
        model, x = models.build(name)
        row["seconds"]["build"] = round(time.perf_counter() - started, 2)
        row["megabytes"]["build"] = megabytes()
        row["parameters"] = [parameters_of(model)]
        pipe.send(("built", row))
        try:
            result = side.prune(row, model, x, limit)
            row["ok"][first] = True
        except Exception as error:
            row["ok"][first] = False
            row["reasons"][first] = f"{type(error).__name__}: {str(error)[:300]}"
            row["where"] = traceback.format_exc().strip().splitlines()[-3:-1]
            row["where"] = [line.strip() for line in row["where"] if "File" not in line]
        row["megabytes"]["prune"] = megabytes()
        pipe.send(("pruned", row))
        if row["ok"][first]:
            started = time.perf_counter()
            side.check(row, model, result, x)
            row["seconds"]["check"] = round(time.perf_counter() - started, 2)
    except Exception as error:
        row["reasons"]["harness"] = f"{type(error).__name__}: {str(error)[:300]}"
    pipe.send(("done", row))


def one(tool: str, name: str, limit: float) -> dict[str, Any]:
    """The row of one model, whatever happens to its process."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(theirs, tool, name, limit), daemon=True)
    process.start()
    theirs.close()
    stage, row, reason = "started", {}, ""
    limits = {"started": 120.0, "built": limit + 20.0, "pruned": CHECK_LIMIT}
    try:
        while stage != "done":
            if not ours.poll(limits[stage]):
                reason = f"nothing after {limits[stage]:.0f} s (last stage: {stage})"
                break
            stage, row = ours.recv()
    except EOFError:
        process.join(10)
        reason = f"the process ended with code {process.exitcode} (last stage: {stage})"
    process.kill()
    process.join()
    ours.close()
    row = {"ok": {}, "reasons": {}, "seconds": {}} | row
    if reason:
        row["reasons"]["process"] = reason
    for assertion in ASSERTIONS[tool]:
        row["ok"].setdefault(assertion, False)
    row["all"] = all(value for value in row["ok"].values() if value is not None)
    return row


def present(path: Path) -> set[str]:
    """Names of the rows that are there."""
    return {row["row"] for row in json.loads(path.read_text())} if path.exists() else set()


def said(row: dict[str, Any]) -> str:
    """One line for the terminal."""
    bad = [name for name, value in row["ok"].items() if value is False]
    head = "ok  " if row["all"] else "FAIL"
    reasons = "; ".join(f"{key}: {text[:160]}" for key, text in row["reasons"].items())
    figures = {key: row[key] for key in ("kept", "nodes") if key in row}
    return f"{head} {figures} {row['seconds']} {'' if row['all'] else bad} {reasons}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=TOOLS, default="espalier")
    parser.add_argument("--list", choices=models.LISTS, help="one list; both without it")
    parser.add_argument("--quick", action="store_true", help="12 small models")
    parser.add_argument("--only", nargs="*", default=(), help="names such as timm/vit_tiny_patch16_224")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--limit", type=float, default=PRUNE_LIMIT, help="seconds for pruning one model")
    options = parser.parse_args()
    chosen = [n for group in models.LISTS if options.list in (None, group) for n in models.names(group)]
    chosen = [n for n in models.QUICK if n in chosen] if options.quick else list(options.only) or chosen
    file = f"zoo_{options.tool.replace('-', '_')}"
    done = set() if options.again else present(RESULTS / f"{file}.json")
    warnings.simplefilter("ignore")
    models.import_libraries()
    importlib.import_module(f"benchmarks.zoo_parts.{TOOLS[options.tool]}")  # once, before the forks
    if options.tool != "trace":
        import onnxruntime
        import onnxscript  # noqa: F401

        setting = {"onnxruntime": onnxruntime.__version__}
    else:
        setting = {}
    import timm
    import torchvision

    setting |= {"torchvision": torchvision.__version__, "timm": timm.__version__, "batch": models.BATCH, "threads": 1}
    if options.tool == "torch-pruning":
        from importlib.metadata import version

        setting["torch-pruning"] = version("torch-pruning")
    good = 0
    for name in chosen:
        if name in done:
            continue
        row = one(options.tool, name, options.limit)
        good += row["all"]
        save(file, [{"id": "zoo", "row": name, "claimed": {}, "measured": row,
                     "setting": {**setting, "prune_limit_s": options.limit}, "seed": 0}])  # fmt: skip
        print(name, said(row), flush=True)
    print(f"{good} of {sum(name not in done for name in chosen)} measured now hold everything; {file}.json")


if __name__ == "__main__":
    main()
