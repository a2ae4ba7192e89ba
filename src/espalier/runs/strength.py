"""One click, first form: bisect a recipe's ``strength`` on val until the target is met or its gap is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from espalier.core.context import Context
from espalier.core.method import Technique, field_names
from espalier.core.metric import Score
from espalier.core.recipe import Recipe
from espalier.core.target import Target
from espalier.runs.directory import RunDirectory

TRIES = 7
RESOLUTION = 1 / 64


@dataclass(frozen=True)
class Outcome:
    """The try that stands at the end, whether the target is met, a sentence, and why each try was kept or not."""

    name: str
    met: bool
    message: str
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Try:
    """One strength tried: length of its file, its score on val, how much that is worse than the original."""

    name: str
    strength: float
    bytes: int
    score: Score | None
    drop: float
    seconds: float


def with_strength(recipe: Technique, strength: float) -> Technique:
    """``recipe`` at a strength; a list of steps hands it to every step that has one."""
    if isinstance(recipe, Recipe):
        steps = tuple(with_strength(step, strength) if has_strength(step) else step for step in recipe.steps)
        return recipe.replace(steps=steps)
    return recipe.replace(strength=strength)


def has_strength(recipe: Technique) -> bool:
    """Whether a target can be searched for with this recipe."""
    if isinstance(recipe, Recipe):
        return any(has_strength(step) for step in recipe.steps)
    return "strength" in field_names(type(recipe))


def search_strength(
    recipe: Technique,
    target: Target,
    directory: RunDirectory,
    *,
    attempt: Callable[[Technique, str], tuple[int, Score | None]],
    keep: Callable[[str], None],
    before: Score | None,
    drop: Callable[[Score, Score], float],
    original_bytes: int,
    context: Context,
) -> Outcome:
    """Run ``recipe`` once without a target; with one, bisect its strength. Finished tries come from the journal.

    ``attempt(recipe, name)`` runs, writes and measures; ``keep(name)`` makes a try the best so far on disk.
    """
    if target.empty:
        name = recipe.id
        if directory.find("file", name=name) is None:
            attempt(recipe, name)
        keep(name)
        return Outcome(name, met=True, message="")
    assert before is not None  # noqa: S101 - a target needs val, checked before any work
    search = _Search(target, before, original_bytes)
    while (strength := search.next_strength()) is not None:
        if search.tries and (directory.find("stop") or context.out_of_time()):
            if directory.find("stop") is None:
                directory.log("stop", reason="the minutes are spent")
            search.stopped = "the minutes are spent"
            break
        search.add(_one_try(recipe, strength, len(search.tries), directory, attempt, before, drop))
        best = search.best()
        if best is search.tries[-1]:
            keep(best.name)
    best = search.best()
    keep(best.name)
    return search.outcome()


def _one_try(
    recipe: Technique,
    strength: float,
    number: int,
    directory: RunDirectory,
    attempt: Callable[[Technique, str], tuple[int, Score | None]],
    before: Score,
    drop: Callable[[Score, Score], float],
) -> Try:
    name = f"try-{number + 1:02d}-strength-{strength:.4f}"
    done = directory.find("try", name=name)
    if done is None:
        started = time.monotonic()
        length, score = attempt(with_strength(recipe, strength), name)
        assert score is not None  # noqa: S101 - a target needs val
        done = {
            "name": name, "strength": strength, "bytes": length, "metric": score.value, "stderr": score.stderr,
            "count": score.count, "drop": drop(before, score), "seconds": round(time.monotonic() - started, 3),
        }  # fmt: skip
        directory.log("try", **done)
    score = Score(done["metric"], done["stderr"], done["count"])
    return Try(name, strength, done["bytes"], score, done["drop"], done["seconds"])


class _Search:
    """The state of a bisection over strength 0..1: stronger is smaller and worse."""

    def __init__(self, target: Target, before: Score, original_bytes: int) -> None:
        self.limit = target.bytes_allowed(original_bytes)
        self.sized = target.size is not None or target.times is not None
        self.allowed = (
            target.max_drop if target.max_drop is not None else (float("inf") if self.sized else before.stderr)
        )
        self.before, self.target = before, target
        self.tries: list[Try] = []
        self.low, self.high = 0.0, 1.0
        self.stopped = ""

    def fits(self, item: Try) -> bool:
        """Whether a try meets the size."""
        return item.bytes <= self.limit

    def good(self, item: Try) -> bool:
        """Whether a try keeps the drop."""
        return item.drop <= self.allowed

    def next_strength(self) -> float | None:
        """The next strength, or None when the interval is small enough, the tries are used up or the gap is known."""
        if len(self.tries) >= TRIES or self.high - self.low < RESOLUTION:
            return None
        if not self.tries:
            return 0.5
        done = {item.strength for item in self.tries}
        for edge, inside in ((1.0, self.low), (0.0, self.high)):
            if inside == 0.5 and edge not in done and len(self.tries) == 1:  # look at the far end once
                return edge
        middle = (self.low + self.high) / 2
        return None if middle in done else middle

    def add(self, item: Try) -> None:
        """Move one end of the interval to the strength just tried."""
        self.tries.append(item)
        if not self.good(item):
            stronger = False
        elif not self.fits(item):
            stronger = True
        else:
            stronger = self.target.max_drop is not None or not self.sized
        if stronger:
            self.low = max(self.low, item.strength)
        else:
            self.high = min(self.high, item.strength)

    def best(self) -> Try:
        """Smallest that keeps the drop and meets the size; for a size alone the best metric; else the nearest miss."""
        both = [item for item in self.tries if self.fits(item) and self.good(item)]
        if both and self.sized and self.target.max_drop is None:
            return min(both, key=lambda item: (item.drop, item.bytes))
        if both:
            return min(both, key=lambda item: (item.bytes, item.drop))
        good = [item for item in self.tries if self.good(item)]
        if good:
            return min(good, key=lambda item: item.bytes)
        if self.sized and not self.target.max_drop and any(map(self.fits, self.tries)):
            return min(filter(self.fits, self.tries), key=lambda item: item.drop)
        return min(self.tries, key=lambda item: item.drop)

    def outcome(self) -> Outcome:
        """The best try and, where the target is out of reach, the gap in words."""
        best = self.best()
        met = self.fits(best) and self.good(best)
        missing = []
        if not self.fits(best):
            missing.append(
                f"{best.bytes:,} bytes, {best.bytes - int(self.limit):,} more than the {int(self.limit):,} allowed"
            )
        if not self.good(best):
            missing.append(
                f"a drop of {best.drop:.2f}, {best.drop - self.allowed:.2f} more than the {self.allowed:.2f} allowed"
            )
        text = f" Stopped because {self.stopped}." if self.stopped else ""
        if not met:
            gap = " and ".join(missing)
            text = (
                f" The target is out of reach of this recipe: the nearest of {len(self.tries)} tries has {gap}.{text}"
            )
        elif self.target.max_drop is not None and best.score is not None and self.target.max_drop < best.score.stderr:
            text += (
                f" The allowed drop is below the standard error of the metric on val ({best.score.stderr:.2f}): "
                "more val data would make the decision firm."
            )
        return Outcome(best.name, met=met, message=text.strip(), reasons={t.name: self.reason(t) for t in self.tries})

    def reason(self, item: Try) -> str:
        """Why a try is the one that is kept, or is not."""
        best = self.best()
        if item is best:
            return "kept" if self.fits(item) and self.good(item) else "nearest to the target"
        if not self.good(item):
            return f"drop above the {self.allowed:.2f} allowed"
        if not self.fits(item):
            return f"larger than the {int(self.limit):,} bytes allowed"
        return (
            "within the target, but larger than the kept one"
            if item.bytes > best.bytes
            else "within the target, but worse"
        )


def plain_tries(tries: list[dict[str, Any]], outcome: Outcome) -> list[dict[str, Any]]:
    """The tries as the record shows them."""
    return [
        {
            **{key: value for key, value in item.items() if key != "event"},
            "kept": item["name"] == outcome.name,
            "reason": outcome.reasons.get(item["name"], ""),
        }
        for item in tries
    ]
