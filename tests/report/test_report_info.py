"""Every number the report shows, exactly."""

from __future__ import annotations

import json

import pytest

from espalier.core.errors import RunError
from espalier.report import load, summarise


def change_of(info, label):
    return next(row for row in info.rows if row.label == label)


def test_the_sentence_on_top(record) -> None:
    assert summarise(record).headline == (
        "1.07 MB became 17.9 kB: 59.6x smaller, 1.62 ± 0.13 % test error instead of 1.58 ± 0.12 %; "
        "verified by re-loading the file."
    )


def test_without_test_the_measured_split_is_named(record) -> None:
    del record["test"]
    assert "1.64 ± 0.17 % val error instead of 1.60 ± 0.17 %" in summarise(record).headline
    record["compressed"]["metric"]["split"] = "test"  # scores of two splits are not compared
    assert "1.64 ± 0.17 % test error; verified" in summarise(record).headline


def test_other_metrics_keep_their_name_and_direction(record) -> None:
    record["metric"] = {"name": "perplexity", "unit": "", "higher_is_better": False}
    record["test"] = {"original": {"value": 12.5, "stderr": 0.02}, "compressed": {"value": 12.75, "stderr": 0.02}}
    info = summarise(record)
    assert "12.75 ± 0.02 test perplexity instead of 12.50 ± 0.02" in info.headline
    row = change_of(info, "perplexity, test")
    assert (row.change.text, row.better) == ("+0.25", False)


@pytest.mark.parametrize(("verified", "said"), [(False, "was NOT verified."), (None, "instead of 1.58 ± 0.12 %.")])
def test_nothing_is_called_verified_that_was_not(record, verified, said) -> None:
    record["files"]["model.espalier"]["verified"] = verified
    headline = summarise(record).headline
    assert headline.endswith(said)
    assert "verified by" not in headline


def test_a_file_that_grew_is_called_larger(record) -> None:
    record["files"]["model.espalier"]["bytes"] = 2 * 1_066_800
    info = summarise(record)
    assert "2.13 MB: 2.00x larger" in info.headline
    assert (info.rows[0].change.text, info.rows[0].better) == ("2.00x larger", False)


def test_the_table(record) -> None:
    table = [
        (row.label, row.before.text, row.after.text, row.change.text, row.better) for row in summarise(record).rows
    ]
    assert table == [
        ("file, self-contained", "1.07 MB", "17.9 kB", "59.6x smaller", True),
        ("file, architecture known", "1.07 MB", "17.8 kB", "60.1x smaller", True),
        ("parameters", "266,610", "266,610", "same", None),
        ("non-zero parameters", "266,610", "21,706", "12.3x fewer", True),
        ("MACs per sample", "266,200", "266,200", "same", None),
        ("latency", "0.0510 ms", "0.0520 ms", "1.02x slower", None),
        ("throughput", "139,434 samples/s", "136,752 samples/s", "1.02x lower", None),
        ("peak tensor memory", "1.32 MB", "1.32 MB", "same", None),
        ("accuracy, val", "98.40 ± 0.17 %", "98.36 ± 0.17 %", "−0.04 points", None),
        ("accuracy, test", "98.42 ± 0.12 %", "98.38 ± 0.13 %", "−0.04 points", None),
    ]


def test_changes_within_the_spread_are_called_that(record) -> None:
    info = summarise(record)
    assert change_of(info, "latency").change.note == "within the spread"
    assert change_of(info, "latency").note == "batch 1, 1 thread, median of 30"
    assert change_of(info, "accuracy, test").change.note == "within one standard error"
    record["compressed"]["latency"] = {"median_ms": 0.1, "p10_ms": 0.09, "p90_ms": 0.11}
    record["test"]["compressed"]["value"] = 98.0
    info = summarise(record)
    assert (change_of(info, "latency").change.note, change_of(info, "latency").better) == ("", False)
    assert (change_of(info, "accuracy, test").change.note, change_of(info, "accuracy, test").better) == ("", False)


