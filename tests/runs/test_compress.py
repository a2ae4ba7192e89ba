"""One run end to end: files, re-loading, the record, targets, resume, refusals."""

import copy
import errno
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import espalier as es
from espalier.core.errors import (
    Corrupt,
    DataError,
    EspalierWarning,
    ModelError,
    NeedError,
    NumericError,
    RunError,
    TargetError,
    UnknownNameError,
    UsageError,
)  # fmt: skip
from espalier.core.recipe import FileOptions
from espalier.prune import Prune
from espalier.share import KMeans
from espalier.train import Finetune


def compress(model, task, recipe, out, **more):
    return es.compress(model, task, recipe, out=out, timing_seconds=0, device="cpu", **more)


def test_a_run_leaves_two_verified_files_that_agree(model, task, recipe, tmp_path):
    before = copy.deepcopy(model.state_dict())
    result = compress(model, task, recipe, tmp_path / "run")
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value), "the user's model changed"
    files = "model.espalier model.weights.espalier record.json report.html recipe.yaml journal.jsonl"
    for name in files.split():
        assert (tmp_path / "run" / name).exists(), name
    x = task.example()[0]
    alone = es.load(result.file)
    filled = es.load(result.file, into=copy.deepcopy(model)).eval()
    weights = es.load(tmp_path / "run" / "model.weights.espalier", into=copy.deepcopy(model)).eval()
    with torch.no_grad():
        assert torch.allclose(alone(x), filled(x), atol=1e-5)
        assert torch.equal(filled(x), weights(x))
    assert result.bytes == result.file.stat().st_size < result.record["original"]["file_bytes"] / 4
    assert result.record["compressed"]["metric"]["value"] == pytest.approx(task.measure(alone, "val").value)


def test_the_record_accounts_for_every_byte_and_step(model, task, recipe, tmp_path):
    record = compress(model, task, recipe, tmp_path / "run").record
    assert json.loads((tmp_path / "run" / "record.json").read_text()) == record
    info = record["files"]["model.espalier"]["info"]
    tensors = sum(sum(row["bytes"].values()) for row in info["tensors"])
    frame = sum(info[part] for part in ("graph", "header", "prefix", "plans"))
    assert tensors + frame == info["total"] == record["files"]["model.espalier"]["bytes"]
    assert [step["path"].rpartition("/")[2] for step in record["steps"]] == ["01-prune", "02-kmeans", "03-finetune"]
    assert record["steps"][0]["after"]["nonzero"] < record["steps"][0]["before"]["nonzero"]
    assert record["steps"][1]["after"]["bytes"] < record["steps"][1]["before"]["bytes"]
    assert set(record["test"]) == {"original", "compressed"}


def test_same_seed_same_bytes_other_seed_other_bytes(model, task, recipe, tmp_path):
    first = compress(model, task, recipe, tmp_path / "a").file.read_bytes()
    again = compress(model, task, recipe, tmp_path / "b").file.read_bytes()
    other = compress(model, task, recipe, tmp_path / "c", seed=1).file.read_bytes()
    assert first == again
    assert first != other


def test_an_interrupted_run_resumes_to_the_same_bytes(model, task, recipe, tmp_path, monkeypatch):
    whole = compress(model, task, recipe, tmp_path / "whole").file.read_bytes()
    calls = []

    def interrupt(report):
        calls.append(report)
        if report.path.endswith("01-prune") and report.done == report.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, task, recipe, tmp_path / "cut", listener=interrupt)
    record = json.loads((tmp_path / "cut" / "record.json").read_text())
    assert record["status"] == "interrupted"
    assert "--resume" in record["message"]
    with pytest.raises(RunError, match="--resume"):
        compress(model, task, recipe, tmp_path / "cut")
    assert compress(model, task, recipe, tmp_path / "cut", resume=True).file.read_bytes() == whole


def test_a_finished_run_is_read_back(model, task, recipe, tmp_path):
    first = compress(model, task, recipe, tmp_path / "run")
    again = compress(model, task, recipe, tmp_path / "run", resume=True)
    assert again.record == first.record


