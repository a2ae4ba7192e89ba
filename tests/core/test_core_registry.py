"""Names lead to classes, near misses to close names, a broken class to its file and field."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest

from espalier.core import registry
from espalier.core.errors import UnknownNameError, UsageError
from espalier.core.fields import Bits
from espalier.core.method import Method, fields_of
from espalier.prune import Criterion, Prune, Schedule
from espalier.train import Optimizer


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, type[Method]]]:
    """A registry that forgets what a test enters."""
    copy = {verb: dict(classes) for verb, classes in registry._METHODS.items()}
    monkeypatch.setattr(registry, "_METHODS", copy)
    return copy


@dataclass(frozen=True, kw_only=True)
class Good(Method):
    id: ClassVar[str] = "good"
    kind: ClassVar[str] = "part"
    bits: Bits = 4


@pytest.fixture(autouse=True)
def header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "Good.\n\nPaper    none\nFormula  none\n")


def test_register_enters_and_names(table: dict[str, dict[str, type[Method]]]) -> None:
    registry.register("toy", (Good,))
    registry.register("toy", (Good,))
    assert registry.lookup("toy.good") is Good
    assert registry.lookup("good") is Good
    assert Good().name == "toy.good"
    assert list(registry.methods()) == [table[v][n] for v in sorted(table) for n in sorted(table[v])]


def test_what_register_refuses(table: dict[str, dict[str, type[Method]]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(Method):
        id: ClassVar[str] = "plain"
        kind: ClassVar[str] = "part"

    @dataclass(frozen=True, kw_only=True)
    class Nameless(Method):
        kind: ClassVar[str] = "part"

    @dataclass(frozen=True, kw_only=True)
    class Required(Method):
        id: ClassVar[str] = "required"
        kind: ClassVar[str] = "part"
        bits: Bits

    @dataclass(frozen=True, kw_only=True)
    class Twin(Good):
        pass

    registry.register("toy", (Good,))
    for cls, words in (
        (Nameless, r"Nameless in .*test_core_registry.py needs the class attributes id and kind"),
        (Twin, "toy.good is taken by Good"),
    ):
        with pytest.raises(UsageError, match=words):
            registry.register("toy", (cls,))
    monkeypatch.setattr(sys.modules[__name__], "Bits", Bits)
    with pytest.raises(UsageError, match="field 'bits' needs a default"):
        registry.register("toy", (Required,))
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "No paper here.")
    with pytest.raises(UsageError, match="the file header needs a first line and 'Paper'"):
        registry.register("other", (Good,))


def test_an_undecorated_class_is_refused(table: dict[str, dict[str, type[Method]]]) -> None:
    class Plain(Good):
        id: ClassVar[str] = "plain"
        extra: Bits = 3

    with pytest.raises(UsageError, match=r"Plain in .* must be a frozen dataclass"):
        registry.register("toy", (Plain,))


def test_lookup_errors() -> None:
    with pytest.raises(UnknownNameError, match=r"no method is called 'prune.prun'. Did you mean 'prune.prune'"):
        registry.lookup("prune.prun")
    with pytest.raises(UnknownNameError, match=r"'linear' is ambiguous: prune.linear, train.linear"):
        registry.lookup("linear")


def test_technique_says_where_a_part_belongs() -> None:
    assert registry.technique("prune.prune") is Prune
    with pytest.raises(UnknownNameError, match=r"prune.magnitude is a criterion.*field of prune.prune"):
        registry.technique("prune.magnitude")


def test_part_is_found_by_type() -> None:
    assert registry.part(Schedule, "linear").verb == "prune"
    assert registry.part(Criterion, "prune.random").id == "random"
    with pytest.raises(UnknownNameError, match=r"no criterion is called 'magnitud'. Did you mean 'magnitude'"):
        registry.part(Criterion, "magnitud")
    with pytest.raises(UnknownNameError, match=r"no optimizer is called 'prune.sgd'"):
        registry.part(Optimizer, "prune.sgd")


def test_part_type() -> None:
    found = {field.name: registry.part_type(field) for field in fields_of(Prune)}
    assert found["criterion"] is Criterion
    assert found["sparsity"] is None
    assert found["stopping"] is not None
    assert found["augment"] is not None


def test_plugins_enter_through_entry_points(
    table: dict[str, dict[str, type[Method]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    point = types.SimpleNamespace(name="mine", load=lambda: (Good,))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "espalier.methods" else [])
    registry.register_plugins()
    assert registry.lookup("mine.good") is Good
