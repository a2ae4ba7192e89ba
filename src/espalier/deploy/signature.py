"""How an exported file is called: the model's own arguments and results, over the file's flat, named tensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from espalier.core.errors import ModelError
from espalier.graph import Runner, Value
from espalier.graph.graph import KINDS, Branch, Tree, leaves
from espalier.graph.trees import describe, fill, gather

_LITERALS = (bool, int, float, str)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """``inputs`` and ``outputs`` name the file's tensors; in ``call`` and ``output`` a ``Value`` numbers one of them.

    ``call`` is ``Branch(tuple, (positional, keywords))`` and ``names`` the names of the positional arguments.
    """

    names: tuple[str, ...]
    call: Branch
    output: Tree
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in the order of ``inputs``. Raises ``ModelError`` for a call of another form."""
        positional, keywords = _both(self.call)
        trees = dict(zip((*self.names, *map(str, keywords.keys)), (*positional.children, *keywords.children),
                         strict=True))  # fmt: skip
        if len(args) > len(trees):
            raise ModelError(f"the file got {len(args)} arguments; it takes {len(trees)}: {', '.join(trees)}.")
        given = {**dict(zip(trees, args, strict=False)), **{k: v for k, v in kwargs.items() if v is not None}}
        unknown = sorted(set(given) - set(trees))
        if unknown:
            raise ModelError(f"the file does not take {', '.join(unknown)}; it takes {', '.join(trees) or 'nothing'}.")
        found: dict[int, Tensor] = {}
        for name, tree in trees.items():
            if name in given:
                gather(tree, given[name], found, f"the argument {name!r}")
            elif isinstance(tree, Branch | Value):
                raise ModelError(f"the file needs its argument {name!r}; it takes {', '.join(trees)}.")
        return [found[index] for index in range(len(self.inputs))]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The outputs in the containers the model returned them in."""
        return fill(self.output, lambda leaf: tensors[leaf.index] if isinstance(leaf, Value) else None)

    def to_json(self) -> str:
        """As compact JSON, stored in the file."""
        data = {"names": self.names, "call": _plain(self.call), "output": _plain(self.output),
                "inputs": self.inputs, "outputs": self.outputs}  # fmt: skip
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Read :meth:`to_json`. Raises ``ModelError`` for anything else."""
        try:
            data = json.loads(text)
            call = _tree(data["call"])
            names = {key: tuple(map(str, data[key])) for key in ("names", "inputs", "outputs")}
            found = cls(
                call=call if isinstance(call, Branch) else Branch("tuple", ()), output=_tree(data["output"]), **names
            )
            found._check()
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ModelError(
                f"the call stored in the file is not readable ({error}); export the model again."
            ) from error
        return found

    def _check(self) -> None:
        """Refuse a call or result whose tensors are not numbered as the names say (ValueError)."""
        for tree, names in ((self.call, self.inputs), (self.output, self.outputs)):
            seen = [leaf.index for leaf in leaves(tree) if isinstance(leaf, Value)]
            if sorted(seen) != list(range(len(names))):
                raise ValueError(f"{len(names)} names for the tensors {seen[:20]}")
        positional, _ = _both(self.call)
        if len(positional.children) != len(self.names):
            raise ValueError(f"{len(self.names)} names for {len(positional.children)} arguments")


def _both(call: Branch) -> tuple[Branch, Branch]:
    positional, keywords = call.children
    if not (isinstance(positional, Branch) and isinstance(keywords, Branch)):
        raise TypeError("a call is (positional arguments, keyword arguments)")
    return positional, keywords


def _plain(tree: Tree) -> Any:
    if isinstance(tree, Value):
        return tree.index
    if isinstance(tree, Branch):
        return {"kind": tree.kind, "of": [_plain(child) for child in tree.children], "keys": list(tree.keys)}
    return {"is": tree}


def _tree(data: Any) -> Tree:
    if isinstance(data, int) and not isinstance(data, bool):
        return Value(data)
    if "is" in data:
        return data["is"]  # type: ignore[no-any-return]
    if data["kind"] not in KINDS:
        raise ValueError(data["kind"])
    return Branch(data["kind"], tuple(_tree(child) for child in data["of"]), tuple(data["keys"]))


def signature_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Signature:
    """The signature of ``model`` called with these arguments and returning ``result``.

    Raises ``ModelError`` where something else than tensors, numbers, text and containers of them is passed.
    """
    call = describe((tuple(args), dict(kwargs)), _numbered("the call"))
    output = describe(result, _numbered("the result"))
    if not isinstance(call, Branch):
        raise ModelError("a call is (positional arguments, keyword arguments).")
    positional, keywords = _both(call)
    names = argument_names(model, len(args))
    inputs: dict[int, str] = {}
    for name, tree in zip((*names, *map(str, keywords.keys)), (*positional.children, *keywords.children), strict=True):
        _name(tree, name, inputs)
    outputs: dict[int, str] = {}
    if isinstance(output, Branch) and output.keys:
        for key, child in zip(output.keys, output.children, strict=True):
            _name(child, f"output.{key}" if str(key) in inputs.values() else str(key), outputs)
    else:
        _name(output, "output", outputs)
    return Signature(names=names, call=call, output=output, inputs=tuple(inputs.values()),
                     outputs=tuple(outputs.values()))  # fmt: skip


def _numbered(where: str) -> Callable[[Any], Tree]:
    count = 0

    def leaf(thing: Any) -> Tree:
        nonlocal count
        if isinstance(thing, Tensor):
            count += 1
            return Value(count - 1)
        if thing is None or isinstance(thing, _LITERALS):
            return thing
        raise ModelError(
            f"{where} holds a {type(thing).__name__}; an exported file takes and gives tensors, numbers, text and "
            "tuples, lists and dicts of them. Wrap the model in a module that does."
        )

    return leaf


def _name(tree: Tree, name: str, names: dict[int, str]) -> None:
    if isinstance(tree, Value):
        names[tree.index] = name
    elif isinstance(tree, Branch):
        for number, child in enumerate(tree.children):
            _name(child, f"{name}.{tree.keys[number] if tree.keys else number}", names)


def argument_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the first ``count`` positional arguments of ``model``; ``args.N`` for a variadic one."""
    if isinstance(model, Runner):
        return model.graph.names[:count]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return tuple((names + [f"args.{n}" for n in range(len(names), count)])[:count])


def tensors_in(thing: Any) -> list[Tensor]:
    """Every tensor in nested containers, in the order in which a signature numbers them."""
    found: list[Tensor] = []

    def leaf(item: Any) -> Tree:
        if isinstance(item, Tensor):
            found.append(item)
        return None

    describe(thing, leaf)
    return found


def unnamed(inputs: Sequence[str], outputs: Sequence[str]) -> Signature:
    """The signature of a file that stores none: tensors in order, one output as it is, several as a tuple."""
    call = Branch("tuple", (Branch("tuple", tuple(Value(n) for n in range(len(inputs)))), Branch("dict", ())))
    output: Tree = Value(0) if len(outputs) == 1 else Branch("tuple", tuple(Value(n) for n in range(len(outputs))))
    return Signature(names=tuple(inputs), call=call, output=output, inputs=tuple(inputs), outputs=tuple(outputs))
