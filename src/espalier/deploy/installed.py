"""Which of the optional packages are here, and the sentence that says how to get the others."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from espalier.core.errors import NeedError

EXTRAS = {"executorch": "executorch"}
"""Package -> the extra that has it, where that is not ``deploy``."""


def version(package: str) -> str | None:
    """The installed version of ``package``, or None."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def need(who: str, *packages: str) -> tuple[ModuleType, ...]:
    """Import ``packages``. Raises ``NeedError`` naming those that are missing and the extra that has them."""
    missing = [name for name in packages if version(name) is None]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS.get(name, "deploy") for name in missing))
        raise NeedError(
            f"{who} needs {' and '.join(missing)}, which {_is(missing)} not installed: "
            f"pip install 'espalier[{extras}]'."
        )
    with quiet():
        return tuple(importlib.import_module(name) for name in packages)


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and log lines of other packages: what fails is said once, by us."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
