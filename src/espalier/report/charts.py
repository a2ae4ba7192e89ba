"""Charts as inline SVG. Colours come from the page's style sheet by class; every mark carries its number as a title."""

from __future__ import annotations

import math
from collections.abc import Sequence

from espalier.report import units
from espalier.report.budget import KINDS, Parts
from espalier.report.markup import Markup, el
from espalier.report.steps import Curve
from espalier.report.tries import Try


def kind_class(kind: str) -> str:
    """Style class of a kind of bytes; kinds this version does not know share one."""
    return f"k-{kind}" if kind in KINDS else "k-other"


def linear_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2, 5 x 10^k) within ``low..high``, roughly ``about`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within ``low..high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    return marks if len(marks) <= 7 else [mark for mark in marks if f"{mark:e}"[0] == "1"]


def stacked(parts: Parts, scale: float, label: str, css: str = "bar") -> Markup:
    """One bar of stacked parts, ``scale`` bytes wide."""
    marks, x = [], 0.0
    for kind, size in parts:
        width = 1000 * size / scale if scale > 0 else 0
        title = el("title", f"{kind}: {units.size(size)} ({size:,} bytes)")
        marks.append(el("rect", title, x=_n(x), y=0, width=_n(width), height=20, class_=kind_class(kind)))
        x += width
    return el("svg", marks, class_=css, viewBox="0 0 1000 20", preserveAspectRatio="none", role="img", aria_label=label)


def strip(values: Sequence[float], levels: Sequence[float], full: float, worst: float, unit: str) -> Markup:
    """One cell per level, the darker the more of the way from ``full`` to ``worst`` is lost."""
    marks, width = [], 1000 / max(1, len(values))
    for place, (value, level) in enumerate(zip(values, levels, strict=True)):
        lost = min(1.0, max(0.0, (full - value) / (full - worst))) if full != worst else 0.0
        title = el("title", f"{units.percent(level)} removed: {units.value(value, unit)}")
        marks.append(
            el(
                "rect",
                title,
                x=_n(place * width),
                y=0,
                width=_n(width - 6),
                height=20,
                class_="heat",
                fill_opacity=_n(0.06 + 0.94 * lost),
            )
        )
    said = ", ".join(f"{units.percent(level)}: {units.value(v, unit)}" for v, level in zip(values, levels, strict=True))
    return el(
        "svg", marks, class_="bar", viewBox="0 0 1000 20", preserveAspectRatio="none", role="img", aria_label=said
    )


def curve(series: Curve) -> Markup:
    """A small line chart with the extremes and the last value written out."""
    wide, high, left, right, top, bottom = 300, 150, 46, 12, 14, 22
    xs, ys = [x for x, _ in series.points], [y for _, y in series.points]
    x0, x1, (y0, y1) = min(xs), max(xs), _padded(min(ys), max(ys))

    def px(x: float) -> float:
        return left + (wide - left - right) * ((x - x0) / (x1 - x0) if x1 > x0 else 0.5)

    def py(y: float) -> float:
        return top + (high - top - bottom) * (y1 - y) / (y1 - y0)

    marks = [_rule(left, wide - right, py(y), _tick(y)) for y in linear_ticks(y0, y1, 4)]
    marks += [
        el("text", f"{x:g}", x=_n(px(x)), y=high - 6, class_="tick", text_anchor=anchor)
        for x, anchor in ((x0, "start"), (x1, "end"))
    ]
    line = " ".join(f"{_n(px(x))},{_n(py(y))}" for x, y in series.points)
    marks.append(el("polyline", points=line, class_="line"))
    last_x, last_y = series.points[-1]
    shown = units.value(last_y, series.unit) if series.unit else units.significant(last_y)
    marks.append(
        el("circle", el("title", f"epoch {last_x:g}: {shown}"), cx=_n(px(last_x)), cy=_n(py(last_y)), r=3, class_="dot")
    )
    drawn = el("svg", marks, viewBox=f"0 0 {wide} {high}", role="img", aria_label=f"{series.label} over epochs")
    caption = el("figcaption", series.label, el("b", shown))
    return el("figure", caption, drawn, class_="curve")


def scatter(tries: Sequence[Try], metric: str, unit: str) -> Markup:
    """Bytes against the metric, one mark per try: filled when kept, ringed when it is the file that was written."""
    shown = [(t, float(t.bytes), t.metric) for t in tries if t.bytes and t.metric is not None]
    if len(shown) < 2:
        return Markup()
    wide, high, left, right, top, bottom = 720, 320, 64, 24, 16, 46
    sizes = [size for _, size, _ in shown]
    log = max(sizes) > 8 * min(sizes)
    x0, x1 = (min(sizes) / 1.15, max(sizes) * 1.15) if log else _padded(min(sizes), max(sizes))
    y0, y1 = _padded(min(y for *_, y in shown), max(y for *_, y in shown))

    def px(x: float) -> float:
        part = math.log(x / x0) / math.log(x1 / x0) if log else (x - x0) / (x1 - x0)
        return left + (wide - left - right) * part

    def py(y: float) -> float:
        return top + (high - top - bottom) * (y1 - y) / (y1 - y0)

    marks = [_rule(left, wide - right, py(y), _tick(y)) for y in linear_ticks(y0, y1, 4)]
    for x in log_ticks(x0, x1) if log else linear_ticks(x0, x1, 5):
        marks.append(el("text", units.size(x), x=_n(px(x)), y=high - 26, class_="tick", text_anchor="middle"))
        marks.append(el("line", x1=_n(px(x)), x2=_n(px(x)), y1=top, y2=high - bottom, class_="grid"))
    axis = f"file size{' (logarithmic)' if log else ''}"
    marks.append(el("text", axis, x=wide - right, y=high - 6, class_="tick", text_anchor="end"))
    named = f"{metric or 'metric'}, val{f' ({unit})' if unit else ''}"
    marks.append(el("text", named, x=left + 6, y=top + 8, class_="tick"))
    for one, size, y in sorted(shown, key=lambda entry: entry[0].kept):
        marks.append(_mark(one, px(size), py(y), unit, numbered=len(shown) <= 30))
    return el(
        "svg",
        marks,
        class_="scatter",
        viewBox=f"0 0 {wide} {high}",
        role="img",
        aria_label=f"tries: {named} against {axis}",
    )


def _mark(one: Try, x: float, y: float, unit: str, *, numbered: bool) -> Markup:
    assert one.bytes is not None  # noqa: S101 - scatter shows only complete tries
    assert one.metric is not None  # noqa: S101
    title = el("title", f"try {one.number}: {units.size(one.bytes)}, {units.value(one.metric, unit)}")
    marks = [el("circle", title, cx=_n(x), cy=_n(y), r=5, class_="kept" if one.kept else "tried")]
    if one.final:
        marks.append(el("circle", cx=_n(x), cy=_n(y), r=9, class_="final"))
    if numbered:
        marks.append(el("text", str(one.number), x=_n(x + (12 if one.final else 8)), y=_n(y + 4), class_="number"))
    return el("g", marks)


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", units.MINUS) if abs(value) > 1e-12 else "0"


def _rule(x1: float, x2: float, y: float, label: str) -> Markup:
    text = el("text", label, x=_n(x1 - 6), y=_n(y + 4), class_="tick", text_anchor="end")
    return el("g", el("line", x1=_n(x1), x2=_n(x2), y1=_n(y), y2=_n(y), class_="grid"), text)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little room above and below, so that no mark touches the frame; equal ends are set apart."""
    spread = high - low
    room = 0.06 * spread if spread > 1e-9 * max(abs(low), abs(high)) else 0.05 * abs(high) or 1.0
    return low - room, high + room


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