def test_the_target(record) -> None:
    record["target"] = {"size": 17_000, "times": 50, "max_drop": 0.03, "minutes": 2}
    assert [(g.label, g.asked, g.reached, g.met) for g in summarise(record).goals] == [
        ("size", "at most 17.0 kB", "17.9 kB", False),
        ("ratio", "at least 50x smaller", "59.6x", True),
        ("drop on val", "at most 0.03 points", "0.04 points", False),
        ("time", "at most 2 min", "", None),
    ]
    record["original"]["metric"]["split"] = "test"  # a drop on val needs both on val
    assert summarise(record).goals[2].met is None


def test_the_bytes_add_up(record) -> None:
    found = summarise(record).budget
    assert found.total == 17_900
    assert found.parts == (
        ("values", 10_030), ("positions", 6_420), ("codebooks", 372), ("floats", 740), ("graph", 146), ("header", 192),
    )  # fmt: skip
    assert sum(size for _, size in found.parts) == found.total
    assert found.unexplained == 0
    assert [(s.name, s.total) for s in found.shares] == [
        ("fc1.weight", 13_324), ("fc2.weight", 2_924), ("fc3.weight", 574), ("fc1.bias", 540), ("fc2.bias", 180),
        ("fc3.bias", 20),
    ]  # fmt: skip
    assert (found.shares[0].shape, found.shares[0].coding) == ("300 × 784", "masked codebook, adaptive")


def test_bytes_that_are_not_itemised_are_said(record) -> None:
    info = record["files"]["model.espalier"]["info"]
    info["total"] = 18_000
    assert summarise(record).budget.unexplained == 100
    info["total"] = 17_000
    assert summarise(record).budget.unexplained == -900
    del info["total"]
    assert summarise(record).budget.total == 17_900


def test_layers_are_shown_as_far_as_they_are_known(record) -> None:
    """A file's own account says neither parameters nor zeros: the shape gives the first, nothing the second."""
    row = {
        "name": "w",
        "shape": [2, 3],
        "kind": "codebook",
        "coder": "adaptive, planes",
        "bytes": {"values": 50, "new": 10},
    }
    record["files"]["model.espalier"]["info"] = {
        "total": 200,
        "prefix": 32,
        "header": 40,
        "plans": 68,
        "tensors": [row],
    }
    record["layers"] = [row]
    info = summarise(record)
    assert info.budget.parts == (("values", 50), ("plans", 68), ("header", 72), ("new", 10))
    layer = info.layers[0]
    assert (layer.parameters, layer.nonzero, layer.bytes, layer.bits_per_weight) == (6, None, 60, 80)
    assert layer.coding == "codebook, adaptive, planes"


def test_the_layers(record) -> None:
    layer = summarise(record).layers[0]
    assert (layer.name, layer.parameters, layer.nonzero, layer.bytes) == ("fc1.weight", 235_200, 16_464, 13_324)
    assert layer.density == pytest.approx(0.07)
    assert layer.bits_per_weight == pytest.approx(8 * 13_324 / 235_200)


def test_the_steps(record) -> None:
    outer, pruned, shared, tuned = summarise(record).steps
    assert [(s.name, s.depth) for s in (outer, pruned, shared, tuned)] == [
        ("deep-compression", 0), ("prune", 1), ("kmeans", 1), ("finetune", 1),
    ]  # fmt: skip
    assert [(d.label, d.before, d.after, d.change, d.better) for d in shared.deltas] == [
        ("file", "42.0 kB", "18.4 kB", "2.28x smaller", True),
        ("non-zero", "21,706", "21,706", "same", None),
        ("accuracy, val", "98.31 ± 0.13 %", "98.12 ± 0.13 %", "−0.19 points", False),
    ]
    assert tuned.deltas[2].change == "+0.24 points"
    assert pruned.deltas[0].before == ""  # the file before the step was not measured
    assert pruned.fields == (("sparsity", "0.92"), ("scope", "global"), ("schedule", "cubic"), ("epochs", "20"))
    assert pruned.per_layer[0].range == "62.0 % to 93.1 % over 3 layers"
    assert shared.per_layer[0].range == "5 bits over 3 layers"


