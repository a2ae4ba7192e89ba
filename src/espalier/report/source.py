"""Where the plain data comes from: a run directory, a ``record.json``, or a record that is already there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from espalier.core.errors import RunError

SCHEMA = 1
RECORD = "record.json"


def load(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of a run. Raises ``RunError`` where there is none or it is of a schema not known here."""
    if isinstance(source, Mapping):
        return _checked(source, "the record")
    path = Path(source)
    path = path / RECORD if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"{path} is not there. Name a run directory (it holds {RECORD}, written when a run ends or is interrupted)."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}.") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON ({error}); write it again with --resume.") from error
    return _checked(data, str(path))


def _checked(data: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise RunError(f"{what} holds a {type(data).__name__}; a run's record is a JSON object.")
    if data.get("schema") != SCHEMA:
        raise RunError(
            f"{what} has schema {data.get('schema')!r}; this version reads schema {SCHEMA}. "
            "Read it with the espalier version that wrote it."
        )
    return data
