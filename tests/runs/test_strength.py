"""The search over a strength, on made-up models of size and drop: no training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier.core.context import Context
from espalier.core.metric import Accuracy, Score
from espalier.core.target import Target
from espalier.recipes import DeepCompression
from espalier.runs.directory import RunDirectory
from espalier.runs.strength import TRIES, search_strength

ORIGINAL = 100_000


class World:
    """Length and drop as functions of strength; remembers what was tried and kept."""

    def __init__(self, length, drop, stderr=0.1):
        self.length, self.drop, self.stderr = length, drop, stderr
        self.tried, self.kept = [], None

    def attempt(self, recipe, name):
        self.tried.append(recipe.strength)
        return int(self.length(recipe.strength)), Score(90 - self.drop(recipe.strength), self.stderr, 1000)

    def keep(self, name):
        self.kept = name

    def search(self, folder, context=None, **target):
        directory = RunDirectory.open(folder, resume=(folder / "journal.jsonl").exists())
        return directory, search_strength(
            DeepCompression(), Target.parse(**target), directory, attempt=self.attempt, keep=self.keep,
            before=Score(90.0, 0.5, 1000), drop=Accuracy().drop, original_bytes=ORIGINAL, context=context or Context(),
        )  # fmt: skip


def smooth():
    return World(lambda s: 40_000 * (0.03**s), lambda s: 6 * s**3)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def kept_try(directory, outcome):
    return directory.find("try", name=outcome.name)


def test_a_drop_keeps_the_smallest_that_holds_it(folder):
    world = smooth()
    directory, outcome = world.search(folder, max_drop=1.0)
    best = kept_try(directory, outcome)
    assert outcome.met
    assert world.kept == outcome.name
    assert best["drop"] <= 1.0
    assert best["bytes"] == min(t["bytes"] for t in directory.events("try") if t["drop"] <= 1.0)
    assert 6 * (best["strength"] + 1 / 16) ** 3 > 1.0, "the search stopped far below what was allowed"


def test_a_size_alone_keeps_the_best_metric_below_it(folder):
    directory, outcome = smooth().search(folder, size="10kB")
    best = kept_try(directory, outcome)
    assert outcome.met
    assert 0.7 * 10_000 <= best["bytes"] <= 10_000


def test_minutes_alone_allow_one_standard_error(folder):
    directory, outcome = smooth().search(folder, minutes=10)
    assert outcome.met
    assert kept_try(directory, outcome)["drop"] <= 0.5


def test_out_of_reach_names_the_gap_and_keeps_the_nearest(folder):
    world = smooth()
    directory, outcome = world.search(folder, size="1kB", max_drop=0.5)
    assert not outcome.met
    assert "out of reach" in outcome.message
    assert "more than the 1,000 allowed" in outcome.message
    assert kept_try(directory, outcome)["drop"] <= 0.5
    assert outcome.reasons[outcome.name] == "nearest to the target"


def test_a_drop_below_the_standard_error_is_said(folder):
    world = World(lambda s: 40_000 * (0.03**s), lambda s: 6 * s**3, stderr=2.0)
    _, outcome = world.search(folder, max_drop=1.0)
    assert "standard error" in outcome.message


def test_tries_come_from_the_journal_on_resume(folder):
    first = smooth()
    directory, outcome = first.search(folder, max_drop=1.0)
    second = smooth()
    again, same = second.search(folder, max_drop=1.0)
    assert second.tried == []
    assert same.name == outcome.name
    assert len(again.events("try")) == len(directory.events("try"))


def test_when_the_minutes_are_spent_the_first_try_stands_and_resume_agrees(folder):
    late = Context(deadline=0.0)
    directory, outcome = smooth().search(folder, late, max_drop=1.0, minutes=1)
    assert len(directory.events("try")) == 1
    assert outcome.name == directory.events("try")[0]["name"]
    assert "minutes" in outcome.message
    _, again = smooth().search(folder, max_drop=1.0, minutes=1)
    assert again.name == outcome.name


@given(
    shrink=st.floats(0.005, 0.9), steep=st.floats(0.0, 20.0), power=st.floats(0.5, 6.0),
    limit=st.one_of(st.none(), st.integers(100, 60_000)), allowed=st.one_of(st.none(), st.floats(0.0, 10.0)),
)  # fmt: skip
def test_whatever_the_world_the_search_ends_and_tells_the_truth(tmp_path_factory, shrink, steep, power, limit, allowed):
    if limit is None and allowed is None:
        return
    world = World(lambda s: 40_000 * shrink**s, lambda s: steep * s**power)
    directory, outcome = world.search(
        tmp_path_factory.mktemp("w") / "run", size=None if limit is None else str(limit), max_drop=allowed
    )
    assert 1 <= len(world.tried) <= TRIES
    assert len(set(world.tried)) == len(world.tried), "a strength was tried twice"
    best = kept_try(directory, outcome)
    fits = limit is None or best["bytes"] <= limit
    holds = allowed is None or best["drop"] <= allowed
    assert outcome.met == (fits and holds)
    if not outcome.met:
        assert "out of reach" in outcome.message
