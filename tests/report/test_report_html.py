from __future__ import annotations

import copy
import json
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from espalier.core.errors import RunError
from espalier.report import page, render_terminal, write_html
from espalier.report.markup import Markup, el, join

VOID = {"meta", "br"}
RECORD = (Path(__file__).parent / "record.json").read_text(encoding="utf-8")
EVIL = "<script>alert('x')</script>\"&</style></title><svg onload=x>\x1b[31m\x00\u202e\ud800[red]\n"


def complete():
    return json.loads(RECORD)


def poisoned(value):
    """Every string replaced, every object given a hostile key, as a hostile run directory could hold them."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()} | {EVIL: EVIL, f"{EVIL}2": 0.5}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return EVIL if isinstance(value, str) else value


class Checker(HTMLParser):
    """Collects elements and text; every start tag must be closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.handle_startendtag(tag, attrs)
        assert tag not in VOID
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


TAGS = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "footer", "h1", "h2", "h3", "p",
        "span", "strong", "b", "div", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "details", "summary",
        "pre", "code", "svg", "g", "rect", "line", "circle", "polyline", "text", "figure", "figcaption"}  # fmt: skip


def test_the_page_is_well_formed_and_alone(record) -> None:
    found = checked(page(record))
    assert set(found.tags) <= TAGS
    text = page(record)
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert "url(" not in text
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert "default-src &#x27;none&#x27;" in text


def test_the_page_says_what_the_info_says(record) -> None:
    said = " ".join("".join(checked(page(record)).text).replace("\N{NO-BREAK SPACE}", " ").split())
    for sentence in (
        "1.07 MB became 17.9 kB: 59.6x smaller, 1.62 ± 0.13 % test error instead of 1.58 ± 0.12 %",
        "12.3x fewer", "model.espalier, 17,900 bytes", "biases are small and sensitive", "drop too large",
        "fc3.weight has fewer distinct values", "re-loaded, the same", "- prune.prune:", "93.1 %", "McNemar",
    ):  # fmt: skip
        assert sentence in said, sentence


def test_hostile_names_are_text(record) -> None:
    text = page(poisoned(record))
    found = checked(text)
    assert set(found.tags) <= TAGS
    assert "onload" not in found.attributes
    assert "<script>alert" in "".join(found.text)  # shown, not run
    assert text.count("</style>") == 1
    assert all(c in "\n\N{NO-BREAK SPACE}" or c.isprintable() for c in text)
    text.encode("utf-8")


def test_hostile_names_do_not_steer_the_terminal(record) -> None:
    out = StringIO()
    render_terminal(poisoned(record), Console(file=out, width=100, force_terminal=True, color_system=None))
    assert "\x1b[31m" not in out.getvalue()
    assert "\u202e" not in out.getvalue()
    assert "[red]" in out.getvalue()  # no markup either


def test_the_terminal_says_the_same(record) -> None:
    out = StringIO()
    render_terminal(record, Console(file=out, width=140))
    for words in ("59.6x smaller", "18.4 kB → 17.9 kB", "fc1.weight", "13,324 B", "74.4 %", "the file", "left alone"):
        assert words in out.getvalue(), words


def test_the_terminal_shows_what_a_step_says_and_left_alone_shortened(record) -> None:
    step = record["steps"][1]
    step["notes"] = ["kept at one unit, the least there can be: fc1.", "because " * 200]
    step["skipped"] = [{"name": "fc2.weight", "reason": "not now " * 200}]
    out = StringIO()
    render_terminal(record, Console(file=out, width=140))
    said = " ".join(out.getvalue().split())
    assert f"{step['path']} kept at one unit, the least there can be: fc1." in said
    assert said.count("because") < 50
    assert said.count("not now") < 50
    assert said.count("…") >= 2


@pytest.mark.parametrize("key", sorted(complete()))
def test_any_key_may_be_missing(record, key) -> None:
    if key == "schema":
        return
    del record[key]
    checked(page(record))
    render_terminal(record, Console(file=StringIO()))


def test_almost_nothing_is_still_a_page() -> None:
    said = "".join(checked(page({"schema": 1})).text)
    assert "Nothing was measured yet." in said
    assert "Before and after" not in said


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.just(EVIL),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


PLACES = [path for path in places(complete()) if path and path != ("schema",)]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PLACES), JUNK), min_size=1, max_size=6))
def test_junk_anywhere_breaks_nothing(changes) -> None:
    record = complete()
    for path, junk in changes:
        parent = record
        for key in path[:-1]:
            parent = parent[key] if isinstance(parent, (dict, list)) and _has(parent, key) else None
        if isinstance(parent, (dict, list)) and _has(parent, path[-1]):
            parent[path[-1]] = junk
    checked(page(record))
    render_terminal(record, Console(file=StringIO()))


def _has(parent, key) -> bool:
    return key in parent if isinstance(parent, dict) else isinstance(key, int) and key < len(parent)


def large(record, layers: int):
    rows = []
    for k in range(layers):
        split = {"values": 3000 - k, "positions": 500, "codebooks": 62}
        rows.append(
            {"name": f"stage{k // 10}.conv{k}.weight", "shape": [64, 64, 3, 3], "kind": "codebook", "bytes": split}
        )
    record["files"]["model.espalier"]["info"] = {"total": sum(map(total, rows)), "tensors": rows}
    record["layers"] = [{"name": row["name"], "shape": row["shape"], "bytes": total(row)} for row in rows]
    record["steps"][1]["skipped"] = [{"name": row["name"], "reason": "too small"} for row in rows]
    record["steps"] = record["steps"] * 30
    return rows


def total(row) -> int:
    return sum(row["bytes"].values())


def test_huge_runs_stay_readable(record) -> None:
    rows = large(record, 500)
    text = page(record)
    said = "".join(checked(text).text)
    assert "476 smaller tensors" in said
    assert f"{sum(map(total, rows[24:])):,} B" in said
    assert "Show all 500 layers" in said
    assert "and 488 more" in said
    assert "Show 80 more steps" in said
    assert len(text) < 3_000_000
    assert text.count('class="bar"') == 24  # the rest is no bar: it would set the scale


def test_tables_are_bounded(record) -> None:
    large(record, 1500)
    text = page(record)
    assert "and 500 more" in "".join(checked(text).text)
    assert "stage99.conv999.weight" in text
    assert "stage100.conv1000.weight" not in text


def test_the_file_is_written_whole_or_not_at_all(record, tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.html"
    assert write_html(record, path) == path
    assert path.read_text(encoding="utf-8") == page(record)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_html({**record, "message": "new"}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there(record, tmp_path) -> None:
    with pytest.raises(RunError, match="Check that the folder exists"):
        write_html(record, tmp_path / "no" / "report.html")


def test_the_same_record_gives_the_same_page(record) -> None:
    assert page(record) == page(copy.deepcopy(record))


def test_markup_escapes_everything_but_itself() -> None:
    assert (
        el("b", "<", Markup("<i></i>"), None, ["&", 3], title="\"'>")
        == '<b title="&quot;&#x27;&gt;">&lt;<i></i>&amp;3</b>'
    )
    assert join(["a", ("b", ["<"])]) == "ab&lt;"
    assert el("b", "\ud800").encode("utf-8") == b"<b>?</b>"
    assert el("rect", class_="x", aria_hidden=None) == '<rect class="x"/>'


def test_reading_a_report_imports_no_torch() -> None:
    code = (
        "import sys; from espalier.report import load, page, render_terminal; page({'schema': 1}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
