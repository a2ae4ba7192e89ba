"""Generated pages and tables say what their sources say."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """``scripts/generate`` as a module, writing into an empty folder."""
    loader = importlib.machinery.SourceFileLoader("generate", str(ROOT / "scripts" / "generate"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_loader("generate", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.ROOT = tmp_path
    module.PAGES, module.RESULTS, module.README = tmp_path / "pages", tmp_path / "results", tmp_path / "README.md"
    module.RESULTS.mkdir()
    module.README.write_text("# x\n\n<!-- results -->\nold\n<!-- /results -->\n\nrest\n")
    return module


def run(module, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    return module.main()


def test_pages_and_table_are_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "generate"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_names_what_is_stale_and_changes_nothing(generate, monkeypatch, capsys):
    assert run(generate, monkeypatch) == 0
    assert run(generate, monkeypatch, "--check") == 0
    page = generate.PAGES / "prune.magnitude.md"
    page.write_text(page.read_text() + "by hand\n")
    (generate.PAGES / "prune.gone.md").write_text("of a method that is no more\n")
    capsys.readouterr()
    assert run(generate, monkeypatch, "--check") == 1
    said = capsys.readouterr().out
    assert "stale: pages/prune.magnitude.md" in said
    assert "stale: pages/prune.gone.md" in said
    assert "by hand" in page.read_text()
    assert run(generate, monkeypatch) == 0
    assert "by hand" not in page.read_text()
    assert not (generate.PAGES / "prune.gone.md").exists()


def test_a_page_shows_card_fields_and_ranges(generate, monkeypatch):
    run(generate, monkeypatch)
    page = (generate.PAGES / "prune.cubic.md").read_text()
    assert "arXiv:1710.01878" in page
    assert "cubic: s = s_f" in page
    assert "| `end` | `float` | `0.7` | 0 to 1 fraction |" in page
    assert "prune.prune: {schedule: cubic}" in page


def test_a_row_is_measured_or_says_how_to_measure_it(generate):
    rows = [{
        "id": "recipes.deep-compression", "row": "no augmentation", "claimed": {"kilobytes": 27, "error": 1.58},
        "measured": {"bytes": 12345.4, "bytes_stderr": 67.8, "test_error": 1.604, "test_error_stderr": 0.02,
                     "seeds": 5},
        "setting": {}, "seed": [0, 1],
    }]  # fmt: skip
    (generate.RESULTS / "lenet_5.json").write_text(json.dumps({"rows": rows}))
    table = generate.result_table().splitlines()
    assert table[2] == "| LeNet-300-100 on MNIST | | not measured yet: `make bench NAME=lenet_300_100` | |"
    assert table[3].startswith(
        "| LeNet-5 (Caffe) on MNIST | 27 kB, 1.58 % error | "
        "12,345 ± 68 B, 1.60 ± 0.02 % error, mean of 5 seeds | [lenet_5.json]"
    )
    assert "## Measured" in generate.page(generate.registry.lookup("recipes.deep-compression"))
    assert "## Measured" not in generate.page(generate.registry.lookup("prune.random"))


def test_the_table_goes_between_its_markers(generate, monkeypatch):
    run(generate, monkeypatch)
    text = generate.README.read_text()
    assert text.startswith("# x\n\n<!-- results -->\n| |")
    assert text.endswith("<!-- /results -->\n\nrest\n")
    assert "old" not in text
    generate.README.write_text("no markers\n")
    with pytest.raises(SystemExit, match="markers"):
        run(generate, monkeypatch)
