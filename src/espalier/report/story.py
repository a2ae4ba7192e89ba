"""The steps of a run on the page: what each did, gained and cost, and its training curves."""

from __future__ import annotations

from espalier.report import units
from espalier.report.charts import curve, strip
from espalier.report.info import Info
from espalier.report.markup import Markup, el
from espalier.report.per_layer import PerLayer
from espalier.report.steps import QuantizationSensitivity, Sensitivity, Step
from espalier.report.tables import MAX_ROWS, table

OPEN_STEPS = 40
"""Beyond this many steps, the later ones are folded away."""


def steps_section(info: Info) -> Markup | None:
    """Every step in the order it ran."""
    if not info.steps:
        return None
    drawn = [_step(step) for step in info.steps]
    folded = None
    if len(drawn) > OPEN_STEPS:
        more = len(drawn) - OPEN_STEPS
        folded = el("details", el("summary", f"Show {units.plural(more, 'more step')}"), drawn[OPEN_STEPS:])
    return el("section", el("h2", "Steps"), drawn[:OPEN_STEPS], folded)


def _step(step: Step) -> Markup:
    time = "" if step.seconds is None else units.duration(step.seconds)
    method = f" {step.method}" if step.method and step.method != step.name else ""
    title = el("h3", step.name, el("span", method, class_="quiet name") if method else None)
    fields = ", ".join(f"{name} {value}" for name, value in step.fields)
    notes = [el("li", note) for note in step.notes]
    notes += [el("li", warning, class_="bad") for warning in step.warnings]
    return el(
        "div",
        el("div", title, el("span", time, class_="quiet n")),
        el("p", fields, class_="fields") if fields else None,
        _deltas(step),
        el("ul", notes) if notes else None,
        el("div", map(curve, step.curves), class_="curves") if step.curves else None,
        _sensitivity(step.sensitivity) if step.sensitivity else None,
        _quantization(step.quantization) if step.quantization else None,
        map(_per_layer, step.per_layer),
        class_=f"step d{step.depth}",
    )


def _deltas(step: Step) -> Markup | None:
    rows = [
        [
            delta.label,
            delta.before,
            "→" if delta.before else "",
            delta.after,
            el("span", delta.change, class_={True: "good", False: "bad", None: "quiet"}[delta.better]),
        ]
        for delta in step.deltas
    ]
    return table(["", "", "", "", ""], rows, numbers=(1, 3)) if rows else None


def _per_layer(found: PerLayer) -> Markup:
    rows = [[el("span", name, class_="name"), value] for name, value in found.entries]
    summary = el("summary", f"{found.label}: {found.range}")
    return el("details", summary, table(["", found.label], rows, numbers=(1,)))


def _sensitivity(found: Sensitivity) -> Markup:
    """Group by group, most sensitive first: units, a strip of cells, the worst value."""
    pick = min if found.higher else max
    worst = pick(pick(values) for _, _, values in found.groups)
    ranked = sorted(found.groups, key=lambda group: sum(group[2]), reverse=not found.higher)
    rows = [
        el(
            "tr",
            el("td", el("span", name, class_="name")),
            el("td", f"{size:,}", class_="n"),
            el("td", strip(values, found.levels, found.full, worst, found.unit), class_="bar-cell"),
            el("td", units.value(pick(values), found.unit), class_="n"),
        )
        for name, size, values in ranked[:MAX_ROWS]
    ]
    shares = ", ".join(units.percent(level) for level in found.levels)
    heads = (("group", None), ("units", "n"), (f"{shares} of its units removed", None), ("at the worst", "n"))
    head = el("thead", el("tr", (el("th", text, class_=css, scope="col") for text, css in heads)))
    lead = f"Sensitivity: {found.label}, {units.value(found.full, found.unit)} with all units. Darker loses more."
    return el("div", el("p", lead, class_="quiet"), el("table", head, el("tbody", rows)), class_="scroll")


def _quantization(found: QuantizationSensitivity) -> Markup:
    """Layer by layer, most sensitive first: its bits, the metric with it alone quantized, and with all but it."""
    ranked = sorted(found.layers, key=lambda layer: (layer[2], -layer[3]), reverse=not found.higher)
    rows = [
        [el("span", name, class_="name"), bits, units.value(on, found.unit), units.value(off, found.unit)]
        for name, bits, on, off in ranked[:MAX_ROWS]
    ]
    lead = (
        f"Quantization sensitivity: {found.label}, {units.value(found.full, found.unit)} with no layer quantized and "
        f"{units.value(found.everything, found.unit)} with all of them."
    )
    heads = ["layer", "bits", "it alone quantized", "all but it quantized"]
    return el("div", el("p", lead, class_="quiet"), table(heads, rows, numbers=(2, 3)), class_="scroll")
