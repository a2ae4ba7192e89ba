"""The command line as a user meets it: what it imports, what it says when something is wrong, what JSON it prints."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from espalier.cli.amounts import parse_amount
from espalier.cli.goal import Goal
from espalier.cli.main import main
from espalier.cli.project import load_project
from espalier.cli.recipes import parse_step
from espalier.core.errors import UsageError
from espalier.measure.size import fp32_safetensors_bytes

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


# --- whose mistake it is -------------------------------------------------------------------------

MODEL = "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("import torch\n", "import nothere\n", ("project.py line 2: ModuleNotFoundError: No module", "Install it")),
        (
            MODEL,
            "    return torch.load('weights.pt')",
            ("line 8, in model(): FileNotFoundError", "weights.pt", "folder"),
        ),
        (MODEL, "    return {}['fc']", ("project.py line 8, in model(): KeyError: 'fc'.",)),
        (MODEL, "    raise SystemExit(0)", ("project.py ended the program", "__main__")),
        ("    data = es", "    import helper\n    data = es", ("helper.py line 2, in <error>",)),
        ('"digits"', '"digits", nothing=1', ("project.py line 11, in task(): TypeError", "nothing")),
    ],
    ids=["import", "file", "key", "exit", "helper", "argument"],
)
def test_what_goes_wrong_in_the_project_is_one_sentence(espalier, folder, monkeypatch, old, new, words):
    assert old in PROJECT
    (folder / "project.py").write_text(PROJECT.replace(old, new, 1))
    (folder / "helper.py").write_text("def error():\n    raise RuntimeError('of the helper')\nerror()\n")
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    said = refused(
        espalier("inspect", "project.py"), *(word.replace("<error>", "error(): RuntimeError") for word in words)
    )
    assert len(said.strip().splitlines()) == 1
    assert said.count("project.py line") <= 1


def test_a_syntax_error_is_named_where_it_is(espalier, folder):
    (folder / "broken.py").write_text("x = 1\ndef y(:\n")
    (folder / "project.py").write_text("import broken\n" + PROJECT)
    refused(espalier("inspect", "project.py"), "broken.py line 2: ")


def losing(loss: str) -> str:
    task = f"return es.Task(train=data.train, val=data.val, loss={loss})"
    return PROJECT.replace("return es.tasks.classification(data.train, data.val, data.test)", task)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (
            "lambda output, target: nn.functional.mse_loss(output, target)",
            ("project.py line 12, in a lambda: Runtime",),
        ),
        ("nn.MSELoss()", ("the loss of task(): RuntimeError",)),
    ],
)
def test_a_loss_that_does_not_fit_is_the_user_s(espalier, folder, loss, words):
    (folder / "project.py").write_text(losing(loss))
    arguments = ("--sparsity", "50%", "--epochs", "1", "--out", "run", "--json")
    refused(espalier("prune", "project.py", *arguments), *words, "ESPALIER_DEBUG=1")


def test_batches_that_do_not_fit_are_the_user_s(espalier, folder):
    loader = (
        "torch.utils.data.DataLoader([(torch.zeros(1, 8, 8 + (n > 5)), 0) for n in range(8)], batch_size=4)"
    )  # fmt: skip
    (folder / "project.py").write_text(PROJECT.replace("data.val", loader))
    refused(espalier("inspect", "project.py"), "the data of task(): RuntimeError: stack expects")


def test_the_traceback_is_there_where_it_is_wanted(espalier, folder, monkeypatch):
    monkeypatch.setenv("ESPALIER_DEBUG", "1")
    (folder / "project.py").write_text(PROJECT.replace(MODEL, "    return {}['fc']"))
    code, _, error = espalier("inspect", "project.py")
    assert code == 2
    assert "Traceback" in error
    assert "error: project.py line 8, in model(): KeyError: 'fc'." in error


def test_a_mistake_of_espalier_shows_its_traceback(espalier, monkeypatch):
    monkeypatch.setattr("espalier.core.registry.methods", None)
    code, _, error = espalier("methods")
    assert code == 1
    assert "Traceback" in error
    assert "mistake in espalier" in error
    assert "report" in error


# --- prune ---------------------------------------------------------------------------------------

UNWRITABLE = PROJECT.replace(
    "def model():",
    """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.b(torch.fft.fft(self.a(x.flatten(1))).real)

