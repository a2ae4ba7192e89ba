"""Named places in a module's forward, watched or replaced.

A place is ``module/op/ordinal``: the module that runs, the function it calls (``relu``, ``add``, also of
``x + y``), and how many such calls it made before in this forward. ``input`` and ``output`` are the places at
a module's ends. Functions are seen from outside: what ``F.multi_head_attention_forward`` calls within is
not a place. Works under autograd, in train and eval mode; nothing stays on the model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from espalier.core.errors import UnknownNameError, did_you_mean

Watcher = Callable[[str, Tensor], None]
Replacer = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """One place of a forward: ``name`` and the shape and dtype of the tensor that passed it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Taps:
    """Watches or replaces what flows through ``model``.

    Patterns are names or shell patterns (``"layer1.*/add/*"``); one that nothing answered to during the
    block raises UnknownNameError at its end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def watch(self, patterns: str | Sequence[str], fn: Watcher) -> Iterator[None]:
        """Within the block, ``fn(name, tensor)`` is called with every matching tensor."""

        def look(name: str, tensor: Tensor) -> Tensor:
            fn(name, tensor)
            return tensor

        with self.replace(patterns, look):
            yield

    @contextmanager
    def replace(self, patterns: str | Sequence[str], fn: Replacer) -> Iterator[None]:
        """Within the block, every matching tensor is replaced by ``fn(name, tensor)``."""
        wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        mode = _Mode(self.model, wanted, fn)
        with mode.attached(), mode:
            yield
        missed = [pattern for pattern in wanted if mode.forwards and pattern not in mode.matched]
        if missed:
            raise UnknownNameError(f"No place answers to {missed[0]!r}.{did_you_mean(missed[0], mode.seen)}")

    def places(self, *args: Any, **kwargs: Any) -> list[Place]:
        """Every place one call of the model passes, in order; the model is run once."""
        found: list[Place] = []

        def note(name: str, tensor: Tensor) -> None:
            found.append(Place(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))

        with self.watch("*", note):
            self.model(*args, **kwargs)
        return found


def list_places(model: nn.Module, *args: Any, **kwargs: Any) -> list[Place]:
    """Every place of ``model(*args, **kwargs)``, in order."""
    return Taps(model).places(*args, **kwargs)


class _Mode(TorchFunctionMode):
    """Keeps the stack of running modules and counts their calls; hooks exist only while attached."""

    def __init__(self, model: nn.Module, patterns: tuple[str, ...], fn: Replacer) -> None:
        super().__init__()
        self.model = model
        self.patterns = patterns
        self.fn = fn
        self.stack: list[str] = []
        self.counts: dict[str, int] = {}
        self.hits: dict[str, bool] = {}
        self.matched: set[str] = set()
        self.seen: set[str] = set()
        self.forwards = 0
        self.busy = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.busy or not self.stack or not isinstance(result, Tensor | tuple | list):
            return result
        name = _operation(func)
        return self._pass(name, result) if name else result

    def _pass(self, op: str, result: Any) -> Any:
        """``result`` of ``op`` with every tensor in it watched or replaced."""
        if isinstance(result, Tensor):
            return self._tensor(f"{self.stack[-1]}/{op}", result) if result.is_floating_point() else result
        plain = type(result) in (tuple, list) or type(result).__module__ == "torch.return_types"
        if plain and any(isinstance(item, Tensor) for item in result):
            return type(result)([self._pass(op, item) if isinstance(item, Tensor) else item for item in result])
        return result

    def _tensor(self, key: str, tensor: Tensor) -> Tensor:
        ordinal = self.counts.get(key, 0)
        self.counts[key] = ordinal + 1
        name = f"{key}/{ordinal}"
        hit = self.hits.get(name)
        if hit is None:
            self.seen.add(name)
            answering = [pattern for pattern in self.patterns if pattern == name or fnmatchcase(name, pattern)]
            self.matched.update(answering)
            hit = self.hits[name] = bool(answering)
        if not hit:
            return tensor
        self.busy = True
        try:
            return self.fn(name, tensor)
        finally:
            self.busy = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Module hooks for the length of the block."""
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                for handle in self._hook(path, module):
                    stack.callback(handle.remove)
            yield

    def _hook(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if module is self.model:
                self.stack.clear()
                self.counts.clear()
                self.forwards += 1
            self.stack.append(path)
            return self._map("input", args), self._map("input", kwargs)

        def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            replaced = self._map("output", output)
            self.stack.pop()
            return replaced

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]

    def _map(self, end: str, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return self._tensor(f"{self.stack[-1]}/{end}", tree)
        if not tree:
            return tree
        if type(tree) is tuple and len(tree) == 1 and isinstance(tree[0], Tensor):
            return (self._tensor(f"{self.stack[-1]}/{end}", tree[0]),)
        return _pytree.tree_map_only(Tensor, lambda t: self._tensor(f"{self.stack[-1]}/{end}", t), tree)


def _operation(func: Any) -> str:
    """The plain name of a torch function: ``add`` for ``Tensor.__iadd__``; empty for attribute look-ups."""
    name = _NAMES.get(func)
    if name is None:
        given: str = getattr(func, "__name__", "")
        plain = given.strip("_")
        name = _NAMES[func] = "" if given in _SILENT else _OPERATORS.get(plain, plain)
    return name


_NAMES: dict[Any, str] = {}


_SILENT = frozenset(
    {"__get__", "__set__", "__delete__", "detach", "detach_", "requires_grad_", "size", "dim", "split_with_sizes_copy"}
)
_OPERATORS = {
    "radd": "add",
    "iadd": "add",
    "rsub": "rsub",
    "isub": "sub",
    "rmul": "mul",
    "imul": "mul",
    "truediv": "div",
    "rtruediv": "div",
    "itruediv": "div",
    "idiv": "div",
    "rpow": "pow",
    "ipow": "pow",
    "rmatmul": "matmul",
    "getitem": "getitem",
}
