r"""Iterate until: a cheap step again and again, then the next one, until the file is small enough.

Paper    Yang, Howard, Chen, Zhang, Go, Sandler, Sze, Adam. NetAdapt: Platform-Aware Neural Network Adaptation for
         Mobile Applications. ECCV 2018. arXiv:1804.03230 (constraints tightened step by step on measured figures)
Formula  for each step in order: while bytes(M) > size: M' = step(M);   M <- M' if drop(M') <= max_drop and
         bytes(M') < bytes(M), else on to the next step
Departs  What is repeated are whole steps of any kind, cheapest first, in place of one layer's width at a time; the
         measured resource is the length of the encoded file, the accuracy is that on val. A recipe that gets stronger
         starts over from the M it was first given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, ModelError, NoEffectWarning, PhaseError, UnknownNameError, UsageError
from espalier.core.fields import Count, Rounds, Tolerance
from espalier.core.method import Technique, field_names
from espalier.core.metric import Score
from espalier.core.model import copy_model
from espalier.core.recipe import Recipe
from espalier.core.selection import select
from espalier.core.target import Target
from espalier.measure import fp32_safetensors_bytes
from espalier.measure.frozen import file_length
from espalier.prune import Cubic, Global, Prune
from espalier.prune.removing import Removing
from espalier.share import KMeans

DEFAULT_SPARSITY = 0.5
CODERS = ("adaptive",)
"""The coder that is smallest for nearly every tensor; trying all of them after every step takes their time."""


def deepened(step: Technique, times: int, rounds: int, model: nn.Module) -> Technique:
    """``step`` as it is run for the ``times``-th time (from 1) of at most ``rounds``, each stronger than the last.

    Pruning takes its share of what is left, first of what ``model`` has, a recipe with a strength goes up to it in
    equal parts, a list of steps hands this on; other steps, and those that remove units of what is there now, stay as
    they are.
    """
    if isinstance(step, Recipe):
        return step.replace(steps=tuple(deepened(inner, times, rounds, model) for inner in step.steps))
    if isinstance(step, Prune) and isinstance(step.sparsity, float) and not isinstance(step.pattern, Removing):
        kept: float = (1 - step.sparsity) ** times
        return step.replace(sparsity=1 - left(model, step.layers) * kept)
    strength = getattr(step, "strength", None) if "strength" in field_names(type(step)) else None
    return step if strength is None else step.replace(strength=strength * times / rounds)


def left(model: nn.Module, layers: tuple[str, ...]) -> float:
    """The share of the weights of ``layers`` that is not zero; 1 where the model has none of them yet."""
    try:
        values = [slot.value() for slot in select(model, layers)]
    except UnknownNameError:
        values = []
    nonzero = sum(int(value.count_nonzero()) for value in values)
    return nonzero / sum(value.numel() for value in values) if nonzero else 1.0


def begins_anew(step: Technique, model: nn.Module) -> bool:
    """Whether a stronger ``step`` starts from what the first one had, as a recipe cannot change its own codes."""
    return not isinstance(step, Prune) and deepened(step, 2, 3, model) != step


def _default_steps() -> tuple[Technique, ...]:
    prune = Prune(scope=Global(), schedule=Cubic(), sparsity=DEFAULT_SPARSITY, epochs=3, lr=1e-3)
    return prune, KMeans(bits=5, epochs=2, lr=3e-4)


@dataclass(frozen=True, kw_only=True)
class IterateUntil(Technique):
    """Repeat each of ``steps`` up to ``rounds`` times, in their order, until the file has at most ``size``.

    ``size``: ``"10x"`` smaller than the model as fp32 safetensors, ``"200kB"``, or a number of bytes; without any the
    steps go on as long as they help. ``max_drop``: of the metric on val, in its unit. Both count against the original;
    what is measured is the weights-only file. The best that keeps ``max_drop`` is handed back.
    """

    id: ClassVar[str] = "iterate-until"
    steps: tuple[Technique, ...] = field(default_factory=_default_steps)
    size: str | Count | None = "10x"
    max_drop: Tolerance = 1.0
    rounds: Rounds = 8

    @property
    def needs(self) -> frozenset[str]:
        """Data to decide on, and what the steps need."""
        return super().needs | {"val"}

    def conflicts(self) -> list[str]:
        try:
            self.target()
        except UsageError as error:
            return [str(error).rstrip(".")]
        return [] if self.steps else ["steps is empty, so there is nothing to repeat"]

    def target(self) -> Target:
        """What is asked for."""
        return Target.parse(size=None if self.size is None else str(self.size), max_drop=self.max_drop)

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Step by step, each on a copy of the best so far, or of what that was when a recipe's turn came."""
        search = _Search.of(self, model, context)
        for number, step in enumerate(self.steps, 1):
            before = search.model
            anew = begins_anew(step, before)
            for times in range(1, self.rounds + 1):
                if search.met or context.out_of_time():
                    break
                name = f"{number:02d}-{step.id}-{times:02d}"
                stronger = deepened(step, times, self.rounds, before)
                if not search.attempt(stronger, before if anew else search.model, name):
                    break
        search.say()
        return search.model