def test_resume_with_something_else_is_refused(model, task, recipe, tmp_path):
    compress(model, task, recipe, tmp_path / "run")
    with pytest.raises(RunError, match="another recipe"):
        compress(model, task, recipe.replace(strength=0.6), tmp_path / "run", resume=True)
    with pytest.raises(RunError, match="another model's weights"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].weight.add_(1)
        compress(other, task, recipe, tmp_path / "run", resume=True)


def test_a_size_target_is_met_with_the_best_metric_kept(model, task, recipe, tmp_path):
    result = compress(model, task, recipe, tmp_path / "run", size="9x")
    record = result.record
    assert result.met
    assert result.bytes <= record["original"]["file_bytes"] / 9
    kept = [item for item in record["tries"] if item["kept"]]
    assert len(kept) == 1
    assert kept[0]["bytes"] == result.bytes
    fitting = [item for item in record["tries"] if item["bytes"] <= record["original"]["file_bytes"] / 9]
    assert kept[0]["drop"] == min(item["drop"] for item in fitting)


def test_a_drop_target_keeps_the_smallest_that_holds(model, task, recipe, tmp_path):
    record = compress(model, task, recipe, tmp_path / "run", max_drop=30.0).record
    good = [item for item in record["tries"] if item["drop"] <= 30.0]
    kept = next(item for item in record["tries"] if item["kept"])
    assert record["status"] == "done"
    assert kept["bytes"] == min(item["bytes"] for item in good)


def test_a_target_out_of_reach_names_the_gap_and_keeps_the_nearest(model, task, recipe, tmp_path):
    result = compress(model, task, recipe, tmp_path / "run", size="200B", max_drop=0.5)
    assert not result.met
    assert result.record["status"] == "target-missed"
    assert "out of reach" in result.record["message"]
    assert "more than the 200 allowed" in result.record["message"]
    assert result.file.exists()


def test_a_target_needs_a_strength_and_val(model, task, tmp_path):
    with pytest.raises(TargetError, match="strength"):
        compress(model, task, Prune(sparsity=0.5), tmp_path / "run", size="10x")
    without = es.tasks.classification(task.train)
    with pytest.raises(TargetError, match="validation"):
        compress(model, without, "deep-compression", tmp_path / "run", size="10x")
    assert not (tmp_path / "run").exists(), "refused before anything was written"