def test_fields_are_written_as_a_person_would(record) -> None:
    record["steps"][1]["fields"] = {
        "optimizer": {"adamw": {"betas": [0.9, 0.999], "decay": 0.01}}, "bits": {"conv*": 8, "*": 5}, "clip": None,
        "penalties": [], "densify": False, "sparsity": 0.9570508193979557, "layers": ["*"], "seed": 0,
    }  # fmt: skip
    assert summarise(record).steps[1].fields == (
        ("optimizer", "adamw(betas [0.9, 0.999], decay 0.01)"), ("bits", "conv*: 8, *: 5"), ("densify", "false"),
        ("sparsity", "0.957051"), ("layers", "[*]"), ("seed", "0"),
    )  # fmt: skip


def test_a_change_too_small_for_its_digits_is_slight(record) -> None:
    record["steps"][3]["before"]["bytes"], record["steps"][3]["after"]["bytes"] = 3270, 3262
    assert summarise(record).steps[3].deltas[0].change == "slightly smaller"


def test_a_drop_within_a_standard_error_is_no_loss(record) -> None:
    assert summarise(record).steps[1].deltas[2].better is None  # -0.09 of ± 0.18


def test_depth_counts_from_the_outermost_step_recorded(record) -> None:
    record["steps"] = record["steps"][1:]
    assert [step.depth for step in summarise(record).steps] == [0, 0, 0]


def test_the_training_curves(record) -> None:
    curves = summarise(record).steps[1].curves
    assert [(c.label, c.unit, len(c.points)) for c in curves] == [
        ("training loss", "", 20), ("accuracy, val", "%", 20), ("learning rate", "", 20),
    ]  # fmt: skip
    assert curves[0].points[0] == (1, pytest.approx(0.32))


def test_the_training_loop_s_own_history_is_understood(record) -> None:
    rows = [
        {"epoch": k, "loss": 1 / k, "score": None if k == 2 else 90 + k, "lr": 0.1, "seconds": 1} for k in (1, 2, 3)
    ]
    record["steps"][1]["details"] = {"history": rows}
    loss, score = summarise(record).steps[1].curves  # a constant learning rate is no curve
    assert loss.points == ((1, 1), (2, 0.5), (3, pytest.approx(1 / 3)))
    assert score.points == ((1, 91), (3, 93))


def test_long_histories_are_thinned_to_their_ends(record) -> None:
    record["steps"][1]["details"] = {"history": [{"epoch": k, "train_loss": float(k)} for k in range(5000)]}
    points = summarise(record).steps[1].curves[0].points
    assert (len(points), points[0], points[-1]) == (400, (0, 0), (4999, 4999))


def test_codebooks_are_listed(record) -> None:
    books = {"fc1": {"layers": ["fc1.weight"], "bits": 5, "symbols": 33}, "fc2": {"bits": 6, "symbols": 65}}
    record["steps"][2]["details"] = {"codebooks": books}
    found = summarise(record).steps[2].per_layer[0]
    assert (found.range, found.entries[0]) == ("5 bits to 6 bits in 2 codebooks", ("fc1", "5 bits, 33 values"))


def test_layers_made_from_fewer_numbers_are_listed(record) -> None:
    record["steps"][2]["details"] = {
        "factors": [{"name": "fc1.weight", "ranks": [4, 8], "parameters": [1000, 400], "error": 0.125}],
        "layers": {"fc2.weight": {"structure": "circulant", "weights": 600, "numbers": 100, "relative_error": 0.5}},
        "swapped": [{
            "layer": "conv", "block": "ghost", "numbers": [90, 50], "error": {"start": 0.75, "regressed": 0.25},
        }],
    }  # fmt: skip
    (found,) = summarise(record).steps[2].per_layer
    assert (found.label, found.range) == ("numbers kept", "1,690 → 550 in 3 layers")
    assert found.entries == (
        ("fc1.weight", "rank 4, 8: 1,000 → 400; 12.5% off"),
        ("fc2.weight", "circulant: 600 → 100; 50.0% off"),
        ("conv", "ghost: 90 → 50; misses 75.0% of the outputs, 25.0% after regression"),
    )


