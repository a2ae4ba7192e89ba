"""What the tests of quantization start from."""

from __future__ import annotations

import pytest

from espalier.core.task import Task, classification
from espalier.data import standard


@pytest.fixture(scope="module")
def task() -> Task:
    digits = standard("digits")
    return classification(digits.train, digits.val, digits.test)
