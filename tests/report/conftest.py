"""``record.json`` beside this file: a made-up run of LeNet-300-100 in the shape a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def record() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "record.json").read_text(encoding="utf-8"))
