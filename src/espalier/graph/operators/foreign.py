"""Operators outside the table, as torch knows them: for the analysis in memory, never for a file.

A row made here has no code and no channel rule. Channel analysis sees a boundary, the masked reference runs it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from espalier.core.errors import ModelError
from espalier.graph.operators.schema import ANY, Operator, Parameter

PREFIX = "foreign::"
NO_CODE = -1


def outside(what: str) -> ModelError:
    """The refusal of ``what`` (``aten.fft_rfft.default in encoder.1``), which no file can hold."""
    return ModelError(
        f"The model uses {what}, which the graph's closed operator set does not have. "
        "Rewrite that part with standard layers, or keep the file without its architecture."
    )


def shown(target: str, path: str) -> str:
    """An operator and the module that calls it, for people."""
    return f"{target.removeprefix(PREFIX)} in {path}" if path else target.removeprefix(PREFIX)


def overwrites(overload: Any) -> bool:
    """Whether a call of ``overload`` changes its arguments."""
    return isinstance(overload, torch._ops.OpOverload) and overload._schema.is_mutable


def pure(overload: Any) -> torch._ops.OpOverload | None:
    """``overload``, or the one that gives what it would write (``erfinv`` for ``erfinv_``); a graph has values only."""
    if not isinstance(overload, torch._ops.OpOverload) or not overwrites(overload):
        return overload if isinstance(overload, torch._ops.OpOverload) else None
    home, _, name = overload._schema.name.partition("::")
    if not name.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, home), name[:-1], None)
    found = getattr(packet, overload._overloadname, None)
    return found if isinstance(found, torch._ops.OpOverload) and not overwrites(found) else None


def shares_memory(overload: Any) -> bool:
    """Whether the result of ``overload`` is a view of an argument."""
    return isinstance(overload, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in overload._schema.returns
    )


@cache
def foreign(overload: torch._ops.OpOverload) -> Operator:
    """The row of an overload: all its arguments by keyword, anything allowed, run as it is."""

    def run(**given: Any) -> Any:
        return overload(**{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()})

    names = [argument.name for argument in overload._schema.arguments]
    return Operator(
        code=NO_CODE,
        name=f"{PREFIX}{overload}",
        aten=(),
        parameters=tuple(Parameter(name, ANY, optional=True, required=False, keyword=True) for name in names),
        run=run,
        creates="device" in names,
    )
