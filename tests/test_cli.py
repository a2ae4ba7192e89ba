"""The command line as a user meets it: what it imports, what it says when something is wrong, what JSON it prints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from espalier.cli.main import main, parse_step
from espalier.core.errors import UsageError

PROJECT = """
import torch
from torch import nn
import espalier as es

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

def task():
    data = es.data.standard("digits")
    return es.tasks.classification(data.train, data.val, data.test)
"""
ONE_SHOT = ("--step", "prune.prune sparsity=0.5")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a project file, as the current one."""
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))  # --data-dir sets it; put back afterwards
    monkeypatch.delitem(sys.modules, "project", raising=False)
    return tmp_path


@pytest.fixture
def espalier(folder, monkeypatch, capsys):
    """Run a command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["espalier", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def refused(result: tuple[int, str, str], *words: str) -> str:
    """The one sentence of a refusal: code 2, nothing on standard output, no traceback."""
    code, out, error = result
    assert code == 2, (code, out, error)
    assert not out
    assert error.lstrip().startswith("error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error, error
    return error


# --- what it imports -----------------------------------------------------------------------------


def modules_after(*arguments: str) -> set[str]:
    program = (
        "import json, sys\n"
        f"sys.argv = ['espalier', *{list(arguments)!r}]\n"
        "from espalier.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print(); print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("compress", "--help")], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    heavy = {"torch", "numpy", "scipy", "sklearn", "numba", "safetensors", "yaml"}
    assert not heavy & modules_after(*arguments)


@pytest.mark.parametrize("name", ["espalier", "espalier.core", "espalier.core.errors", "espalier.encode"])
def test_the_decoder_s_side_imports_no_torch(name):
    program = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_help_names_every_command(espalier):
    code, out, _ = espalier("--help")
    assert code == 0
    for command in ("compress", "inspect", "bench", "verify", "info", "unpack", "methods", "report", "demo"):
        assert f"\n  {command} " in out


def test_without_arguments_it_shows_the_help(espalier):
    code, out, error = espalier()
    assert code == 0
    assert "Usage: " in out
    assert not error


# --- what it says when something is wrong --------------------------------------------------------


def test_unknown_command_and_option(espalier):
    refused(espalier("compres", "project.py"), "compres", "--help")
    refused(espalier("compress", "project.py", "--sise", "10x"), "--sise", "--size")


def test_unknown_method(espalier, folder):
    refused(
        espalier("compress", "project.py", "--step", "prune.prnue"), "'prune.prnue'", "Did you mean", "'prune.prune'"
    )
    refused(espalier("methods", "magnitud"), "Did you mean 'magnitude'")
    refused(espalier("compress", "project.py", "--recipe", "deep-compresion"), "Did you mean 'deep-compression'")
    assert not (folder / "runs").exists()


def test_a_part_is_no_step(espalier):
    refused(espalier("compress", "project.py", "--step", "magnitude"), "is a criterion", "prune.prune")


def test_unknown_field(espalier):
    step = "prune.prune sparsty=0.9"
    refused(espalier("compress", "project.py", "--step", step), "prune.prune has no field 'sparsty'", "'sparsity'")
    refused(espalier("compress", "project.py", "--set", "prune.epoch=3"), "there is no 'epoch'", "'epochs'")
    refused(espalier("compress", "project.py", "--set", "prune.epochs"), "not of the form field=value")


def test_values_out_of_range_are_all_named_at_once(espalier):
    said = refused(espalier("compress", "project.py", "--step", "prune.prune sparsity=1.5 epochs=-1"))
    assert "sparsity=1.5" in said
    assert "epochs=-1" in said


def test_missing_project_file(espalier):
    refused(espalier("compress", "nothing.py"), "no project file nothing.py", "def model()")
    refused(espalier("inspect", "nothing.py"), "no project file nothing.py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", ("no function model()",)),
        ("def model(): return 1\ndef task(): return 2\n", ("torch.nn.Module", "int")),
        ("def model(:\n", ("project.py line 1",)),
        ("from torch import nn\ndef model(): return nn.Linear(1, 1)\ndef task(): return 2\n", ("espalier Task", "int")),
    ],
)
def test_a_project_file_that_is_none(espalier, folder, text, words):
    (folder / "project.py").write_text(text)
    refused(espalier("compress", "project.py"), *words)
    assert not (folder / "runs").exists()


def test_wrong_data_folder(espalier, folder):
    (folder / "project.py").write_text(PROJECT.replace('"digits"', '"mnist"'))
    refused(espalier("compress", "project.py", "--data-dir", "nowhere"), "MNIST", "nowhere", "--data-dir")


@pytest.mark.parametrize("size", ["ten", "10y", "-3kB", "0", "x"])
def test_bad_size(espalier, folder, size):
    said = refused(espalier("compress", "project.py", f"--size={size}"))
    assert size.strip("-") in said or "size" in said
    assert not (folder / "runs").exists()


def test_a_target_needs_a_strength(espalier):
    refused(espalier("compress", "project.py", *ONE_SHOT, "--size", "2x"), "strength")


def test_recipe_and_step_exclude_each_other(espalier):
    refused(espalier("compress", "project.py", "--recipe", "deep-compression", *ONE_SHOT), "not both")
    refused(espalier("compress", "project.py", "--recipe", "mine.yaml"), "no recipe file mine.yaml")


def test_out_folder_that_is_used(espalier, folder):
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("mine")
    (folder / "file").write_text("mine")
    refused(espalier("compress", "project.py", *ONE_SHOT, "--out", "full"), "full is not empty", "--out")
    refused(espalier("compress", "project.py", *ONE_SHOT, "--out", "file"), "file is a file")
    (folder / "run").mkdir()
    (folder / "run" / "journal.jsonl").write_text('{"event": "step", "path": "a", "leaf": true}\n')
    refused(espalier("compress", "project.py", *ONE_SHOT, "--out", "run"), "holds a run already", "--resume")
    assert sorted(path.name for path in (folder / "full").iterdir()) == ["letter.txt"]
    assert (folder / "file").read_text() == "mine"


def test_unknown_device(espalier):
    refused(espalier("compress", "project.py", *ONE_SHOT, "--device", "abacus"), "'abacus'", "cpu")


@pytest.mark.parametrize("command", ["verify", "info"])
def test_a_file_that_is_none_of_ours(espalier, folder, command):
    (folder / "letter.txt").write_text("dear reader" * 20)
    refused(espalier(command, "letter.txt"))
    refused(espalier(command, "nothing.espalier"), "nothing.espalier")


def test_a_folder_without_a_run(espalier, folder):
    (folder / "empty").mkdir()
    refused(espalier("report", "empty"), "empty")
    refused(espalier("bench", "empty"), "model.espalier")


@pytest.mark.parametrize("text", ["", "prune.prune sparsity", "prune.prune 0.9"])
def test_a_step_that_is_none(text):
    with pytest.raises(UsageError):
        parse_step(text)


def test_a_step_is_read_as_yaml():
    step = parse_step("prune.prune sparsity=0.9 schedule=cubic layers='[\"*.weight\"]'")
    assert step == {"prune.prune": {"sparsity": 0.9, "schedule": "cubic", "layers": ["*.weight"]}}


# --- what it prints ------------------------------------------------------------------------------


def test_methods_as_json(espalier):
    code, out, _ = espalier("methods", "--json")
    found = json.loads(out)
    assert code == 0
    names = {f"{method['verb']}.{method['name']}" for method in found}
    assert len(names) == len(found)
    assert {"prune.prune", "prune.magnitude", "share.kmeans", "train.finetune", "recipes.deep-compression"} <= names
    for method in found:
        assert {"name", "verb", "kind", "paper", "summary", "fields"} <= set(method)
        assert all(isinstance(method[key], str) and method[key] for key in ("name", "verb", "kind", "paper", "summary"))
        assert isinstance(method["fields"], list)
        for field in method["fields"]:
            assert {"name", "type", "default"} <= set(field)
    (kmeans,) = (method for method in found if method["name"] == "kmeans")
    bins = {field["name"]: field for field in kmeans["fields"]}["bins"]
    assert (bins["type"], bins["default"], bins["low"]) == ("int", 2**14, 0)


def test_one_method_for_a_person(espalier):
    code, out, _ = espalier("methods", "kmeans")
    assert code == 0
    assert "arXiv:1510.00149" in out
    assert "bits: int | dict[str, int] = 5" in out


def test_a_run_from_the_command_line(espalier, folder):
    code, out, error = espalier("compress", "project.py", *ONE_SHOT, "--out", "run", "--json")
    assert code == 0, error
    record = json.loads(out)
    file = folder / "run" / "model.espalier"
    assert record["status"] == "done"
    assert record["compressed"]["file_bytes"] == file.stat().st_size
    assert record == json.loads((folder / "run" / "record.json").read_text())
    assert (folder / "run" / "report.html").is_file()

    code, out, _ = espalier("verify", str(file), "--json")
    assert (code, json.loads(out)["verified"]) == (0, True)
    code, out, _ = espalier("info", str(file), "--json")
    assert (code, json.loads(out)["total"]) == (0, file.stat().st_size)
    code, out, _ = espalier("info", str(file))
    assert code == 0
    assert "1.weight" in out
    code, out, _ = espalier("unpack", str(file), "weights.safetensors")
    assert code == 0

    from safetensors.numpy import load_file

    weights = load_file("weights.safetensors")
    assert weights["1.weight"].shape == (16, 64)
    assert (weights["1.weight"] == 0).mean() == 0.5

    refused(espalier("compress", "project.py", *ONE_SHOT, "--out", "run"), "--resume")
    code, out, _ = espalier("compress", "project.py", *ONE_SHOT, "--out", "run", "--resume", "--json")
    assert (code, json.loads(out)["compressed"]["file_bytes"]) == (0, file.stat().st_size)

    code, out, _ = espalier("report", "run")
    assert code == 0
    assert "report" in out

    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    (folder / "damaged.espalier").write_bytes(damaged)
    refused(espalier("verify", "damaged.espalier"))


def test_inspect_shows_the_layers(espalier):
    code, out, error = espalier("inspect", "project.py", "--json")
    assert code == 0, error
    found = json.loads(out)
    assert [layer["name"] for layer in found["layers"]] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert found["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert found["macs"] == 64 * 16 + 16 * 10


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_keeps_the_record(folder):
    """A signal in the middle of training: one sentence, code 130, a record that says so."""
    command = [sys.executable, "-m", "espalier.cli.main", "compress", "project.py", "--set", "prune.epochs=100000"]
    process = subprocess.Popen([*command, "--out", "run"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list((folder / "run").glob("steps/**/*.epoch")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"--resume" in said
    assert b"Traceback" not in said
    assert json.loads((folder / "run" / "record.json").read_text())["status"] == "interrupted"
