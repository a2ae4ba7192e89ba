"""The results of the benchmarks as tables: docs/benchmarks.md is written from here by ``make docs``.

Nothing is measured here; a benchmark without rows names its command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from benchmarks.published import GAPS

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"


def rows(name: str) -> list[Row]:
    """The rows of one results file; none where it is not there."""
    path = RESULTS / f"{name}.json"
    return list(json.loads(path.read_text())) if path.is_file() else []


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> list[str]:
    """Markdown."""
    titles = list(head)
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return lines + ["| " + " | ".join(str(cell) for cell in line) + " |" for line in body]


def zoo() -> list[str]:
    """Half the parameters of every network: who holds what, who is how fast."""
    tools = {"espalier": rows("zoo_espalier"), "torch-pruning 1.6.1": rows("zoo_torch_pruning")}
    if not any(tools.values()):
        return ["Not measured yet: `make bench NAME=zoo`."]
    body, both = [], {}
    for group in ("torchvision", "timm"):
        for tool, found in tools.items():
            mine = {r["row"]: r["measured"] for r in found if r["row"].startswith(f"{group}/")}
            if not mine:
                continue
            good = {name: m for name, m in mine.items() if m["all"]}
            held = [sum(m["ok"].get(check) is not False for m in mine.values()) for check in CHECKS]
            seconds = [m["seconds"]["prune_cpu"] for m in good.values() if "prune_cpu" in m["seconds"]]
            memory = [m["megabytes"]["prune"] for m in good.values()]
            body.append([
                group, tool, len(mine), f"{len(good)} ({len(good) / len(mine):.0%})", *held,
                f"{median(seconds):.2f}" if seconds else "", f"{median(memory):,.0f}" if memory else "",
            ])  # fmt: skip
            both[group, tool] = good
    lines = table(["list", "tool", "models", "all hold", *CHECKS.values(), "seconds", "MB"], body)
    for group in ("torchvision", "timm"):
        one, two = (both.get((group, tool), {}) for tool in tools)
        pairs = [
            two[name]["seconds"]["prune_cpu"] / max(one[name]["seconds"]["prune_cpu"], 0.01)
            for name in one
            if name in two and "prune_cpu" in two[name]["seconds"]
        ]
        if pairs:
            said = f"torch-pruning takes {median(pairs):.2f} times the processor time of espalier in the median."
            lines += ["", f"{group}, where both succeed ({len(pairs)} models): {said}"]
    bad = [
        (row["row"], ", ".join(k for k, v in m["ok"].items() if v is False), "; ".join(m["reasons"].values())[:160])
        for row in tools["espalier"]
        if not (m := row["measured"])["all"]
    ]
    if bad:
        lines += ["", "What espalier does not hold:", "", *table(["model", "fails", "reason"], bad)]
    return lines


CHECKS = {
    "prunes": "prunes", "runs": "runs", "same_shapes": "shapes", "budget": "budget",
    "masked_reference": "= masked", "saved": "saved", "onnx": "ONNX", "trains": "trains",
}  # fmt: skip


def cifar(mode: str) -> list[str]:
    """Accuracy at the same multiply-adds; over seeds where there are several."""
    found = [row for row in rows("cifar_channels") if f", {mode}, " in row["row"]]
    if not found:
        return ["Not measured yet: `make bench NAME=cifar_channels`."]
    bases = {row["seed"]: row["measured"] for row in found if row["id"] == "baseline"}
    many: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        if "tool" in row:
            _, ratio, scope, tool, *_ = row["row"].split(", ")
            many.setdefault((ratio, tool, row["id"], scope), []).append(row)
    body = []
    for (ratio, tool, name, scope), group in sorted(many.items(), key=_by_val):
        good = [row["measured"] for row in group if "measured" in row]
        if not good:
            body.append([ratio, tool, name, scope, "", "", "", group[0].get("failed", "")[:60]])
            continue
        drops = [m["paired_test"] for m in good]
        body.append([
            ratio, tool, name, scope, f"{median(m['macs'] for m in good) / 1e6:.1f}", spread([m["val"] for m in good]),
            spread([m["test"] for m in good]),
            ", ".join(f"{d['drop']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" for d in drops),
        ])  # fmt: skip
    some = next(iter(bases.values()))
    said = f"Baseline: val {spread([b['val'] for b in bases.values()])}, test " + spread(
        [b["test"] for b in bases.values()]
    )
    head = ["MACs", "tool", "criterion", "scope", "million", "val %", "test %", "paired drop on test [95 %]"]
    return [f"{said}, {some['macs'] / 1e6:.1f} million multiply-adds.", "", *table(head, body)]


def _by_val(item: tuple[tuple[str, ...], list[Row]]) -> tuple[str, float]:
    key, group = item
    values = [row["measured"]["val"] for row in group if "measured" in row]
    return key[0], -mean(values) if values else 0.0


def spread(values: list[float]) -> str:
    """The mean, with its standard error over seeds."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def unstructured() -> list[str]:
    """Test accuracy by criterion and sparsity."""
    found = [row for row in rows("unstructured") if row.get("measured") and row["id"] != "baseline"]
    lines: list[str] = []
    for network, title in (("lenet5", "LeNet-5 on MNIST"), ("resnet20", "ResNet-20 on CIFAR-10 (JPEG)")):
        for schedule in ("one-shot", "iterative", "before-training"):
            mine = [row for row in found if row["row"].startswith(f"{network}, {schedule},")]
            if not mine:
                continue
            levels = sorted({level for row in mine for level in row["measured"]}, key=float)
            body = [
                [row["id"], *(_entry(row["measured"].get(level), level) for level in levels)]
                for row in sorted(mine, key=lambda row: -_last(row, levels))
            ]
            setting = mine[0]["setting"]
            lines += ["", f"{title}, {schedule} ({setting['images']:,} training images; test %):", ""]
            lines += table(["criterion", *(f"{float(level):.0%}" for level in levels)], body)
    return lines[1:] or ["Not measured yet: `make bench NAME=unstructured`."]