def test_teachers_rounds_and_tries_are_listed(record) -> None:
    record["steps"][2]["details"] = {
        "before": [{"student": 80.0, "original": 91.25}],
        "rounds": [
            {"round": 1, "bytes_up": 1500, "bytes_down": 3000, "metric": 50.5},
            {"round": 2, "bytes_up": 1500, "bytes_down": 3000},
        ],
        "tries": [
            {"name": "01-prune-01", "bytes": 2000, "drop": 0.5, "kept": True, "reason": ""},
            {"name": "01-prune-02", "kept": False, "reason": "nothing left to remove"},
        ],
    }  # fmt: skip
    teachers, rounds, tries = summarise(record).steps[2].per_layer
    assert teachers.entries == (("student", "80"), ("original", "91.25"))
    assert (rounds.range, rounds.entries[0]) == (
        "9.00 kB in 2 rounds", ("round 1", "1.50 kB up, 3.00 kB down; 50.5 after it"),
    )  # fmt: skip
    assert tries.range == "1 of 2 kept"
    assert tries.entries == (
        ("01-prune-01", "2.00 kB, drop 0.50; kept"), ("01-prune-02", "nothing left to remove"),
    )  # fmt: skip


@pytest.mark.parametrize("nonsense", [5, "x", [1], [{}], {"a": 1}, [{"ranks": 5, "parameters": 3}], None, [None]])
def test_nonsense_in_the_details_is_passed_over(record, nonsense) -> None:
    keys = ("factors", "layers", "swapped", "before", "rounds", "tries")
    record["steps"][2]["details"] = dict.fromkeys(keys, nonsense)
    assert isinstance(summarise(record).steps[2].per_layer, tuple)


def test_what_was_left_alone_is_grouped_by_reason(record) -> None:
    (left,) = summarise(record).skipped
    assert (left.names, left.reason) == (("fc1.bias", "fc2.bias", "fc3.bias"), "biases are small and sensitive")


def test_warnings_and_notes_of_steps_and_of_writing(record) -> None:
    record["warnings"], record["notes"] = ["no graph"], ["floats kept"]
    info = summarise(record)
    assert [note.step for note in info.warnings] == ["01-deep-compression/02-kmeans", "file"]
    assert info.notes == ("floats kept",)


def test_the_tries(record) -> None:
    tries = summarise(record).tries
    assert [t.final for t in tries] == [False, False, False, False, True]
    assert [t.kept for t in tries] == [True, True, False, False, True]
    assert (tries[4].drop, tries[4].strength, tries[4].bytes) == ("0.04 points", "0.625", 17_900)


def test_the_paired_sentence(record) -> None:
    assert summarise(record).paired == (
        "On the same 10,000 samples, 12 came out worse and 8 better: a drop of 0.04 points "
        "(95 % interval −0.05 points to 0.13 points; McNemar p = 0.50)."
    )
    del record["paired"]["p"]
    assert summarise(record).paired == ""


def test_the_files(record) -> None:
    own, bare = summarise(record).files
    assert (own.name, own.bytes, own.smaller, own.verified) == ("model.espalier", 17_900, "59.6x smaller", True)
    assert own.scores == ("val 98.36 %", "test 98.38 %")
    assert (bare.bytes, bare.smaller) == (17_754, "60.1x smaller")


def test_the_settings(record) -> None:
    found = summarise(record).settings
    assert found.recipe.startswith("steps:\n- recipe:\n")
    assert found.environment[0] == ("espalier", "0.1.0")
    assert ("threads", "2") in found.environment


def test_a_run_that_was_interrupted_at_once_says_so() -> None:
    info = summarise({"schema": 1, "status": "interrupted", "message": "interrupted by Ctrl-C."})
    assert info.headline == "interrupted by Ctrl-C."
    assert summarise({"schema": 1}).headline == "Nothing was measured yet."


def test_records_are_loaded_from_folders_files_and_objects(record, tmp_path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert load(tmp_path) == load(path) == load(str(path)) == load(record) == record


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "list"),
        ("{}", "schema None"),
        ('{"schema": 2}', "schema 2"),
        ("[" * 100_000, "not valid"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, said) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(RunError, match=said):
        load(tmp_path)


def test_a_missing_record_is_named(tmp_path) -> None:
    with pytest.raises(RunError, match=r"record\.json is not there"):
        load(tmp_path)
    (tmp_path / "record.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="cannot be read"):
        load(tmp_path)
