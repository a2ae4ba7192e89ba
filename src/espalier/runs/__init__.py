"""Runs: the directory, the journal, checkpoints, resume, and the two verified files."""

from espalier.runs.files import load
from espalier.runs.run import Result, Run

__all__ = ["Result", "Run", "load"]
