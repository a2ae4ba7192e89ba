"""Reading a record: values that are there and usable, or None. Strings are made safe to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.measure.comparison import at, number
from espalier.report import units

MODEL, WEIGHTS = "model.espalier", "model.weights.espalier"


def text(value: Any) -> str:
    """A string of the record made safe to show; empty for anything that is no string."""
    return units.printable(value, 2000) if isinstance(value, str) else ""


def texts(value: Any) -> tuple[str, ...]:
    """The strings in a JSON array."""
    return tuple(text(item) for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def name_of(value: Any) -> str:
    """A string of the record as a name, cut short and made safe to show; empty for anything else."""
    return units.printable(value) if isinstance(value, str) else ""


def items(value: Any) -> list[tuple[str, Any]]:
    """What a JSON object holds; nothing for anything else."""
    return list(value.items()) if isinstance(value, Mapping) else []


def truth(value: Any) -> bool | None:
    """A truth value of the record, else None."""
    return value if isinstance(value, bool) else None


def size_of(record: Mapping[str, Any], name: str = MODEL) -> int | None:
    """Length of a written file in bytes; the self-contained one also stands in the measurement."""
    found = number(at(record, "files", name, "bytes"))
    if found is None and name == MODEL:
        found = number(at(record, "compressed", "file_bytes"))
    return None if found is None else int(found)
