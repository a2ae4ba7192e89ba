"""Settings of the whole suite: torch threads, Hypothesis, and the folder of real data."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"

if "ESPALIER_DATA" not in os.environ and BESIDE.is_dir():
    os.environ["ESPALIER_DATA"] = str(BESIDE)

hypothesis.settings.register_profile("espalier", deadline=None, print_blob=True)
hypothesis.settings.load_profile("espalier")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """One thread count for the session: results repeat for equal counts only."""
    import torch

    torch.set_num_threads(int(THREADS))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    named = os.environ.get("ESPALIER_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("ESPALIER_DATA names no data folder")
    return Path(named)
