"""Harmful orders: pairs of steps that undo or waste each other, and steps that leave out the one that must follow.

A step has *traits*, a rule names two of them. Whole recipes count as the steps in their fields, in that order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from espalier.core.method import Technique
from espalier.core.recipe import Recipe
from espalier.prune import OneShot, Prune
from espalier.prune.parts import Projection
from espalier.prune.removing import Removing
from espalier.quantize import MixedBits, Quantize
from espalier.train import BatchNorm, Training

HARD = 0.8
"""Share of single weights from which on one-shot pruning needs a training after it."""


@dataclass(frozen=True)
class Rule:
    """It harms when a step with the trait ``first`` comes before one with ``then``; ``says`` why, and what to do.

    ``unless``: where the second step, or a later one, has that trait, it does no harm.
    """

    first: str
    then: str
    says: str
    unless: str = ""


RULES = (
    Rule("codes", "masks", "it would zero weights whose values are fixed. Prune first: zero becomes a code of its own"),
    Rule("codes", "removes", "grids and codebooks were fitted to channels that leave. Remove channels first"),
    Rule("codes", "factorizes", "factors of coded weights have no codes. Factorize first, then quantize the factors"),
    Rule("masks", "factorizes", "factors of a pruned weight have no zeros. Factorize first, then prune the factors"),
    Rule("codes", "structures", "the structured weight has other values. Give it its structure first"),
    Rule("masks", "structures", "the structured weight has no zeros. Give it its structure first, then prune"),
    Rule("codes", "swaps", "the new layers have neither the codes nor the values. Swap layers first"),
    Rule("codes", "folds", "a batch norm folded into few values makes many of them. Fold it before"),
    Rule("codes", "equalises", "it rescales channels whose values are fixed. Equalise first"),
    Rule("int8", "trains", "the ranges of an int8 network were calibrated for the weights before it. Train first"),
    Rule("distils", "removes", "the distillation cannot repair what comes after it. Distil afterwards", "trains"),
    Rule("distils", "factorizes", "the distillation cannot repair what comes after it. Distil afterwards", "trains"),
    Rule("distils", "swaps", "the distillation cannot repair what comes after it. Distil afterwards", "trains"),
)  # fmt: skip
MISSING = (
    Rule("hard", "trains", "so much at once costs accuracy that training gives back. Add train.finetune after it, or "
         "prune while training (epochs)"),
)  # fmt: skip
"""Steps with the trait ``first`` that no later step with ``then`` follows."""

TRAITS: dict[str, frozenset[str]] = {
    "share.kmeans": frozenset({"codes"}),
    "quantize.ptq-int8": frozenset({"codes", "int8", "folds"}),
    "quantize.equalise": frozenset({"folds", "equalises"}),
    "quantize.smoothquant": frozenset({"equalises"}),
    "recipes.prune-quantize": frozenset({"masks", "codes"}),
    **dict.fromkeys(
        ("prune.regularize", "prune.dropout", "prune.backward", "prune.loss-prune", "prune.causality"),
        frozenset({"masks"}),
    ),
    "compact.swap": frozenset({"swaps"}),
}
"""What steps do whose fields need no look."""


def traits(step: Technique) -> frozenset[str]:
    """What a single step does, in the words of the rules."""
    found = set(TRAITS.get(step.name, ()))
    if isinstance(step, Training) and step.epochs:
        found.add("trains")
    if step.verb == "distill":
        found |= {"distils", "trains"}
    if step.verb == "factorize":
        found.add("factorizes")
    if step.verb == "share" and step.id != "kmeans":
        found.add("structures")
    if isinstance(step, BatchNorm) and step.mode == "fold":
        found.add("folds")
    if isinstance(step, Prune):
        found |= _pruning(step)
    quantize = step.step if isinstance(step, MixedBits) else step
    if isinstance(quantize, Quantize) and quantize.weights is not None:
        found.add("codes")
    return frozenset(found)


def _pruning(step: Prune) -> set[str]:
    if isinstance(step.pattern, Projection):
        return set()
    if isinstance(step.pattern, Removing):
        return {"removes"}
    asked = step.sparsity.values() if isinstance(step.sparsity, dict) else (step.sparsity or 0.0,)
    at_once = not step.epochs and isinstance(step.schedule, OneShot) and max(asked, default=0.0) >= HARD
    return {"masks", "hard"} if at_once else {"masks"}


def leaves(technique: Technique) -> Iterator[Technique]:
    """The single steps of a recipe in the order they run."""
    inner = [part for part in technique.parts() if isinstance(part, Technique)]
    whole = technique.verb == "recipes" and inner and not isinstance(technique, Training)
    if not whole and not isinstance(technique, Recipe):
        yield technique
        return
    for step in inner:
        yield from leaves(step)


def harmful(recipe: Technique) -> list[str]:
    """A sentence for every step in a harmful order, and for every one that lacks the step that must follow."""
    steps = [(f"step {n} ({step.name})", traits(step)) for n, step in enumerate(leaves(recipe), 1)]
    found = []
    for n, (name, its) in enumerate(steps):
        later = frozenset[str]().union(*(others for _, others in steps[n + 1 :]))
        for rule in RULES:
            earlier = [other for other, others in steps[:n] if rule.first in others]
            if rule.then in its and earlier and rule.unless not in later | its:
                found.append(f"{name} comes after {earlier[-1]}: {rule.says}.")
        found += [f"nothing {rule.then} after {name}: {rule.says}." for rule in MISSING
                  if rule.first in its and rule.then not in later]  # fmt: skip
    return found