def _last(row: Row, levels: list[str]) -> float:
    values = [row["measured"].get(level, {}).get("test", 0.0) for level in levels]
    return sum(values) / max(1, len(values))


def _entry(entry: Row | None, level: str) -> str:
    if not entry:
        return ""
    if "failed" in entry:
        return "failed"
    off = abs(entry["sparsity"] - float(level)) > 0.002
    return f"{entry['test']:.2f}" + (f" (at {entry['sparsity']:.1%})" if off else "")


def latency() -> list[str]:
    """Speed-up beside the ratio of multiply-adds."""
    found = rows("latency_channels") or rows("latency_channels_quick")
    body = []
    for row in found:
        m = row["measured"]
        if "median_ms" not in m:
            body.append([row["row"], m.get("reason", ""), "", "", ""])
            continue
        before, after = m["median_ms"]
        body.append([
            row["row"], f"{before:.2f} -> {after:.2f}", f"{m['mac_ratio']:.2f}x", f"{m['speedup']:.2f}x",
            f"{m['speedup_over_mac_ratio']:.2f}",
        ])  # fmt: skip
    head = ["network, runtime", "median ms", "fewer MACs", "faster", "faster / fewer"]
    return table(head, body) if body else ["Not measured yet: `make bench NAME=latency_channels`."]


def sparse() -> list[str]:
    """Kernels for zeros beside dense ones."""
    found = rows("sparse_kernels") or rows("sparse_kernels_quick")
    body = []
    for row in found:
        m = row["measured"]
        if "sparse_ms" in m:
            body.append([row["row"], f"{m['dense_ms']:.3f}", f"{m['sparse_ms']:.3f}", f"{m['speedup']:.2f}x"])
        else:
            body.append([row["row"], "", "", m.get("reason", "")[:90].replace("|", "/")])
    head = ["runtime, form", "dense ms", "sparse ms", "faster"]
    return table(head, body) if body else ["Not measured yet: `make bench NAME=sparse_kernels`."]


