"""espalier: the smallest, fastest network that is still good enough, as a file, with the proof and the picture.

Names are imported on first use; ``import espalier`` alone imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "import a.b as b": a from-import of itself would be typed by __getattr__, as Any
    import espalier.compact as compact  # noqa: PLR0402
    import espalier.data as data  # noqa: PLR0402
    import espalier.deploy as deploy  # noqa: PLR0402
    import espalier.distill as distill  # noqa: PLR0402
    import espalier.encode as encode  # noqa: PLR0402
    import espalier.factorize as factorize  # noqa: PLR0402
    import espalier.graph as graph  # noqa: PLR0402
    import espalier.measure as measure  # noqa: PLR0402
    import espalier.prune as prune  # noqa: PLR0402
    import espalier.quantize as quantize  # noqa: PLR0402
    import espalier.recipes as recipes  # noqa: PLR0402
    import espalier.report as report  # noqa: PLR0402
    import espalier.runs as runs  # noqa: PLR0402
    import espalier.share as share  # noqa: PLR0402
    import espalier.tasks as tasks  # noqa: PLR0402
    import espalier.train as train  # noqa: PLR0402
    from espalier.api import compress, load
    from espalier.core.context import Context
    from espalier.core.metric import Metric
    from espalier.core.recipe import Recipe
    from espalier.core.target import Target
    from espalier.core.task import Task
    from espalier.encode import info, unpack, verify

__version__ = "0.1.0"

_HOMES = {
    "compress": "espalier.api",
    "load": "espalier.api",
    "Context": "espalier.core.context",
    "Metric": "espalier.core.metric",
    "Recipe": "espalier.core.recipe",
    "Target": "espalier.core.target",
    "Task": "espalier.core.task",
    "info": "espalier.encode",
    "unpack": "espalier.encode",
    "verify": "espalier.encode",
}
_ROOMS = ("compact", "data", "deploy", "distill", "encode", "factorize", "graph", "measure", "prune", "quantize",
          "recipes", "report", "runs", "share", "tasks", "train")  # fmt: skip

__all__ = ["Context", "Metric", "Recipe", "Target", "Task", "compact", "compress", "data", "deploy", "distill",
           "encode", "factorize", "graph", "info", "load", "measure", "prune", "quantize", "recipes", "report", "runs",
           "share", "tasks", "train", "unpack", "verify"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"espalier.{name}")
    if name in _HOMES:
        if name == "Recipe":  # recipes name methods of every room
            importlib.import_module("espalier.api").fill_registry()
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'espalier' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
