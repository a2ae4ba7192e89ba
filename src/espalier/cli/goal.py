"""The numeric target of ``espalier prune``: what was asked, what a plan or a run reached, whether that is a miss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SLACK = 1.02
"""A target is missed by more than two percent."""
UNITS = {
    "units": "units", "parameters": "parameters", "macs": "multiply-adds", "ms": "ms",
    "bytes": "bytes of weights",
}  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """``option`` as it was given: ``share`` of ``measure`` is to go, or ``left`` may stay; units go by ``multiple``.

    ``original``: bytes of the original as fp32 safetensors, which a size is a share of.
    """

    option: str
    measure: str
    share: float
    left: float | None = None
    multiple: int = 1
    part: str | None = None
    original: int | None = None

    def of_plan(self, found: Mapping[str, Any]) -> Verdict | None:
        """What a plan reaches; None where it does not say."""
        if self.measure in ("parameters", "macs"):
            return self._judged(*found[self.measure])
        if self.measure == "units":
            return self._units(found["groups"])
        measured = _measured(found)
        if measured is None:
            return None
        before, after = measured
        return self._judged(before if self.original is None else self.original, after)

    def of_record(self, record: Mapping[str, Any]) -> Verdict | None:
        """What a run reached: counted in the model, weighed in the file; milliseconds as the step timed them."""
        details = next((step["details"] for step in record["steps"] if "groups" in step.get("details", {})), None)
        if details is None:
            return None
        if self.measure in ("parameters", "macs"):
            return self._judged(details[self.measure]["before"], details[self.measure]["after"])
        if self.measure == "units":
            return self._units(details["groups"])
        if self.measure == "bytes":
            file = record["files"]["model.weights.espalier"]
            return self._judged(record["original"]["file_bytes"], file["bytes"] - file["info"].get("plans", 0))
        measured = _measured(details)
        if measured is not None:
            return self._judged(*measured)
        times = [record[side].get("latency") for side in ("original", "compressed")]
        # timed apart and under whatever load there was: a miss is what even the fast calls do not reach
        return self._judged(times[0]["median_ms"], times[1]["p10_ms"]) if all(times) else None

    def _units(self, groups: list[dict[str, Any]]) -> Verdict:
        """Units go whole and in multiples: less than one multiple of each group too much is no miss."""
        before, after = (sum(group[side] for group in groups) for side in ("before", "after"))
        return self._judged(before, after, self.multiple * len(groups))

    def _judged(self, before: float, after: float, rounding: float = 0.0) -> Verdict:
        asked = self.left if self.left is not None else (1 - self.share) * before
        return Verdict(self.option, self.measure, asked, before, after, self.part, after <= asked * SLACK + rounding)


@dataclass(frozen=True)
class Verdict:
    """``asked``: how much may be left of ``before``; ``after``: how much is."""

    option: str
    measure: str
    asked: float
    before: float
    after: float
    part: str | None
    met: bool

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        said = (
            f"target {self.option}: at most {number(self.asked)} of {number(self.before)} {UNITS[self.measure]} asked "
            f"for, {number(self.after)} left"
        )
        if self.met:
            near = "as nearly as whole units allow" if self.measure == "units" else f"to within {SLACK - 1:.0%}"
            return f"{said}: reached." if self.after <= self.asked else f"{said}: reached {near}."
        more = f"leave out --part {self.part} so that more can go" if self.part else "see what stays, and why"
        return f"{said}: missed. Ask for less, or {more}."


def number(value: float) -> str:
    """A count as it is, a fraction with three digits."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.3g}"


def _measured(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """Before and after in the step's own measure, where it says so."""
    measured = found.get("measure")
    return (measured["before"], measured["after"]) if isinstance(measured, Mapping) else None
