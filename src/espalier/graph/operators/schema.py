"""What a row of the operator table is made of, and how its arguments are checked.

A signature is a line such as ``"input:T weight:T bias:T?=None stride:P=[1,1] *scale:f?=None"``: name, kind,
``?`` when None is allowed, ``=`` and a default; arguments after ``*`` are passed by keyword.

    T  tensor            V  tuple value        O  tensor, number or size    L  list of tensors (L?: some None)
    #  number or size    n  integer or size    N  list of n
    i  integer           u  integer >= 0       p  integer >= 1              I U P  lists of them
    f  float             F  list of floats     b  bool                      d  dtype name
    G  list of integers >= 0, or "same" / "valid"    e  einsum equation     {a,b}  one of these words
    *  anything, in rows of foreign operators only, which no file can name

A *size* is an integer computed by an earlier node (the batch size and what follows from it).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from espalier.core.errors import ModelError, did_you_mean
from espalier.graph.graph import Arg, Node, Value, Weight

DTYPES: tuple[str, ...] = (
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
"""Tensor dtypes a graph may name, in the order of their codes in the file."""

ANY = "*"
MAX_INT = 2**31 - 1
MAX_LIST = 4096
MAX_PIECES = 4096
_EQUATION = re.compile(r"[A-Za-z.,\- >]{1,128}")

Metas = Mapping[str, Any]
"""Arguments by name with meta tensors in the place of references, defaults filled in."""


@dataclass(frozen=True)
class Parameter:
    """One argument of an operator."""

    name: str
    kind: str
    optional: bool = False
    required: bool = True
    default: Arg = None
    keyword: bool = False

    @property
    def words(self) -> tuple[str, ...]:
        """The allowed words of a ``{a,b}`` kind."""
        return tuple(self.kind[1:-1].split(",")) if self.kind.startswith("{") else ()

    def is_default(self, value: Arg) -> bool:
        """Whether ``value`` need not be said."""
        return not self.required and type(value) is type(self.default) and value == self.default


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One row of the table; columns in the order of the fields.

    ``code`` is its number in files and never changes. ``aten`` lists the overloads it normalises, ``rename``
    maps their argument names to ours. ``run`` computes it and, on meta tensors, infers its shape unless
    ``shape`` is given. ``guard`` refuses arguments too costly to infer; ``macs`` counts multiply-accumulates.
    """

    code: int
    name: str
    aten: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    run: Callable[..., Any]
    rename: Mapping[str, str] = field(default_factory=dict)
    shape: Callable[[Metas], Any] | None = None
    guard: Callable[[Metas], str | None] | None = None
    macs: Callable[[Metas, Any], int] | None = None
    creates: bool = False
    """Whether it makes a tensor from nothing and so must be told the device."""


def row(
    code: int,
    name: str,
    aten: str,
    signature: str,
    run: Callable[..., Any],
    *,
    rename: str = "",
    shape: Callable[[Metas], Any] | None = None,
    guard: Callable[[Metas], str | None] | None = None,
    macs: Callable[[Metas, Any], int] | None = None,
    creates: bool = False,
) -> Operator:
    """One table row; ``aten`` lists overloads (``.default`` implied), ``rename`` pairs ``theirs=ours``."""
    targets = tuple(t if "." in t else f"{t}.default" for t in aten.split())
    pairs = dict(pair.split("=", 1) for pair in rename.split())
    return Operator(
        code=code,
        name=name,
        aten=targets,
        parameters=parse_signature(signature),
        run=run,
        rename=pairs,
        shape=shape,
        guard=guard,
        macs=macs,
        creates=creates,
    )


def parse_signature(line: str) -> tuple[Parameter, ...]:
    """The arguments a signature line declares."""
    found: list[Parameter] = []
    keyword = False
    for token in line.split():
        keyword |= token.startswith("*")
        head, has_default, default = token.lstrip("*").partition("=")
        name, _, kind = head.partition(":")
        value = _tupled(ast.literal_eval(default)) if has_default else None
        found.append(Parameter(name, kind.rstrip("?"), kind.endswith("?"), not has_default, value, keyword))
    return tuple(found)


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called ``name`` (one of ``DTYPES``)."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``. Raises ModelError for a dtype no graph can hold."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"A tensor has dtype {name}; a graph holds {', '.join(DTYPES)}. Convert it first.")
    return name


def _is_int(value: Arg, low: int) -> bool:
    return type(value) is int and low <= value <= MAX_INT


def _is_size(value: Arg) -> bool:
    return isinstance(value, Value) or _is_int(value, -MAX_INT)


def _is_number(value: Arg) -> bool:
    return isinstance(value, bool | float) or _is_size(value)


_LOW = {"i": -MAX_INT, "u": 0, "p": 1}
_SCALARS: dict[str, Callable[[Arg], bool]] = {
    "T": lambda v: isinstance(v, Value | Weight),
    "V": lambda v: isinstance(v, Value),
    "O": lambda v: isinstance(v, Weight) or _is_number(v),
    "#": _is_number,
    "n": _is_size,
    "f": lambda v: isinstance(v, float),
    "b": lambda v: isinstance(v, bool),
    "d": lambda v: isinstance(v, str) and v in DTYPES,
    "e": lambda v: isinstance(v, str) and _EQUATION.fullmatch(v) is not None,
    ANY: lambda _: True,
}
_LISTS = {"N": "n", "I": "i", "U": "u", "P": "p", "F": "f", "L": "T"}


def _fits(value: Arg, parameter: Parameter) -> bool:
    kind = parameter.kind
    if kind == "L":
        inner_none = parameter.optional
        return isinstance(value, tuple) and all(
            isinstance(item, Value | Weight) or (inner_none and item is None) for item in value
        )
    if value is None:
        return parameter.optional
    if parameter.words:
        return value in parameter.words
    if kind == "G":
        return value in ("same", "valid") or (isinstance(value, tuple) and all(_is_int(v, 0) for v in value))
    if kind in _LISTS:
        inner = Parameter("", _LISTS[kind])
        return isinstance(value, tuple) and all(_fits(item, inner) for item in value)
    if kind in _LOW:
        return _is_int(value, _LOW[kind])
    return _SCALARS[kind](value)


def check_arguments(operator: Operator, node: Node) -> None:
    """Refuse arguments that are missing, unknown, of the wrong type or out of range (ModelError)."""
    known = {parameter.name: parameter for parameter in operator.parameters}
    for name, value in node.args.items():
        if name not in known:
            raise ModelError(f"{node.op} got an argument {name!r}.{did_you_mean(name, known)}")
        if isinstance(value, tuple) and len(value) > MAX_LIST:
            raise ModelError(f"{node.op}.{name} lists {len(value)} entries; at most {MAX_LIST} are allowed.")
        if not _fits(value, known[name]):
            raise ModelError(f"{node.op}.{name} got {value!r}; allowed is kind {known[name].kind!r}.")
    missing = [p.name for p in operator.parameters if p.required and p.name not in node.args]
    if missing:
        raise ModelError(f"{node.op} lacks its argument{'s' * (len(missing) > 1)} {', '.join(missing)}.")


def call(operator: Operator, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for ``operator.run``; trailing defaults are left to it."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    last = 0
    for parameter in operator.parameters:
        given = parameter.name in values
        value = values[parameter.name] if given else parameter.default
        if parameter.kind == "d" and isinstance(value, str):
            value = torch_dtype(value)
        if parameter.keyword:
            if given:
                keywords[parameter.name] = value
            continue
        positional.append(value)
        last = len(positional) if given or parameter.required else last
    return positional[:last], keywords
