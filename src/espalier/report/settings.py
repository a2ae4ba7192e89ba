"""The settings of a run: the recipe as YAML, the environment it ran in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from espalier.measure.comparison import at
from espalier.report import units

MAX_LINES = 400


@dataclass(frozen=True)
class Settings:
    """``recipe``: YAML text, empty where none was recorded; ``environment``: (name, value) in the recorded order."""

    recipe: str
    environment: tuple[tuple[str, str], ...]


def settings(record: Mapping[str, Any]) -> Settings:
    """The settings a record holds."""
    given = at(record, "environment")
    pairs = given.items() if isinstance(given, Mapping) else ()
    plain = ((units.printable(k, 60), v) for k, v in pairs if isinstance(v, (str, int, float)))
    version = at(record, "espalier")
    first = (("espalier", units.printable(version, 60)),) if isinstance(version, str) else ()
    return Settings(recipe_text(at(record, "recipe")), first + tuple((k, units.printable(v)) for k, v in plain))


def recipe_text(recipe: Any) -> str:
    """A plain recipe as YAML, at most ``MAX_LINES`` lines of printable characters."""
    if not recipe:
        return ""
    try:
        written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    except RecursionError:
        return "(nested too deeply to show)"
    lines = [
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line) for line in written.splitlines()
    ]
    more = [f"... {len(lines) - MAX_LINES:,} more lines"] if len(lines) > MAX_LINES else []
    return "\n".join(lines[:MAX_LINES] + more)
