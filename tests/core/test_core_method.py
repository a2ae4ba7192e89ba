"""Fields are checked all at once, names are met with close ones, cards are parsed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from espalier.core.errors import UsageError, did_you_mean
from espalier.core.fields import Bits, Count, LearningRate, Range, Sparsity
from espalier.core.method import Method, check_names, clone, describe_error, fields_of, fits, parse_card, ranges
from espalier.prune import Prune, Wanda


@dataclass(frozen=True, kw_only=True)
class Inner(Method):
    id: ClassVar[str] = "inner"
    kind: ClassVar[str] = "part"
    verb: ClassVar[str] = "toy"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"labels"})


@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    id: ClassVar[str] = "toy"
    kind: ClassVar[str] = "part"
    verb: ClassVar[str] = "toy"
    sparsity: Sparsity = 0.5
    lr: LearningRate = 1e-3
    bits: Bits | dict[str, Bits] | None = None
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    pair: tuple[Sparsity, Sparsity] = (0.0, 0.9)
    names: tuple[str, ...] = ()
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()

    def conflicts(self) -> list[str]:
        return ["mode b needs flag"] if self.mode == "b" and not self.flag else []


def test_all_bad_arguments_are_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Toy(sparsity=1.5, lr=0, mode="c", flag=1, pair=(0.0, 2.0))
    text = str(caught.value)
    for part in (
        "toy.toy: sparsity=1.5 is out of range (allowed: 0 to below 1 fraction)",
        "lr=0 is out of range (allowed: above 0 per step)",
        "mode='c' is not of type 'a' | 'b'",
        "flag=1 is not of type bool",
        "pair=(0.0, 2.0) is not of type tuple[float, float]",
    ):
        assert part in text


def test_conflicts_are_asked_only_of_good_fields() -> None:
    with pytest.raises(UsageError, match="mode b needs flag"):
        Toy(mode="b")
    with pytest.raises(UsageError) as caught:
        Toy(mode="b", sparsity=2)
    assert "flag" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 17, {"fc": 0}, {"fc": 8, 1: 2}, 2.0, True, "8", math.nan])
def test_optional_and_mapped_numbers_keep_their_range(value: Any) -> None:
    with pytest.raises(UsageError, match="bits="):
        Toy(bits=value)


def test_a_range_inside_a_union_is_named() -> None:
    with pytest.raises(UsageError, match=r"bits=17 is out of range \(allowed: 1 to 16 bits\)"):
        Toy(bits=17)


@pytest.mark.parametrize("value", [None, 1, 16, {}, {"fc": 4}])
def test_allowed_values_pass(value: Any) -> None:
    assert Toy(bits=value).bits == value


def test_ranges_of_a_union() -> None:
    assert [limit.high for limit in ranges(Bits | dict[str, Sparsity] | None)] == [16]
    assert list(ranges(int)) == []


def test_replace_and_unknown_names() -> None:
    assert Toy().replace(sparsity=0.25) == Toy(sparsity=0.25)
    with pytest.raises(UsageError, match=r"toy.toy has no field 'sparsty'. Did you mean 'sparsity'"):
        Toy().replace(sparsty=0.5)
    with pytest.raises(UsageError, match=r"(?s)'sparsty'.*no field 'flagg'.*Its fields: sparsity, lr"):
        check_names(Toy, {"sparsty": 1, "flagg": 2})
    with pytest.raises(UsageError, match="Its fields: none"):
        check_names(Inner, {"x": 1})


def test_methods_are_frozen_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Toy().sparsity = 0.1  # type: ignore[misc]
    assert Toy() == Toy()
    assert Toy() != Toy(sparsity=0.4)


def test_needs_are_the_union_over_the_parts() -> None:
    assert Toy().needs == frozenset()
    assert Toy(inner=Inner()).needs == {"labels"}
    assert Toy(inners=(Inner(), Inner())).needs == {"labels"}
    assert list(Toy(inner=Inner(), inners=(Inner(),)).parts()) == [Inner(), Inner()]


def test_clone_copies_mappings() -> None:
    one = Toy(bits={"fc": 4})
    other = clone(one)
    assert other == one
    assert isinstance(one.bits, dict)
    assert other.bits is not one.bits  # type: ignore[attr-defined]


def test_fields_of_tells_type_range_and_default() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Listed(Method):
        values: list[int] = field(default_factory=lambda: [1])
        count: Count = 3

    found = {entry.name: entry for entry in fields_of(Toy)}
    assert found["sparsity"].range == Range(0, 1, "fraction", "fraction of the weights removed", below=True)
    assert found["sparsity"].annotation is float
    assert found["bits"].range is None
    assert found["bits"].type_name == "int | dict[str, int] | None"
    assert found["names"].type_name == "tuple[str, ...]"


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (float, [1, 1.5, math.inf], [True, "1", math.nan, None]),
        (int, [1, -5], [True, 1.0, "1"]),
        (bool, [True], [1, 0]),
        (str, ["x"], [1, None]),
        (Literal["a", 1], ["a", 1], ["b", 2]),
        (int | None, [None, 3], ["x", 2.5]),
        (tuple[int, ...], [(), (1, 2)], [[1], (1, "x")]),
        (tuple[int, str], [(1, "a")], [(1,), ("a", 1), (1, "a", 2)]),
        (dict[str, float], [{}, {"a": 1}], [{1: 1}, {"a": "b"}, []]),
        (Annotated[int, Range(0, 3, "", "")], [0, 3], [4, -1, 1.0]),
        (Any, [object(), None], []),
    ],
)
def test_fits(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(annotation, value) for value in good)
    assert not any(fits(annotation, value) for value in bad)


@given(low=st.floats(-10, 10), width=st.floats(0, 10), value=st.floats(allow_nan=True))
def test_range_allows_what_it_says(low: float, width: float, value: float) -> None:
    high = low + width
    assert Range(low, high, "", "").allows(value) == (low <= value <= high)
    assert Range(low, high, "", "", above=True).allows(value) == (low < value <= high)


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Range(0, 1, "", ""), "0 to 1"),
        (Range(0, math.inf, "", "", above=True), "above 0"),
        (Range(1, math.inf, "", ""), "1 or more"),
        (Range(0, 1, "", "", above=True), "above 0 to 1"),
    ],
)
def test_range_reads_well(limit: Range, text: str) -> None:
    assert str(limit) == text


def test_parse_card() -> None:
    card = parse_card(
        """One line.

        Paper    Somebody. Something.
                 2020.
        Formula  a = b
        Departs  Nothing.

        Free text after a blank line is no part of a heading.
        """
    )
    assert (card.summary, card.paper, card.formula, card.departs) == (
        "One line.", "Somebody. Something. 2020.", "a = b", "Nothing.",
    )  # fmt: skip
    assert parse_card("").summary == ""


def test_did_you_mean() -> None:
    assert did_you_mean("sparsty", ["sparsity", "bits"]) == " Did you mean 'sparsity'?"
    assert did_you_mean("zzz", ["b", "a"]) == " Allowed: a, b."
    assert did_you_mean("zzz", []) == " Nothing is allowed here."
    assert did_you_mean("zzz", [f"name{i:02d}" for i in range(30)]).endswith("name19 and 10 more.")


def test_describe_error() -> None:
    assert describe_error(UsageError("plain words")) == "plain words"
    assert describe_error(KeyError("k")) == "KeyError: 'k'"


def test_a_wrong_field_is_met_with_close_ones_when_the_object_is_made() -> None:
    with pytest.raises(UsageError, match=r"toy.toy has no field 'sparcity'. Did you mean 'sparsity'\? Its fields: sp"):
        Toy(sparcity=0.5)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"Toy takes its fields by name, Toy\(field=value\); got 1 without: 0.5"):
        Toy(0.5)  # type: ignore[misc]
    made = Toy(sparsity=0.25)
    assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))  # noqa: S301 - our own bytes
    assert list(inspect.signature(Toy).parameters)[:2] == ["sparsity", "lr"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Prune(criterion="wanda"), r"criterion='wanda' is a name.*itself\. Pass criterion=es.prune.Wanda\(\)"),
        (lambda: Prune(criterion="prune.wanda"), r"Pass criterion=es.prune.Wanda\(\)"),
        (lambda: Prune(criterion="magnitud"), r"Did you mean 'magnitude'\? Pass criterion=es.prune.Magnitude\(\)"),
        (lambda: Prune(scope="zzz"), r"Allowed: apart, global, .*For example scope=es.prune.Layer\(\)"),
        (lambda: Prune(penalties=("l1",)), r"penalties='l1' is a name.*penalties=\(es.train.L1\(\),\)"),
        (lambda: Prune(criterion=Wanda), r"got the class Wanda; pass an object: criterion=es.prune.Wanda\(\)"),
        (lambda: Prune(criterion=nn.ReLU), r"is not of type Criterion"),
        (lambda: Prune(criterion=3), r"criterion=3 is not of type Criterion \(one of: .*magnitude"),
        (lambda: Toy(inner="inner"), r"inner got the name 'inner'; pass an object of a class of type Inner"),
    ],
)
def test_the_name_of_a_part_in_place_of_the_part(made: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made()