@dataclass
class _Search:
    """The best so far, how long its file is, how much worse it is than the start, and all that was tried."""

    method: IterateUntil
    context: Context
    model: nn.Module
    limit: float
    before: Score
    length: int
    drop: float
    smallest: dict[str, Any] | None = None
    tries: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, method: IterateUntil, model: nn.Module, context: Context) -> _Search:
        original = context.models.get("original", model)
        limit = 0.0 if method.size is None else method.target().bytes_allowed(fp32_safetensors_bytes(original))
        before = context.measure(original)
        drop = context.data.scorer().drop(before, context.measure(model)) if original is not model else 0.0
        return cls(method, context, model, limit, before, file_length(model, context, CODERS), drop)

    @property
    def met(self) -> bool:
        """Whether the best so far is small enough."""
        return self.length <= self.limit

    def attempt(self, step: Technique, start: nn.Module, name: str) -> bool:
        """Run ``step`` on a copy of ``start``; whether that became the best, so that it may help again."""
        try:
            model = self.context.run(step, copy_model(start), name)
        except (ModelError, PhaseError) as error:
            self.tries.append({"name": name, "kept": False, "reason": str(error)})
            return False
        length, score = file_length(model, self.context, CODERS), self.context.measure(model)
        drop = self.context.data.scorer().drop(self.before, score)
        reason = ""
        if drop > self.method.max_drop:
            reason = f"a drop of {drop:.2f}, above the {self.method.max_drop:g} allowed"
        elif length >= self.length:
            reason = f"no smaller than the {self.length:,} bytes before"
        row = {"name": name, "bytes": length, "metric": score.value, "drop": drop, "kept": not reason, "reason": reason}
        self.tries.append(row)
        if self.smallest is None or length < self.smallest["bytes"]:
            self.smallest = row
        if not reason:
            self.model, self.length, self.drop = model, length, drop
        return not reason

    def say(self) -> None:
        """What came of it, into the record; what is missing, as a warning."""
        details = self.context.record.details
        details["tries"] = self.tries
        details |= {"bytes": self.length, "drop": self.drop, "met": self.met}
        if self.method.size is None:
            details.pop("met")
        elif not self.met:
            details["bytes_allowed"] = int(self.limit)
            self.context.warn(self.gap(), NoEffectWarning if not self.kept else EspalierWarning)
            return
        if not self.kept:
            self.context.warn(
                f"{self.method.name}: {self.reason()}; the model is handed back as it came.", NoEffectWarning
            )

    @property
    def kept(self) -> bool:
        """Whether any try became the best."""
        return any(row["kept"] for row in self.tries)

    def reason(self) -> str:
        """Why nothing was kept."""
        if not self.tries:
            return "the file is small enough already" if self.met else "the time is up"
        return f"no step helped ({'; '.join(str(row['reason']) for row in self.tries)})"

    def gap(self) -> str:
        """How far the target is away."""
        text = (
            f"{self.method.name}: the target is out of reach of these steps: {self.length:,} bytes at a drop of "
            f"{self.drop:.2f}, {self.length - int(self.limit):,} more than the {int(self.limit):,} allowed."
        )
        if self.smallest is not None and self.smallest["bytes"] < self.length:
            text += (
                f" The smallest try had {self.smallest['bytes']:,} bytes, but a drop of {self.smallest['drop']:.2f}."
            )
        return f"{text} Allow a larger max_drop, more rounds, or add a stronger step."