def causality() -> list[str]:
    """Units gone and agreement kept, beside as many units of every group gone by other criteria."""
    body = []
    for row in rows("causality"):
        m = row["measured"]
        tuned = m.get("after_tuning", {})
        first, last = m["test_accuracy"][0], tuned.get("test_accuracy", m["test_accuracy"][1])
        body.append([
            row["row"], row["id"], f"{m['units']['removed']:.1%}", f"{m['test_agreement']:.2%}",
            f"{tuned['test_agreement']:.2%}" if tuned else "", f"{first:.2f} -> {last:.2f}",
            m.get("interventions", ""), m.get("seconds", ""),
        ])  # fmt: skip
    head = ["network", "units chosen by", "gone", "agreement", "after tuning", "accuracy", "interventions", "seconds"]
    return table(head, body) if body else ["Not measured yet: `make bench NAME=causality`."]


def lowbit(network: str) -> list[str]:
    """Test error by method, the difference to fp32 seed by seed, and the published figure in a column of its own."""
    found = [row for row in rows("lowbit") if row["setting"]["network"] == network]
    lines: list[str] = []
    for mode in ("full", "quick"):
        lines += ([""] if lines else []) + _lowbit([row for row in found if row["setting"]["mode"] == mode])
    return lines or [f'Not measured yet: `make bench NAME=lowbit ARGS="--network {network}"`.']


def _lowbit(found: list[Row]) -> list[str]:
    if not found:
        return []
    base = {row["seed"]: row["measured"]["test_error"] for row in found if row["id"] == "fp32, 32/32"}
    many: dict[str, list[Row]] = {}
    for row in found:
        many.setdefault(row["id"], []).append(row)
    body = []
    for label, group in many.items():
        name, bits = label.rsplit(", ", 1)
        errors = [row["measured"]["test_error"] for row in group]
        drops = [row["measured"]["test_error"] - base[row["seed"]] for row in group if row["seed"] in base]
        claimed = group[0]["claimed"]
        body.append([
            name.removesuffix(" untrained"), bits, "" if group[0]["setting"]["trained"] else "no",
            spread(errors), signed(drops),
            f"{mean(row['measured']['bytes'] for row in group):,.0f}",
            f"{mean(row['measured']['cpu_seconds'] for row in group):.1f}",
            f"{claimed['test_error']:.2f} ({claimed['source']})" if claimed else "",
            f"{GAPS[label][0]:+.2f} ({GAPS[label][1]})" if label in GAPS else "",
        ])  # fmt: skip
    setting = found[0]["setting"]
    said = (
        f"{setting['images']:,} training images, {setting['epochs']} epochs from the trained network, "
        f"{setting['judged']:,} test images, {len({row['seed'] for row in found})} seeds; {setting['mode']} form."
    )
    head = ["method", "W/A bits", "trained", "test error %", "over fp32, paired", "bytes", "CPU s", "published error %",
            "the paper over its own fp32"]  # fmt: skip
    return [said, "", *table(head, body)]


def int8_latency() -> list[str]:
    """Medians of every network and runtime: fp32, bf16, the tool's int8 and ours."""
    body = []
    for row in rows("int8_latency"):
        measured, tool = row["measured"], row["setting"]["tool"]
        times = [measured[name]["median_ms"] if name in measured else None for name in ("fp32", "bf16", tool, "ours")]
        size, decibels = measured["bytes"], measured["sqnr_db"]
        body.append([
            row["row"], *("" if ms is None else f"{ms:.2f}" for ms in times), tool, f"{measured['ratio']:.2f}",
            f"{measured['speedup_over_fp32']:.1f}", f"{size['fp32']:,}", f"{size['ours']:,}",
            f"{decibels[tool]:.0f} / {decibels['ours']:.0f}",
        ])  # fmt: skip
    head = ["network, runtime", "fp32 ms", "bf16 ms", "the tool's ms", "ours ms", "tool", "ours / tool", "fp32 / ours",
            "fp32 bytes", "our bytes", "SQNR dB, tool / ours"]  # fmt: skip
    return table(head, body) if body else ["Not measured yet: `make bench NAME=int8_latency`."]


