"""How numbers and names are written. kB = 1000 bytes."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
NAME_LIMIT = 200


def significant(value: float, digits: int = 3) -> str:
    """``digits`` significant digits, thousands separated, no exponent between 1e-4 and 1e15."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if round(abs(value), places) >= 10 ** (digits - places):  # 9.999 -> 10.0
        places -= 1
    return f"{value:,.{max(0, places)}f}".replace("-", MINUS)


def size(count: float) -> str:
    """Bytes: ``812 B``, ``17.9 kB``, ``1.07 MB``."""
    value = abs(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < (1000 if unit == "B" else 999.5) or unit == "TB":
            text = f"{value:,.0f}" if unit == "B" else significant(value)
            return f"{MINUS if count < 0 else ''}{text} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def count(value: float) -> str:
    """Counts: exact below ten million, then ``25.6 M``, ``4.09 G``."""
    if abs(value) < 10_000_000:
        return (f"{value:,.0f}" if float(value).is_integer() else significant(value)).replace("-", MINUS)
    value, unit = value / 1000, "k"
    for larger in "MGT":
        if abs(value) >= 999.5:
            value, unit = value / 1000, larger
    return f"{significant(value)} {unit}"


def times(ratio: float) -> str:
    """A ratio of at least 1: ``59.6x``."""
    return f"{significant(ratio)}x"


def percent(fraction: float) -> str:
    """A fraction 0..1: ``7.9 %``."""
    value = 100 * fraction
    if 0 < value < 0.05:
        return "<0.1 %"
    if 99.95 <= value < 100:
        return ">99.9 %"
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %"


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds < 59.95:
        return f"{significant(seconds) if seconds < 10 else f'{seconds:.1f}'} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def value(number: float, unit: str = "", stderr: float | None = None) -> str:
    """A metric: ``1.62 ± 0.13 %`` (two decimals in percent), ``0.412 ± 0.010``; decimals follow the unit."""
    places = places_of(number, unit)
    text = _fixed(number, places)
    if stderr is not None:
        text += f" ± {stderr:.{places}f}"
    return f"{text} {unit}".strip()


def signed(number: float, unit: str = "", like: float | None = None) -> str:
    """A change with its sign: ``+0.04 points`` where the unit is percent; as many decimals as ``like`` is given."""
    places = places_of(number if like is None else like, unit)
    text = _fixed(number, places)
    if not text.strip("0.−"):
        return "no change" if number == 0 else f"less than {10**-places:.{places}f}{_points(unit)}"
    return f"{'+' if number > 0 else ''}{text}{_points(unit)}"


def _points(unit: str) -> str:
    return " points" if unit == "%" else f" {unit}" if unit else ""


def drop(number: float, unit: str) -> str:
    """How much worse, in the metric's unit: ``0.04 points`` where that is percent."""
    places = places_of(number, unit)
    return f"{_fixed(number, places)}{_points(unit)}"


def places_of(number: float, unit: str) -> int:
    """Decimals of a metric: two in percent, else four significant digits."""
    if unit == "%" or number == 0:
        return 2
    return max(0, min(9, 3 - math.floor(math.log10(abs(number)))))


def _fixed(number: float, places: int) -> str:
    return f"{number:,.{places}f}".replace("-", MINUS)


def printable(text: object, limit: int = NAME_LIMIT) -> str:
    """A string safe to show anywhere: one line, control and direction characters replaced, cut at ``limit``."""
    joined = " ".join(str(text)[: 4 * limit].split())
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in joined)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def plural(number: int, noun: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
