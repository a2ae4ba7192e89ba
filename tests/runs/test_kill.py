"""kill -9 at random moments, then --resume: the same final bytes."""

import random

import pytest
from benchmarks.kill_resume import disturbed, prepare


@pytest.mark.slow
def test_five_kills_change_no_byte(tmp_path):
    reference, pace = prepare(tmp_path)
    found, moments = disturbed(tmp_path, "disturbed", 5, pace, random.Random(1))
    assert moments, "no kill landed while the run was alive"
    assert found == reference