def test_needs_are_named_before_any_work(model, task, tmp_path):
    without = es.tasks.classification(val=task.val)
    with pytest.raises(NeedError, match="training data"):
        compress(model, without, Finetune(epochs=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_models_and_data_are_named_before_any_work(model, task, tmp_path):
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(NumericError, match=r"0\.weight"):
        compress(model, task, Prune(sparsity=0.5), tmp_path / "run")
    with pytest.raises(DataError, match="one-shot"):
        es.tasks.classification(iter([1, 2]))
    with pytest.raises(DataError, match="no batch"):
        compress(nn.Linear(2, 2), es.tasks.classification(val=[]), Prune(sparsity=0.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_its_data_is_named_before_any_work(task, tmp_path):
    with pytest.raises(ModelError, match="does not run on the task's first batch"):
        compress(nn.Sequential(nn.Flatten(), nn.Linear(63, 10)), task, Prune(sparsity=0.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_coder_is_named_before_any_work(model, task, tmp_path):
    recipe = es.Recipe(steps=(Prune(sparsity=0.5),), file=FileOptions(coders=("hufman",)))
    with pytest.raises(UsageError, match="huffman"):
        compress(model, task, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused(model, task, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        compress(model, task, Prune(sparsity=0.5), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_run_that_failed_at_once_may_start_over_in_its_folder(model, task, tmp_path):
    with pytest.raises(UnknownNameError, match="no weight answers"):
        compress(model, task, Prune(sparsity=0.5, layers=("fc9",)), tmp_path / "run")
    assert compress(model, task, Prune(sparsity=0.5), tmp_path / "run").met


def test_a_full_disk_says_so_and_resumes(model, task, recipe, tmp_path, monkeypatch):
    whole = compress(model, task, recipe, tmp_path / "whole").file.read_bytes()
    real, count = os.fsync, []

    def full(descriptor):
        count.append(descriptor)
        if len(count) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk is full"):
        compress(model, task, recipe, tmp_path / "run")
    monkeypatch.setattr(os, "fsync", real)
    assert compress(model, task, recipe, tmp_path / "run", resume=True).file.read_bytes() == whole


def test_into_leaves_the_receiver_alone_when_the_file_does_not_fit(model, task, tmp_path):
    result = compress(model, task, Prune(sparsity=0.5), tmp_path / "run")
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(3, 3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UsageError, match="does not fit"):
        es.load(result.file, into=other)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    with pytest.raises(UsageError, match="into"):
        es.load(tmp_path / "run" / "model.weights.espalier")


def test_a_model_that_cannot_be_traced_still_gets_its_weights(task, tmp_path):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            y = self.fc(x.flatten(1))
            return y if float(y.sum()) > 1e9 else y * 1.0

    torch.manual_seed(0)
    with pytest.warns(EspalierWarning, match="architecture does not travel"):
        result = compress(Moody(), task, KMeans(bits=4), tmp_path / "run")
    filled = es.load(result.file, into=Moody()).eval()
    assert len(np.unique(filled.fc.weight.detach().numpy())) <= 16
    with pytest.raises(UsageError, match="into"):
        es.load(result.file)


@pytest.mark.parametrize("kind", ["tied", "dict", "lstm", "frozen"])
def test_any_module_goes_through_the_file(kind, tmp_path):
    torch.manual_seed(0)
    model, batches = _odd_model(kind)
    task = es.Task(train=batches, val=batches, loss=nn.functional.cross_entropy, metric=es.tasks.Accuracy())
    steps = (Prune(sparsity=0.6, epochs=1), KMeans(bits=3), Finetune(epochs=1, lr=1e-3))
    recipe = es.Recipe(steps=steps, file=FileOptions(floats="fp32"))
    result = compress(model, task, recipe, tmp_path / "run")
    filled = es.load(result.file, into=copy.deepcopy(model)).eval()
    alone = es.load(result.file)
    with torch.no_grad():
        assert torch.allclose(task.predict(alone, batches[0]), task.predict(filled, batches[0]), atol=1e-5)
    if kind == "tied":
        assert alone.embed.weight is alone.out.weight
        assert filled.embed.weight is filled.out.weight
    if kind == "frozen":
        assert torch.equal(filled.body.bias, model.body.bias), "a frozen bias moved"
        assert not result.record["warnings"]


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x).mean(1))


class _Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, first, second):
        return self.b(torch.relu(self.a(first) + self.a(second)))


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class _Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


def _odd_model(kind):
    if kind == "tied":
        return _Tied(), [(torch.randint(0, 12, (8, 5)), torch.randint(0, 12, (8,))) for _ in range(3)]
    if kind == "dict":
        return _Dict(), [
            {"first": torch.randn(8, 6), "second": torch.randn(8, 6), "labels": torch.randint(0, 4, (8,))}
            for _ in range(3)
        ]
    if kind == "lstm":
        return _Recurrent(), [(torch.randn(8, 4, 5), torch.randint(0, 3, (8,))) for _ in range(3)]
    return _Frozen(), [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(3)]


def test_zeros_are_run_or_the_report_says_that_they_do_not_pay(task, tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    step = es.prune.Prune(pattern=es.prune.Blocks(height=8, width=8), sparsity=0.9)
    with pytest.warns(EspalierWarning, match="nothing trains after step 1"):
        record = es.compress(wide, task, step, out=tmp_path / "run", timing_seconds=0.1, device="cpu").record
    assert record["zeros"]["layers"][0]["layout"] == "blocks of 8"
    assert any(note.startswith("zeros: ") for note in record["notes"])


def test_a_file_that_computes_something_else_is_refused(model, task, tmp_path, monkeypatch):
    import espalier.runs.files as files

    whole = files.freeze_model

    def wrong(*args, **more):
        frozen = whole(*args, **more)
        name = next(name for name in frozen.tensors if name.endswith("weight"))
        frozen.tensors[name] = frozen.tensors[name].take(0, np.arange(frozen.tensors[name].shape[0])[::-1].copy())
        return frozen

    monkeypatch.setattr(files, "freeze_model", wrong)
    with pytest.raises(Corrupt, match="disagree by"):
        compress(model, task, Prune(sparsity=0.5), tmp_path / "run")
