"""Every code block of README, CONTRIBUTING and docs is executed or parsed, in the order a reader meets it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import espalier as es

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LONG = ("compress", "inspect")  # commands that train: only in the slow test


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text without the list indent, and the line it starts at."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that the first line names: ``# project.py``."""
        found = re.match(r"# ([\w.-]+\.\w+)\n", self.text)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        plain = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(Block(language, plain, text[: match.start()].count("\n") + 2))
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of every line, comments left out."""
    return [words for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


def run_python(page: Path, block: Block, namespace: dict) -> None:
    if block.file:
        Path(block.file).write_text(block.text)
        sys.modules.pop(Path(block.file).stem, None)
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(page), "exec", dont_inherit=True), namespace)  # noqa: S102 - the pages are ours


def run_command(words: list[str], folder: Path) -> str:
    program = [sys.executable, "-m", "espalier.cli.main", *words[1:]]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def reader(folder: Path, monkeypatch):
    """A reader's empty folder, in which what a block writes can be imported."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield {"__name__": "page"}
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


def follow(page: Path, folder: Path, monkeypatch, *, long: bool) -> None:
    """Do everything the page says; with ``long`` also what trains in a process of its own."""
    with reader(folder, monkeypatch) as namespace:
        for block in blocks(page):
            if block.language == "python":
                run_python(page, block, namespace)
            elif block.language == "yaml":
                es.Recipe.from_yaml(block.text)
                if block.file:
                    (folder / block.file).write_text(block.text)
            elif block.language == "bash":
                for words in commands(block):
                    if words[0] == "espalier" and (long or words[1] not in LONG) and _ready(words, folder):
                        run_command(words, folder)


def _ready(words: list[str], folder: Path) -> bool:
    """A page may show a command before the file that it works on; it runs where the page repeats it."""
    return not any(word.endswith(".py") and not (folder / word).exists() for word in words)


@pytest.mark.parametrize("page", [*PAGES[:2], ROOT / "docs" / "architecture.md"], ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    assert any(block.language == "python" for block in blocks(page))
    follow(page, tmp_path, monkeypatch, long=False)


@pytest.mark.slow
def test_the_readme_can_be_followed_command_by_command(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    follow(PAGES[0], tmp_path, monkeypatch, long=True)
    for run in ("first", "dc", "mine", "short", "step"):
        assert (tmp_path / "runs" / run / "model.espalier").is_file(), run
        assert (tmp_path / "runs" / run / "report.html").is_file(), run
    assert (tmp_path / "weights.safetensors").is_file()


def test_every_recipe_on_a_method_page_is_one():
    found = [
        block for page in PAGES if page.parent.name == "methods" for block in blocks(page) if block.language == "yaml"
    ]
    assert len(found) > 20
    for block in found:
        recipe = es.Recipe.from_yaml(block.text)
        assert len(recipe.steps) == 1
        assert es.Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_of_a_kind_that_nobody_runs(page):
    kinds = {block.language for block in blocks(page)}
    assert kinds <= {"python", "yaml", "bash", "text"}, f"{page.name}: {kinds}"
    for block in blocks(page):
        if block.language == "bash":
            assert all(words[0] in ("espalier", "make") for words in commands(block)), block.text


def test_every_make_target_that_a_page_names_is_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = "\n".join(page.read_text() for page in PAGES) + (ROOT / ".ci" / "run").read_text()
    for name in re.findall(r"`make (\w+)|^make (\w+)", said, re.MULTILINE):
        assert "".join(name) in targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_blocks_of_a_page_are_found_with_their_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\n# x.py\ny = 1\n```\n1. b\n\n   ```yaml\n   steps: []\n   ```\n```text\n```\n")
    found = blocks(page)
    assert [(b.language, b.text, b.line, b.file) for b in found] == [
        ("python", "# x.py\ny = 1\n", 4, "x.py"),
        ("yaml", "steps: []\n", 10, None),
        ("text", "", 13, None),
    ]


def test_a_failing_block_fails_with_the_line_of_the_page(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\nraise ValueError('no')\n```\n")
    with pytest.raises(ValueError, match="no") as caught:
        follow(page, tmp_path, monkeypatch, long=False)
    assert caught.traceback[-1].lineno + 1 == 5
