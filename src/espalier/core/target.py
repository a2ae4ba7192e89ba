"""Target: what the user asks for, in the user's units."""

from __future__ import annotations

import re
from dataclasses import dataclass

from espalier.core.errors import UsageError

UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
"""kB = 1000, KiB = 1024."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """At most ``size`` bytes (or ``times`` smaller), a drop of at most ``max_drop``, within ``minutes``.

    ``times`` counts against the length of the original saved as fp32 safetensors; ``max_drop`` is in the metric's
    unit, point estimate on val.
    """

    size: int | None = None
    times: float | None = None
    max_drop: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.times is not None:
            raise UsageError("give the size in bytes or as a ratio, not both.")
        for name in ("size", "times", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name}={value!r} must be a positive number.")
        if self.max_drop is not None and not 0 <= self.max_drop < float("inf"):
            raise UsageError(f"max_drop={self.max_drop!r} must be 0 or more, in the metric's unit.")

    @classmethod
    def parse(cls, *, size: str | None = None, max_drop: float | None = None, minutes: float | None = None) -> Target:
        """``size``: ``"10x"``, ``"200kB"``, ``"1.5MiB"`` or a plain number of bytes."""
        if size is None:
            return cls(max_drop=max_drop, minutes=minutes)
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(x|[kKMG]i?B|B)?\s*", size)
        if not found:
            raise UsageError(
                f"size {size!r} is not understood; write 10x, 200kB (1000 bytes each), 1.5MiB or a number of bytes."
            )
        number, unit = float(found[1]), found[2] or "B"
        if number == float("inf"):
            raise UsageError(f"size {size!r} must be a positive number a file can have.")
        if unit == "x":
            return cls(times=number, max_drop=max_drop, minutes=minutes)
        unit = "kB" if unit == "KB" else unit
        if unit not in UNITS:
            raise UsageError(f"unit {unit!r} of {size!r} is not known; allowed: x, {', '.join(UNITS)}.")
        return cls(size=int(number * UNITS[unit]), max_drop=max_drop, minutes=minutes)

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return self == Target()

    def bytes_allowed(self, original: int) -> float:
        """Largest file length allowed, given the original's length in bytes."""
        if self.size is not None:
            return self.size
        return original / self.times if self.times is not None else float("inf")

    def to_json(self) -> dict[str, float | int]:
        """The parts that are set."""
        values = {"size": self.size, "times": self.times, "max_drop": self.max_drop, "minutes": self.minutes}
        return {name: value for name, value in values.items() if value is not None}
