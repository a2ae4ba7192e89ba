"""Which weights a pattern means, and what a pattern that means none is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from espalier.core.errors import EspalierWarning, UnknownNameError
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, slots
from espalier.core.selection import by_pattern, select, weights
from espalier.testing import EXAMPLES

BY_NAME = {example.name: example for example in EXAMPLES}


class MyLinear(nn.Linear):
    pass


def net() -> nn.Sequential:
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    return nn.Sequential(body, nn.Flatten(), MyLinear(8, 4), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("*",), ("0.0.weight", "2.weight", "3.weight")),
        (("0.*",), ("0.0.weight",)),
        (("0.0",), ("0.0.weight",)),
        (("2.weight",), ("2.weight",)),
        (("?.weight",), ("2.weight", "3.weight")),
        (("[23]",), ("2.weight", "3.weight")),
        (("type:Conv2d",), ("0.0.weight",)),
        (("type:Linear",), ("2.weight", "3.weight")),
        (("type:MyLinear",), ("2.weight",)),
        (("#0",), ("0.0.weight",)),
        (("#-1",), ("3.weight",)),
        (("#2", "#0", "3"), ("0.0.weight", "3.weight")),
    ],
)
def test_patterns(patterns: tuple[str, ...], names: tuple[str, ...]) -> None:
    chosen = select(net(), patterns)
    assert chosen.names == names
    assert chosen.count == len(names)
    assert [slot.name for slot in chosen] == list(names)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("0.0.wieght", "Did you mean '0.0.weight'"),
        ("type:Conv2", "Did you mean 'type:Conv2d'"),
        ("#3", "There are 3 weights"),
        ("#-4", "#-1 the last"),
        ("0.1", "Did you mean '0.0'"),
        ("type:Linaer", "type:Linear"),
        ("nothing", "Allowed: 0.0, 0.0.weight, 2, 2.weight, 3, 3.weight."),
    ],
)
def test_a_pattern_without_a_match_is_an_error(pattern: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match="prune: no weight answers to") as caught:
        select(net(), ("*.weight", pattern), who="prune")
    assert hint in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"prune: no weight answers to"):
        by_pattern(net(), weights(net()), {pattern: 1}, 0, who="prune")


def test_the_default_on_a_model_without_weights_warns() -> None:
    with pytest.warns(EspalierWarning, match="ReLU has no weight of two dimensions"):
        assert select(nn.ReLU(), ("*",)).count == 0


def test_a_form_does_not_change_the_answer() -> None:
    model = net()
    slot = slots(model)["2.weight"]
    attach(slot, Mask(torch.ones(slot.shape, dtype=torch.bool)))
    for patterns in (("type:MyLinear",), ("2",), ("2.weight",), ("#1",)):
        assert select(model, patterns).names == ("2.weight",)
    with pytest.raises(UnknownNameError, match="type:MyLinear"):
        select(model, ("type:MyLinea",))


def test_weights_are_floating_and_of_two_dimensions() -> None:
    model = net()
    model.register_parameter("count", nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False))
    assert weights(model).names == ("0.0.weight", "2.weight", "3.weight")
    assert weights(model).where(lambda slot: slot.shape[0] == 3).names == ("3.weight",)


def test_tied_weights_answer_to_every_name_and_count_once() -> None:
    model = BY_NAME["tied"].build()
    assert select(model, ("*",)).count == 1
    for pattern in ("embed", "head", "head.weight", "#0"):
        assert select(model, (pattern,)).names == ("embed.weight",)
    assert select(BY_NAME["twice"].build(), ("again",)).names == ("block.weight",)


def test_a_name_matches_itself_whatever_characters_it_has() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b*": nn.Linear(2, 2)})
    assert select(model, ("a[0].weight",)).names == ("a[0].weight", "a0.weight"), "as a name and as a pattern"
    assert select(model, ("b*",)).names == ("b*.weight",)
    assert by_pattern(model, weights(model), {"a[0].weight": 1}, 0, who="x")["a[0].weight"] == 1


def test_by_pattern_takes_the_last_match() -> None:
    model = net()
    chosen = select(model, ("type:Linear",))
    assert by_pattern(model, chosen, {"*": 1, "3": 2, "type:Conv2d": 9}, 0, who="x") == {"2.weight": 1, "3.weight": 2}
    assert by_pattern(model, chosen, {}, 5, who="x") == {"2.weight": 5, "3.weight": 5}