def int8_accuracy() -> list[str]:
    """Means over the calibration seeds, and how far ours are from each other tool."""
    found = rows("int8_accuracy")
    many: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        if row["id"] == "int8_accuracy":
            many.setdefault((row["setting"]["network"], row["setting"]["tool"]), []).append(row["measured"])
    body = []
    for (network, tool), group in many.items():
        apart = [m["minus_memory"] for m in group if m.get("minus_memory") is not None]
        noise = [m["sqnr_db"] for m in group if m.get("sqnr_db") is not None]
        body.append([
            network, tool, len(group), spread([m["accuracy"] for m in group]), f"{mean(noise):.1f}" if noise else "",
            signed(apart),
        ])  # fmt: skip
    if not body:
        return ["Not measured yet: `make bench NAME=int8_accuracy`."]
    head = ["network", "tool", "seeds", "accuracy %", "SQNR dB to fp32", "file less memory, points"]
    return table(head, body)


def recurrent() -> list[str]:
    """Accuracy and bytes by row, the difference to fp32 paired by seed."""
    found = rows("recurrent")
    base = {row["seed"]: row["measured"]["test"] for row in found if row["id"] == "fp32"}
    many: dict[str, list[Row]] = {}
    for row in found:
        many.setdefault(row["id"], []).append(row)
    body = [
        [
            label, len(group), spread([row["measured"]["test"] for row in group]),
            signed([row["measured"]["test"] - base[row["seed"]] for row in group if row["seed"] in base]),
            f"{mean(row['measured']['bytes'] for row in group):,.0f}",
        ]
        for label, group in many.items()
    ]  # fmt: skip
    head = ["weights of the LSTM", "seeds", "accuracy on test %", "against fp32, paired", "bytes"]
    return table(head, body) if body else ["Not measured yet: `make bench NAME=recurrent`."]


def signed(values: list[float]) -> str:
    """The mean difference, with its standard error over seeds."""
    if len(values) < 2:
        return f"{values[0]:+.2f}" if values else ""
    return f"{mean(values):+.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def popcount() -> list[str]:
    """Binary layers beside fp32 and int8."""
    found = rows("popcount") or rows("popcount_quick")
    body = [[row["row"], *(f"{value:.3f}" for value in _milliseconds(row["measured"]).values())] for row in found]
    head = ["layer, threads", *(_milliseconds(found[0]["measured"]) if found else ())]
    return table(head, body) if body else ["Not measured yet: `make bench NAME=popcount`."]


def _milliseconds(measured: Row) -> dict[str, float]:
    """Medians by what was timed."""
    return {name: float(value) for name, value in measured.get("ms", {}).items()}


def gptq() -> list[str]:
    """Loss after rounding, and seconds for one large layer."""
    body = [
        [row["row"], row["id"], ", ".join(f"{key} {value}" for key, value in row["measured"].items())]
        for row in (rows("gptq_quick") + rows("gptq"))
    ]
    return table(["what", "method", "measured"], body) if body else ["Not measured yet: `make bench NAME=gptq`."]


def decompositions() -> list[str]:
    """Seconds and error beside tensorly; the result's speed beside dense and tensorly-torch."""
    found = rows("decompositions")
    body, fast = [], []
    for row in found:
        measured = row["measured"]
        if "seconds" in measured:
            error, times = measured["relative_error"], measured["times_faster"]
            body.append([
                row["row"].removeprefix("seconds, "), row["id"], measured["rank"],
                *(f"{1e3 * measured['seconds'][who][0]:.2f}" for who in ("own", "tensorly")),
                f"{times[0]:.1f} ({min(times):.1f} to {max(times):.1f})",
                f"{error['own']:.4f} / {error['tensorly']:.4f}",
            ])  # fmt: skip
        if "ms" in measured:
            ratio, own = measured["times_faster_than_dense"], measured["ms"]
            peers = [f"{ratio[f'tensorly-torch, {form}']:.2f}" if f"tensorly-torch, {form}" in ratio else ""
                     for form in ("factorized", "reconstructed")]  # fmt: skip
            fast.append([
                row["row"].removeprefix("latency, "), row["id"], f"{own['dense'][0]:.2f}", f"{own['own'][0]:.2f}",
                f"{ratio['own']:.2f}", *peers,
            ])  # fmt: skip
    if not found:
        return ["Not measured yet: `make bench NAME=decompositions`."]
    first = table(["layer", "method", "rank", "own ms", "tensorly ms", "times faster", "error, own / tensorly"], body)
    head = ["layer, share of numbers", "method", "dense ms", "own ms", "own", "tensorly-torch, factorized",
            "tensorly-torch, reconstructed"]  # fmt: skip
    return [*first, "", "The result in use; the last three columns: how many times faster than the dense layer.", "",
            *table(head, fast)]  # fmt: skip