def model():""",
).replace(MODEL, "    return Net()")


def test_a_plan_that_misses_its_target_says_so(espalier):
    code, out, error = espalier("prune", "project.py", "--parameters", "1000x", "--dry-run")
    assert code == 3, error
    assert "cannot be reached" in " ".join(out.split())
    assert "target --parameters 1000x: at most 1.21 of 1,210 parameters asked for, 85 left: missed. Ask for" in out
    code, out, error = espalier("prune", "project.py", "--parameters", "1000x", "--dry-run", "--json")
    assert code == 3
    assert json.loads(out)["target"]["met"] is False
    assert "missed" in error
    code, out, _ = espalier("prune", "project.py", "--parameters", "2x", "--dry-run")
    assert code == 0
    assert "target --parameters 2x: " in out
    assert "left: reached." in out


def test_a_run_that_misses_its_target_says_so_with_the_reason(espalier, folder):
    code, out, error = espalier("prune", "project.py", "--parameters", "1000x", "--out", "run", "--resume")
    assert code == 3, error
    assert "note: there is no run in run to go on with; a new one starts there." in error
    said = " ".join(out.split())
    assert "the parameters asked for cannot be reached" in said
    assert "kept at one unit, the least there can be: 1." in said
    assert "85 left: missed" in said
    assert (folder / "run" / "model.espalier").is_file()
    code, out, error = espalier("prune", "project.py", "--parameters", "1000x", "--out", "run", "--resume", "--json")
    assert code == 3
    assert "note:" not in error
    assert "missed" in error
    assert json.loads(out) == json.loads((folder / "run" / "record.json").read_text())


@pytest.mark.parametrize(
    ("measure", "share", "left", "after", "met"),
    [
        ("parameters", 0.5, None, 510, True),
        ("parameters", 0.5, None, 511, False),
        ("macs", 0.0, 100.0, 102, True),
        ("macs", 0.0, 100.0, 103, False),
        ("parameters", 0.5, None, 10, True),
    ],
)
def test_a_target_is_missed_by_more_than_two_percent(measure, share, left, after, met):
    verdict = Goal("--x", measure, share, left).of_plan({measure: (1000, after)})
    assert verdict is not None
    assert verdict.met is met
    assert ("missed" in str(verdict)) is not met


def test_units_go_whole_and_in_multiples():
    groups = [{"before": 3, "after": 2}, {"before": 5, "after": 3}]
    assert Goal("--channels 50%", "units", 0.5).of_plan({"groups": groups}).met
    whole = [{"before": 30, "after": 30}, {"before": 50, "after": 25}]
    assert not Goal("--channels 50%", "units", 0.5).of_plan({"groups": whole}).met
    assert Goal("--channels 50%", "units", 0.5, multiple=8).of_plan({"groups": whole}).met


@pytest.mark.parametrize("measure", ["bytes", "ms"])
def test_bytes_and_milliseconds_are_judged_where_they_were_measured(measure):
    goal = Goal("--x", measure, 0.5)
    assert goal.of_plan({}) is None
    assert goal.of_plan({"measure": {"name": measure, "before": 4.0, "after": 2.0, "asked": 2.0}}).met
    assert not goal.of_plan({"measure": {"name": measure, "before": 4.0, "after": 2.1, "asked": 2.0}}).met


def test_the_plan_shows_the_measure_that_was_asked_for(espalier):
    code, out, error = espalier("prune", "project.py", "--size", "1kB", "--dry-run")
    assert code == 0, error
    assert "parameters: 1,210 -> " in out
    if '"measure"' in espalier("prune", "project.py", "--size", "1kB", "--dry-run", "--json")[1]:
        assert "bytes of the coded weights: " in out
        assert "target --size 1kB: at most 1,000 of " in out


def test_a_size_is_a_share_of_the_same_original_in_plan_and_run(espalier, folder):
    """And what is left of it are the bytes of the file but for the plan; each target is one of the start."""
    code, out, error = espalier("prune", "project.py", "--size", "80%", "--dry-run")
    assert code == 0, error
    original = fp32_safetensors_bytes(load_project(folder / "project.py").model)
    target = f"target --size 80%: at most {original / 5:,.0f} of {original:,} bytes of weights asked for, "
    assert target in out
    rounds = ("--epochs", "3", "--schedule", "cubic", "--out", "run")
    code, out, error = espalier("prune", "project.py", "--size", "80%", *rounds)
    assert code == 0, error
    record = json.loads((folder / "run" / "record.json").read_text())
    file, measure = record["files"]["model.weights.espalier"], record["steps"][0]["details"]["measure"]
    assert file["bytes"] == (folder / "run" / "model.weights.espalier").stat().st_size
    left = file["bytes"] - file["info"]["plans"]
    assert f"{target}{left:,} left: reached" in out
    assert measure["after"] == pytest.approx(left, abs=24)
    assert measure["asked"] == pytest.approx(original / 5)
    assert 0.85 * original / 5 < left < 1.02 * original / 5


@pytest.mark.parametrize("measure", ["parameters", "macs"])
def test_the_record_says_what_there_was_and_what_is_left(espalier, folder, measure):
    code, _, error = espalier("prune", "project.py", f"--{measure}", "50%", "--out", "run", "--json")
    assert code == 0, error
    record = json.loads((folder / "run" / "record.json").read_text())
    before, after = record["original"][measure], record["compressed"][measure]
    found = record["steps"][0]["details"]["measure"]
    assert found == {"name": measure, "before": before, "after": after, "asked": before / 2}
    assert after <= before / 2


def test_a_target_that_is_met_but_for_rounding_says_so():
    groups = [{"before": 3, "after": 2}, {"before": 5, "after": 3}]
    said = str(Goal("--channels 50%", "units", 0.5).of_plan({"groups": groups}))
    assert said.endswith("at most 4 of 8 units asked for, 5 left: reached as nearly as whole units allow.")
    said = str(Goal("--macs 50%", "macs", 0.5).of_plan({"macs": (1000, 501)}))
    assert said.endswith("501 left: reached to within 2%.")


def test_a_target_that_is_there_already(espalier):
    refused(espalier("prune", "project.py", "--size", "3kB"), "bytes of weights already", "Ask for less.")
    said = refused(espalier("prune", "project.py", "--size", "40%"), "of the original (fp32 safetensors)")
    share = next(word for word in said.split() if word.endswith("%") and word != "40%:")
    assert espalier("prune", "project.py", "--size", share, "--dry-run")[0] == 0
    refused(espalier("prune", "project.py", "--parameters", "20k"), "the model has 1,210 parameters already")


def test_options_that_would_have_no_say_are_refused(espalier):
    refused(
        espalier("prune", "project.py", "--channels", "50%", "--pattern", "blocks"), "--pattern blocks", "--sparsity"
    )
    refused(espalier("prune", "project.py", "--sparsity", "50%", "--part", "heads"), "--part is about", "--channels")
    refused(espalier("prune", "project.py", "--sparsity", "50%", "--multiple", "1"), "--multiple is about")
    refused(espalier("prune", "project.py", "--sparsity", "50%", "--analyse"), "--analyse is about")
    refused(espalier("prune", "project.py", "--macs", "2x", "--schedule", "cubic"), "--schedule cubic", "--epochs")
    refused(espalier("prune", "project.py", "--macs", "2x", "--ms", "2x"), "give one of", "got --macs, --ms")
    refused(espalier("prune", "project.py"), "say how much is to go")
    refused(espalier("prune", "project.py", "--part", "heads", "--criterion", "magnitude"), "say how much is to go")
    refused(espalier("prune", "project.py", "--criterion", "magnitude"), "say how much is to go")


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        ("0.9", "sparsity", (0.9, None)),
        ("0", "sparsity", (0.0, None)),
        ("90%", "sparsity", (0.9, None)),
        ("10x", "sparsity", (0.9, None)),
        ("0%", "channels", (0.0, None)),
        ("2x", "macs", (0.5, None)),
        ("8k", "macs", (None, 8000.0)),
        ("1.5MB", "size", (None, 1.5e6)),
        ("0.5", "ms", (None, 0.5)),
        ("0.5ms", "ms", (None, 0.5)),
    ],
)
def test_amounts(text, what, found):
    assert parse_amount(text, what) == pytest.approx(found)


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("1.0", "sparsity", ""),
        ("-0.1", "sparsity", ""),
        ("100%", "sparsity", ""),
        ("90", "sparsity", "Did you mean 90%?"),
        ("0.5", "channels", "Did you mean 50%?"),
        ("0.5", "macs", "Did you mean 50%?"),
        ("8k", "channels", ""),
        ("0.5x", "macs", ""),
        ("0", "ms", ""),
        ("5 apples", "size", ""),
    ],
)
def test_amounts_that_are_none_name_their_own_option(text, what, hint):
    with pytest.raises(UsageError) as said:
        parse_amount(text, what)
    assert str(said.value).startswith(f"--{what} {text!r} is not understood: write ")
    assert str(said.value).endswith(hint or ".")
    assert ("Did you mean" in str(said.value)) is bool(hint)


def test_a_plan_of_single_weights(espalier):
    code, out, error = espalier("prune", "project.py", "--sparsity", "75%", "--dry-run", "--json")
    assert code == 0, error
    found = json.loads(out)
    rows = {row["name"]: (row["weights"], row["zeros_before"], row["zeros_after"]) for row in found["layers"]}
    assert rows == {"1.weight": (1024, 0, 768), "3.weight": (160, 0, 120)}
    arguments = ("--sparsity", "75%", "--layers", "1.weight", "--epochs", "9", "--schedule", "cubic", "--dry-run")
    code, out, error = espalier("prune", "project.py", *arguments)
    assert code == 0, error
    assert "768" in out
    assert "not among the chosen layers: 3.weight" in out
    assert "with --epochs the choice is made while they train" in out
    code, out, error = espalier("prune", "project.py", "--pattern", "n-m", "--dry-run")  # decides how much by itself
    assert code == 0, error
    assert "50.0%" in out


def test_steps_that_have_no_plan_say_what_to_do(espalier):
    dry = ("prune", "project.py", "--sparsity", "50%", "--dry-run")
    refused(espalier(*dry, "--pattern", "layers"), "pattern layers decides while it works", "without --dry-run")
    moving = ("--criterion", "movement", "--epochs", "2", "--schedule", "linear")
    refused(espalier(*dry, *moving), "--dry-run does not train", "movement", "without --dry-run")
    dry = ("prune", "project.py", "--channels", "50%", "--dry-run")
    refused(espalier(*dry, *moving), "--dry-run does not train", "movement", "without --dry-run")
    code, out, _ = espalier(*dry, "--epochs", "2", "--schedule", "linear")
    assert code == 0
    assert "with --epochs the choice is made while they train" in " ".join(out.split())


def test_a_schedule_with_an_end_of_its_own(espalier):
    rounds = ("--schedule", "listed", "--epochs", "3")
    for what in ("--channels", "--sparsity", "--size"):
        said = refused(espalier("prune", "project.py", what, "50%", *rounds), "--schedule listed ends where 90.0%")
        assert f"whatever {what} 50% asks for" in said
    assert espalier("prune", "project.py", "--sparsity", "90%", *rounds, "--dry-run")[0] == 0


def test_a_plan_without_anything_to_do_says_so(espalier):
    code, out, _ = espalier("prune", "project.py", "--channels", "0%", "--dry-run")
    assert code == 0
    assert "nothing goes: " in out
    code, out, _ = espalier("prune", "project.py", "--sparsity", "0", "--dry-run")
    assert code == 0
    assert "nothing goes: " in out


def test_a_run_whose_architecture_does_not_travel_is_exported_with_its_project(espalier, folder):
    (folder / "project.py").write_text(UNWRITABLE)
    code, _, error = espalier("prune", "project.py", "--sparsity", "50%", "--out", "run", "--json")
    assert code == 0, error
    assert "weights only" in error
    code, out, error = espalier("export", "run", "--to", "safetensors")
    assert code == 0, error

    from safetensors.numpy import load_file

    assert (load_file("run/model.safetensors")["a.weight"] == 0).mean() == 0.5
    code, out, error = espalier("bench", "run", "--repeats", "3", "--json")
    assert code == 0, error
    assert list(json.loads(out)) == ["original", "compressed"]
    (folder / "run" / "project.txt").unlink()
    refused(espalier("export", "run", "--to", "safetensors"), "weights only", "--project project.py")
    code, _, error = espalier("export", "run/model.espalier", "--project", "project.py", "--to", "safetensors")
    assert code == 0, error


def test_export_stores_weights_in_16_bits(espalier, folder):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    refused(espalier("export", "project.py", "--weights", "fp61"), "'fp61'", "Did you mean 'fp16'", "?")
    refused(espalier("export", "project.py", "--to", "int8", "--weights", "bf16"), "--weights bf16 is for onnx,")
    code, out, error = espalier("export", "project.py", "--weights", "fp16", "--out", "half.onnx", "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["weights"] == "fp16"
    assert found["bytes"] == (folder / "half.onnx").stat().st_size
    assert found["storage"]["fp32_bytes"] - found["bytes"] > 1800
    assert found["storage"]["sqnr"] > 50
    assert found["metric"]["onnxruntime"] == pytest.approx(found["metric"]["torch"], abs=1)
    code, out, error = espalier("export", "project.py", "--to", "safetensors", "--weights", "bf16")
    assert code == 0, error
    assert "bf16 is how the weights are stored: 1,024 of 1,210 numbers" in out
    assert "smaller, not faster" in out


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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and so
    try:  # would whatever it starts
        process = subprocess.Popen(
            [*command, "--out", "run"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
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


QUANTIZED = ("quantize", "project.py", "--weights", "twn", "--bits", "2", "--activations", "affine-input")


def test_quantize_covers_trains_and_says_so(espalier, folder):
    code, out, _ = espalier(*QUANTIZED, "--activation-bits", "4", "--epochs", "2", "--out", "runs/q")
    assert code == 0
    assert "covered 2 of 2 layers" in out
    assert "100.0 % of the multiply-adds; 2 inputs" in out
    record = json.loads((folder / "runs" / "q" / "record.json").read_text())
    found = record["steps"][-1]["details"]["coverage"]
    assert found["weights"]["1.weight"] == {"method": "quantize.affine", "bits": 8, "parameters": 1024}
    assert found["inputs"]["3"]["bits"] == 8
    assert "inputs quantized" in (folder / "runs" / "q" / "report.html").read_text()


def test_quantize_takes_parts_with_fields_and_bits_by_layer(espalier, folder):
    code, out, error = espalier(
        "quantize", "project.py", "--weights", "{twn: {solution: exact}}", "--ends", "same", "--out", "runs/q", "--json"
    )
    assert code == 0, error
    step = json.loads(out)["recipe"]["recipe"]["steps"][0]["quantize.quantize"]
    assert step["weights"]["twn"]["solution"] == "exact"
    code, out, error = espalier(
        "quantize", "project.py", "--bits", '{"1": 3, "3": 5}', "--ends", "same", "--out", "runs/r", "--json"
    )
    assert code == 0, error
    found = json.loads(out)["steps"][-1]["details"]["coverage"]["weights"]
    assert [row["bits"] for row in found.values()] == [3, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "tern"), ("tern", "Did you mean", "ternary")),
        (("--weights", "ttq", "--bits", "4"), ("bits=4", "ttq can do 2")),
        (("--bits", "40"), ("bits=40",)),
        (("--weights", "{twn: "), ("not understood",)),
        (("--int8", "--bits", "4"), ("--int8", "--bits")),
        (("--runtime", "openvino"), ("--runtime", "--int8")),
        (("--gradients", "gradient-quantization"), ("epochs",)),
        (("--scheme", "two-stage", "--epochs", "1"), ("two-stage", "activations")),
        (("--layers", "nowhere"), ("nowhere",)),
    ],
)
def test_quantize_says_what_is_wrong(espalier, folder, options, words):
    refused(espalier("quantize", "project.py", *options), *words)
    assert not (folder / "runs").exists() or not list((folder / "runs").rglob("*.espalier"))


@pytest.mark.slow
def test_quantize_int8_writes_runs_and_times_a_file(espalier, folder):
    pytest.importorskip("onnxruntime")
    code, out, error = espalier("quantize", "project.py", "--int8", "--runtime", "onnxruntime", "--out", "runs/8")
    assert code == 0, error
    assert (folder / "runs" / "8" / "model.int8.onnx").is_file()
    for words in ("2 of 2 layers in int8", "onnxruntime, int8", "onnxruntime, fp32", "accuracy on val"):
        assert words in out
    record = json.loads((folder / "runs" / "8" / "record.json").read_text())
    assert record["int8"]["coverage"]["layers"] == 2
    assert (folder / "runs" / "8" / "report.html").read_text().count("2 of 2 layers in int8") == 1
    code, out, error = espalier(
        "quantize", "project.py", "--int8", "--runtime", "onnxruntime", "--out", "runs/8", "--resume"
    )
    assert code == 0, error
    assert out.count("2 of 2 layers in int8") == 1
    code, out, error = espalier("export", "runs/8", "--to", "int8", "--runtime", "tensorrt", "--out", "again.onnx")
    assert code == 0, error
    assert "tensorrt was not run" in out
    code, out, error = espalier(
        "export", "runs/8", "--to", "int8", "--runtime", "onnxruntime", "--observer", "mse", "--out", "mse.onnx"
    )
    assert code == 0, error
    code, out, error = espalier("quantize", "project.py", "--int8", "--observer", "mean", "--out", "runs/9")
    assert code == 2
    assert "no observer is called 'mean'" in error


def test_an_int8_file_with_a_worse_metric_is_not_kept(tmp_path, monkeypatch):
    import torch
    from torch import nn

    import espalier as es
    from espalier import deploy
    from espalier.cli.int8 import measured
    from espalier.core.errors import ModelError

    class Reversed(nn.Module):
        def forward(self, x):
            return -x

    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    task = es.tasks.classification(None, [(x, x.argmax(1))])
    for file in ("m.xml", "m.bin"):
        (tmp_path / file).touch()
    files = {"m.xml": 0, "m.bin": 0}
    done = SimpleNamespace(path=tmp_path / "m.xml", runtime="openvino", files=files)
    found = {}
    monkeypatch.setattr(deploy, "open", lambda *_, **__: SimpleNamespace(module=lambda: found["file"]))
    found["file"] = nn.Identity()
    assert measured(nn.Identity(), nn.Identity(), task, done, 1)["openvino, int8"] == 100
    found["file"] = Reversed()
    with pytest.raises(ModelError, match=r"accuracy on val is 0.00 .* in the int8 file and 100.00 .*--keep-fp32"):
        measured(nn.Identity(), nn.Identity(), task, done, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--activation-bits", "4"), ("activation_bits has no say without activations",)),
        (("--observer", "mse"), ("--observer calibrates an int8 file",)),
        (("--gradient-bits", "4", "--epochs", "1"), ("gradient_bits has no say without gradients",)),
        (("--weights", "xnor"), ("no weight quantizer is called 'xnor'",)),
        (("--weights", "{twn: {solutio: exact}}"), ("solutio", "solution")),
        (("--int8", "--runtime", "openvin"), ("openvin", "Did you mean 'openvino'")),
        (("--keep-fp32", "fc"), ("--keep-fp32", "--int8")),
    ],
)
def test_quantize_refuses_what_would_have_no_say(espalier, folder, options, words):
    refused(espalier("quantize", "project.py", *options), *words)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("train.finetune ema={ema: {decay: 0.9}}", "Values with blanks or brackets stand in quotes"),
        ("prune.prune sparsity='[0.9'", "the value of sparsity is '[0.9', which is no YAML"),
        ('prune.prune sparsity="0.9', "cannot be read: no closing quotation"),
    ],
)
def test_a_step_that_cannot_be_read_is_one_sentence(espalier, folder, step, said):
    code, _, error = espalier("compress", "project.py", "--step", step, "--out", "runs/x")
    assert code == 2
    assert said in " ".join(error.split())
    assert "Traceback" not in error
    assert not (folder / "runs" / "x").exists()
