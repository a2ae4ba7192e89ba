"""Every criterion with every pattern: it prunes what it says, or one sentence says why the two do not go together."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from espalier.api import fill_registry
from espalier.core import registry
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning, ModelError, UsageError
from espalier.prune import Activations, Criterion, Global, Heads, Layers, Linear, OneShot, Prune, Row, Tensors
from espalier.prune.parts import CutCriterion, FixedPattern, Pattern, Projection, SolvingCriterion, WatchingCriterion
from espalier.prune.removing import Removing
from espalier.testing import EXAMPLES, effective, fingerprint, outputs

fill_registry()
CRITERIA = [cls for cls in registry.methods() if issubclass(cls, Criterion)]
PATTERNS = [cls for cls in registry.methods() if issubclass(cls, Pattern)]
BY_NAME = {example.name: example for example in EXAMPLES}
NETWORK = {
    "heads": "attention",
    "layers": "twice",
    "kernel-parts": "convolution",
    "patterns": "convolution",
    "scale": "convolution",
}
"""Patterns that find nothing to do in an MLP, and the example they find something in."""


def senseless(criterion: type[Criterion], pattern: type[Pattern]) -> bool:
    """The pairs that mean nothing, written down by hand: the code must refuse exactly these."""
    if pattern in (Layers, Activations) or issubclass(pattern, Projection):  # judge by themselves
        return criterion.id != "magnitude"
    if criterion().of == "units":
        return not pattern.units
    if issubclass(criterion, CutCriterion):
        return pattern.id != "weights"
    if issubclass(criterion, SolvingCriterion):
        return pattern.id not in ("weights", "n-m")
    return False


def together(criterion: type[Criterion], pattern: type[Pattern]) -> Prune:
    """The two in one step with what each of them asks for beside it."""
    fields: dict[str, Any] = {"criterion": criterion(), "pattern": pattern()}
    if pattern is Tensors:
        fields["scope"] = Global()
    if not issubclass(criterion, CutCriterion) and not issubclass(pattern, FixedPattern):
        fields["sparsity"] = 0.5
    if issubclass(criterion, WatchingCriterion):
        fields |= {"epochs": 2, "schedule": Linear()}
    return Prune(**fields)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda cls: cls.id)
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda cls: cls.id)
def test_criterion_and_pattern(criterion: type[Criterion], pattern: type[Pattern]) -> None:
    if senseless(criterion, pattern):
        with pytest.raises(UsageError, match=criterion.id):
            together(criterion, pattern)
        return
    step = together(criterion, pattern)
    example = BY_NAME[NETWORK.get(pattern.id) or NETWORK.get(criterion.id, "mlp")]
    model, task = example.build(), example.task()
    before = fingerprint(model)
    context = Context(task=task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EspalierWarning)
        if criterion().of == "units" and criterion.id not in ("fpgm", "mean-weight") and pattern is Heads:
            # the units of a fused projection have no response of their own
            with pytest.raises(ModelError, match=f"{criterion.id} scores no group"):
                step(model, context)
            return
        smaller = step(model, context)
    assert fingerprint(model) == before
    assert [y.shape for y in outputs(smaller, task)] == [y.shape for y in outputs(model, task)]
    assert all(bool(torch.isfinite(y).all()) for y in outputs(smaller, task))
    mine, theirs = effective(smaller), effective(model)
    if issubclass(pattern, Removing):
        count = sum(w.numel() for w in mine.values()), sum(w.numel() for w in theirs.values())
        gone = sum(isinstance(module, nn.Identity) for module in smaller.modules())
        assert gone if pattern in (Layers, Activations) else count[0] < count[1]
        return
    if issubclass(pattern, Projection):
        ranks = [int(torch.linalg.matrix_rank(w[name].flatten(1))) for w in (mine, theirs) for name in ("0.weight",)]
        assert ranks[0] < ranks[1]
        return
    zeros = {name: int((w == 0).sum()) for name, w in mine.items() if w.ndim > 1}
    assert sum(zeros.values()) > 0
    if pattern is not Tensors:
        assert all(count < mine[name].numel() for name, count in zeros.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pattern": "layers", "criterion": "obd"}, "criterion obd has no say"),
        ({"pattern": "activations", "scope": "global"}, "scope=global has no say"),
        ({"pattern": "channels", "rewind": "weights", "epochs": 2}, "pattern channels has removed some"),
        ({"pattern": "channels", "sparsity": {"0.weight": 0.5}}, "one sparsity, not one per layer"),
        ({"pattern": "tensors", "scope": "row"}, "scope row ranks inside each output"),
    ],
)
def test_the_sentence(fields: dict[str, Any], said: str) -> None:
    kinds = {"pattern": Pattern, "criterion": Criterion}
    made = {
        name: registry.lookup(f"prune.{value}")() if name in (*kinds, "scope") else value
        for name, value in fields.items()
    }
    with pytest.raises(UsageError, match=said):
        Prune(**made)


def test_every_scope_ranks_channels_or_says_why_not() -> None:
    assert Prune(pattern=registry.lookup("prune.channels")(), schedule=OneShot(), scope=Global()).scope == Global()
    with pytest.raises(UsageError, match="scope row"):
        Prune(pattern=registry.lookup("prune.channels")(), scope=Row())