def distillation() -> list[str]:
    """Accuracy on test by row, over seeds, and what it is compared with."""
    found = rows("distillation")
    if not found:
        return ["Not measured yet: `make bench NAME=distillation`."]
    many: dict[tuple[str, str, str], dict[int, Row]] = {}
    values = []
    for row in found:
        if row["row"] == "compare":
            ours, theirs = row["measured"]["ours"], row["measured"]["torchdistill"]
            values.append([row["id"], f"{ours:.6g}", "has none" if theirs is None else f"{theirs:.6g}"])
            continue
        part, mode, _ = row["row"].split(", ")
        many.setdefault((part, mode, row["id"]), {})[row["seed"]] = row
    body = []
    for (part, mode, name), seeds in many.items():
        tests = [row["measured"]["test"] for row in seeds.values()]
        beside = next(iter(seeds.values()))["setting"]["beside"]
        others = many.get((part, mode, beside), {})
        gains = [row["measured"]["test"] - others[seed]["measured"]["test"] for seed, row in seeds.items()
                 if seed in others and name != beside]  # fmt: skip
        body.append([part, mode, name, spread(tests), len(tests), beside if gains else "", signed(gains)])
    first = table(["data", "form", "row", "test accuracy %", "seeds", "beside", "points ahead"], body)
    told = "The same losses on one batch, torchdistill 1.1.5 times the factor between the two definitions:"
    return [*first, "", told, "", *table(["loss", "own", "torchdistill"], values)] if values else first


def curves(file: str) -> list[str]:
    """Test error of two ways at equal bytes: how far ours is ahead, and the sizes compared."""
    body = []
    for row in rows(file):
        measured = row["measured"]
        if "ahead_by" not in measured:
            continue
        ahead, points = measured["ahead_by"], [p for curve in measured["curves"].values() for p in curve]
        sizes = f"{min(p['bytes'] for p in points):,.0f} to {max(p['bytes'] for p in points):,.0f}"
        told = f"{ahead['mean']:+.2f}" + (f" ± {ahead['stderr']:.2f}" if "stderr" in ahead else "")
        body.append([row["id"], row["row"], len(measured["curves"]), sizes, told])
    head = ["recipe", "against", "seeds", "bytes", "points of test error ahead"]
    return table(head, body) if body else [f"Not measured yet: `make bench NAME={file}`."]


def federated() -> list[str]:
    """Accuracy and bytes of all rounds, with the dense messages as the measure."""
    found = [row for row in rows("federated") if "test_accuracy" in row["measured"]]
    many: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        mode, *messages, _ = row["row"].split(", ")
        many.setdefault((mode, ", ".join(messages)), []).append(row)
    dense = {(mode, row["seed"]): row["measured"] for (mode, name), g in many.items() if name == "dense" for row in g}
    body = []
    for (mode, name), group in many.items():
        pairs = [(row["measured"], dense[mode, row["seed"]]) for row in group if (mode, row["seed"]) in dense]
        body.append([
            mode, name, spread([row["measured"]["test_accuracy"] for row in group]),
            f"{mean(row['measured']['bytes'] for row in group) / 1e6:.2f}",
            f"{mean(theirs['bytes'] / mine['bytes'] for mine, theirs in pairs):.1f}" if pairs else "",
            signed([mine["test_accuracy"] - theirs["test_accuracy"] for mine, theirs in pairs]),
        ])  # fmt: skip
    head = ["form", "messages", "test accuracy %", "MB in all", "times fewer bytes", "points beside dense"]
    return table(head, body) if body else ["Not measured yet: `make bench NAME=federated`."]


