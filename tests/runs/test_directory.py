"""The run directory: the journal after a kill, refusals, all-or-nothing writes."""

import errno
import os

import pytest

from espalier.core.errors import RunError
from espalier.core.files import write_atomic
from espalier.runs.directory import RunDirectory


def test_events_come_back_in_order(tmp_path):
    run = RunDirectory.open(tmp_path / "run", resume=False)
    run.log("step", path="a", leaf=True)
    run.log("step", path="b", leaf=True)
    run.log("step", path="a", leaf=False)
    again = RunDirectory.open(tmp_path / "run", resume=True)
    assert again.journal == run.journal
    assert [event["path"] for event in again.events("step")] == ["a", "b", "a"]
    assert again.find("step", path="a") == {"event": "step", "path": "a", "leaf": False}
    assert again.find("step", path="c") is None


def test_a_line_cut_off_by_a_kill_is_dropped_and_the_journal_goes_on(tmp_path):
    run = RunDirectory.open(tmp_path / "run", resume=False)
    run.log("step", path="a", leaf=True)
    with (tmp_path / "run" / "journal.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "pa')
    again = RunDirectory.open(tmp_path / "run", resume=True)
    assert len(again.journal) == 1
    again.log("step", path="b", leaf=True)
    assert [event["path"] for event in RunDirectory.open(tmp_path / "run", resume=True).journal] == ["a", "b"]


def test_damage_in_the_middle_is_refused(tmp_path):
    run = RunDirectory.open(tmp_path / "run", resume=False)
    run.log("step", path="a", leaf=True)
    text = (tmp_path / "run" / "journal.jsonl").read_bytes()
    (tmp_path / "run" / "journal.jsonl").write_bytes(b"{oops\n" + text)
    with pytest.raises(RunError, match="damaged at line 1"):
        RunDirectory.open(tmp_path / "run", resume=True)


def test_folders_that_are_not_ours(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        RunDirectory.open(tmp_path / "file", resume=False)
    with pytest.raises(RunError, match="holds no run"):
        RunDirectory.open(tmp_path, resume=True)


def test_a_finished_step_is_not_started_over(tmp_path):
    run = RunDirectory.open(tmp_path / "run", resume=False)
    run.log("start")
    RunDirectory.open(tmp_path / "run", resume=False)
    assert not (tmp_path / "run" / "journal.jsonl").exists(), "nothing was finished, so it starts over"
    run.log("step", path="a", leaf=True)
    with pytest.raises(RunError, match="--resume"):
        RunDirectory.open(tmp_path / "run", resume=False)


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a" / "file", b"old", parents=True)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk is full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    with pytest.raises(RunError, match="folder exists"):
        write_atomic(tmp_path / "nowhere" / "file", b"x")