def combinations(network: str) -> list[str]:
    """Test error of each method, each pair and the chain at equal bytes."""
    found = [row for row in rows("combinations") if row["setting"]["network"] == network]
    if not found:
        return [f'Not measured yet: `make bench NAME=combinations ARGS="--network {network}"`.']
    goals = sorted({row["row"].split(", ")[2] for row in found})
    many: dict[str, dict[str, list[Row]]] = {}
    for row in found:
        many.setdefault(row["id"], {}).setdefault(row["row"].split(", ")[2], []).append(row["measured"])
    body = []
    for name, by_goal in many.items():
        cells = []
        for goal in goals:
            group = by_goal.get(goal, [])
            good = [m for m in group if "test_error" in m]
            sizes = f"{mean(m['bytes'] for m in good):,.0f} B" if good else ""
            cells.append(
                f"{spread([m['test_error'] for m in good])} ({sizes})" if good else "out of reach" * bool(group)
            )
        body.append([name, *cells])
    return table(["methods", *(f"test error %, {goal}" for goal in goals)], body)


def smaller(file: str) -> list[str]:
    """Every method at 2 and 4 times fewer bytes, before and after fine-tuning."""
    body = []
    for name in (file, f"{file}_quick"):
        for row in rows(name):
            measured = row["measured"]
            if "before" in measured and "bytes" in measured:
                reached = "" if measured.get("reached", True) else "no"
                judged = [m.get("test_error", m.get("kl")) for m in (measured["before"], measured["after"])]
                numbers = (f"{measured['bytes']:,}", reached, *(f"{value:.4g}" for value in judged))
                body.append([name.removeprefix(file).strip("_") or "full", row["row"], row["id"], *numbers])
    head = ["form", "network and method", "id", "bytes", "so small", "before", "after fine-tuning"]
    return table(head, body) if body else [f"Not measured yet: `make bench NAME={file}`."]


def swapped() -> list[str]:
    """Accuracy, error and sizes by row."""
    body = []
    for row in rows("compact_swap"):
        found = row["measured"]
        test = (
            f"{found['test_top1']:.1f} / {found['test_top5']:.1f}" if "test_top5" in found else f"{found['test']:.1f}"
        )
        missed = f"{found['error']:.3f}" if "error" in found else ""
        sizes = (f"{found[key]:,}" for key in ("bytes", "parameters", "macs"))
        body.append([row["setting"]["mode"], row["row"], test, missed, *sizes])
    if not body:
        return ["Not measured yet: `make bench NAME=compact_swap`."]
    return table(["form", "network, block, stage", "test %", "variance missed", "bytes", "parameters", "MACs"], body)


Section = tuple[str, str, Callable[[], list[str]]]

ZOO = """\
Channels removed from networks with random weights until half of the parameters are left. Equal to the masked reference
within 1e-4, saved and loaded, run in onnxruntime, trained for a step. torch-pruning is given the layers its readme
tells everybody to ignore and no other hint; its ratio is searched. Seconds are processor time of one thread for tracing
and pruning, MB the peak memory of the process, medians over what succeeds."""
FACTORS = """\
Ranks come from one budget for the network, and SVD splits the matrices that a method does not. On LeNet-5 the budget
takes nearly all from the matrices, so that methods for convolutions come out the same."""
SWAPPED = """\
All 3x3 layers of a kind swapped at once: started from the weights alone, with least squares, with regression on the
calibration images, and fine-tuned. Top-1 / top-5 for SqueezeNet, which is not fine-tuned; its published weights are
sparse, so that its file is short already. Variance missed: of the outputs of a layer, in the mean, on other samples."""
QUICK = """\
One seed and a short fine-tuning: a comparison of criteria under equal conditions, no statement about what a long
training recovers."""
LOWBIT = """\
Every quantizer from the same trained network, for the same epochs with the same optimizer; first and last layer in 8
bits. Bytes are the length of the re-loaded file the error is of. Published figures are of long trainings from
scratch."""
RECURRENT = """\
The LSTM's weights quantized and trained on from the same fp32 network; the 872 dev sentences are the test, read once.
One sentence more or less of them is 0.11 points."""
INT8_LATENCY = """\
Batch 1, random weights, all files of a row called in turn in one process. The tools are onnxruntime's `quantize_static`
and `nncf.quantize`, on the same fp32 export and the same calibration. A ratio below 1: ours is faster. The layers of
`bert_base` are copies of one (torch makes them so), whose constants OpenVINO stores once: its bytes are no saving."""
INT8_ACCURACY = """\
Real weights; every tool calibrates on the same images, seed by seed. ResNets on the 1,017 lossless test images of
CIFAR-10, SqueezeNet on 500 images of ImageNet. Paired intervals and the images that changed are in the file."""
CAUSALITY = """\
Units removed by intervention against the network's own predictions; magnitude and random take as many of each
group."""
DECOMPOSITIONS = """\
Random weights, one thread, own form and tensorly's in turn; medians, and the range of the ratio. No training."""
SMALLER = """\
The largest setting whose fp32 file, loaded again, is so much smaller; error in percent, for stories260K the KL
divergence from the original. ``dense`` is the network itself."""
DISTILLATION = """\
Students from the same start and for the same epochs as the student alone; nothing is chosen by test."""
EQUAL = """\
The same network and the same epochs; errors are interpolated at sizes that both reached, seed by seed. Positive: the
first is ahead."""
COMBINED = """\
Every row is trained for the same epochs at the setting that gives these bytes; entropy coding (``code``) is a method
of its own here."""
FEDERATED = """\
10 clients with images of two to four classes each; bytes are the lengths of all messages, both ways."""
SPARSE = "One matrix product with zeros, in runtimes that have kernels for them, beside the dense product."

SECTIONS: tuple[Section, ...] = (
    ("Half the parameters of any network, no hints (`zoo`)", ZOO, zoo),
    ("ResNet-20 on CIFAR-10, every criterion (`cifar_channels --quick`)", QUICK, lambda: cifar("quick")),
    (
        "ResNet-20 on CIFAR-10, the best of each tool (`cifar_channels --finals`)",
        "Criterion and scope of each tool chosen on val in the table above.",
        lambda: cifar("finals"),
    ),
    ("Latency of pruned networks (`latency_channels`)", "Half the channels of every group, batch 1.", latency),
    ("Kernels for zeros (`sparse_kernels`)", SPARSE, sparse),
    ("Single weights (`unstructured`)", "Every criterion that scores weights, and random.", unstructured),
    ("Causality (`causality`)", CAUSALITY, causality),
    ("Few bits, LeNet-5 on MNIST (`lowbit`)", LOWBIT, lambda: lowbit("lenet5")),
    ("Few bits, ResNet-20 on CIFAR-10 (`lowbit --network resnet20`)", LOWBIT, lambda: lowbit("resnet20")),
    ("Binary and ternary weights of an LSTM, SST-2 (`recurrent`)", RECURRENT, recurrent),
    ("int8 beside the runtimes' own tools: time (`int8_latency`)", INT8_LATENCY, int8_latency),
    ("int8 beside the runtimes' own tools: accuracy (`int8_accuracy`)", INT8_ACCURACY, int8_accuracy),
    ("Rounding with error feedback (`gptq`)", "All layers in 4 bits, no training.", gptq),
    ("Binary layers by XNOR and popcount (`popcount`)", "Median milliseconds, batch 1, fp32 in and out.", popcount),
    ("Decompositions beside tensorly (`decompositions`)", DECOMPOSITIONS, decompositions),
    ("Layers as products (`factors`)", f"{SMALLER}\n{FACTORS}", lambda: smaller("factors")),
    ("Weights made from few numbers (`structured`)", SMALLER, lambda: smaller("structured")),
    ("Compact blocks (`compact_swap`)", SWAPPED, swapped),
    ("Distillation (`distillation`)", DISTILLATION, distillation),
    ("Pruned and quantized together, or one after the other (`joint`)", EQUAL, lambda: curves("joint")),
    ("Compressed while fine-tuned to another task, or after (`transfer`)", EQUAL, lambda: curves("transfer")),
    ("Methods, pairs and the chain, LeNet-5 (`combinations`)", COMBINED, lambda: combinations("lenet5")),
    ("Methods, pairs and the chain, ResNet-20 (`combinations`)", COMBINED, lambda: combinations("resnet20")),
    ("Federated averaging (`federated`)", FEDERATED, federated),
)


def page() -> str:
    """The whole page."""
    lines = ["# Benchmarks", "", "Generated by `make docs` from benchmarks/results. Run one again with"]
    lines += ["`make bench NAME=...`; every row in the files holds its setting, seed, date and machine.", ""]
    for title, about, body in SECTIONS:
        lines += [f"## {title}", "", about, "", *body(), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page())
