"""From a module to its graph: ``torch.export`` at a free batch size, then normalisation.

Export runs on a structural copy that shares the weights, so the caller's module keeps its mode, hooks,
gradients and tensors. Hooks are watchers and are not traced, except those of ``torch.nn.utils`` (weight and
spectral norm), which are part of the computation.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from espalier.core.errors import ModelError
from espalier.core.model import require_float
from espalier.graph import meta  # noqa: F401 - registers on import
from espalier.graph.check import infer
from espalier.graph.graph import Graph
from espalier.graph.normalise import normalise
from espalier.graph.quiet import place_of, quiet
from espalier.graph.runner import Runner

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ATTEMPTS = ("every input", "the first input", "what export finds free", "nothing")


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_dim: int = 0,
    foreign: bool = False,
) -> Graph:
    """The graph of ``model`` called as ``model(*args, **kwargs)``, in eval mode, with the batch size left open.

    Dimension ``batch_dim`` of the first input is the batch; inputs of the same extent there share it. An
    example batch of 1 is repeated, because export would bake it in. When the model cannot be traced with a
    free batch, the graph keeps the example's. Raises ModelError with the reason torch.export gives.

    ``foreign``: an operator outside the table becomes a node that carries torch's own, instead of a ModelError. Such a
    graph can be analysed and run here; no file holds it.
    """
    require_float(model)
    twin = structural_copy(model).eval()
    keywords = dict(kwargs or {})
    call = tuple(args)
    reasons: list[str] = []
    for attempt in _ATTEMPTS:
        try:
            program, example = _export(twin, call, keywords, batch_dim, attempt)
        except _NOT_TRACEABLE as error:
            reasons.append(_reason(error, place_of(error)))
            continue
        graph = normalise(program, model, example, names=_parameter_names(twin, len(call)), foreign=foreign)
        infer(graph)
        if not graph.dynamic or _holds_at_other_batches(graph, example, batch_dim):
            return graph
    _check_runs(twin, call, keywords)
    raise ModelError(
        f"{type(model).__name__} cannot be traced; torch.export says: {(reasons or ['nothing'])[0]} "
        "Change Python control flow that depends on tensor values (.item(), if x.sum() > 0) to torch.where "
        "or masks. What needs no graph works as it is: masks (prune with the pattern weights, blocks or n-m), and a "
        "file of the weights alone, loaded with into=model."
    )


def _check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a model that does not run on the example from one that export cannot follow."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be run on the example: {_reason(error, place_of(error))} "
            "Check the example's shapes and dtypes."
        ) from error


def _holds_at_other_batches(graph: Graph, example: Sequence[Any], dim: int) -> bool:
    """Whether the graph also works one sample up: export may leave a size it fixed to a run-time assertion."""
    size = next(x.shape[dim] for x in example if isinstance(x, Tensor) and x.dim() > dim)
    try:
        infer(graph, batch=size + 1)
    except ModelError:
        return False
    return True


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers, without the user's hooks."""
    tensors: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    for module in model.modules():  # results of weight norm and the like, which Python cannot copy
        results = [t for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
        tensors |= {id(t): t.detach() for t in results}
    try:
        twin = copy.deepcopy(model, tensors)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {_reason(error)} Register its tensors as parameters or "
            "buffers and keep open files, locks and graph results out of it."
        ) from error
    for module in twin.modules():
        for hooks in _hooks(module):
            for key in [key for key, hook in hooks.items() if _of_the_user(hook)]:
                del hooks[key]
    return twin


def user_hooks(model: nn.Module) -> list[str]:
    """Names of the modules that carry hooks of the user's, which no graph holds."""
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if any(_of_the_user(hook) for hooks in _hooks(module) for hook in hooks.values())
    ]


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [getattr(module, name) for name in _HOOKS]


def _of_the_user(hook: Any) -> bool:
    """Not one by which torch, or a form of ours, computes a weight."""
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return not home.startswith(("torch.nn.utils", "espalier.core"))


_NOT_TRACEABLE = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError)


def _reason(error: BaseException, place: str = "") -> str:
    """The first sentence of what torch said, without its log-reading advice, and the place in the user's code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].split(" (unhinted: ")[0] if lines else type(error).__name__
    return f"{type(error).__name__}: {text[:300].rstrip('.')}{f', at {place}' if place else ''}."


def _parameter_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the first ``count`` positional arguments of ``forward``; ``args.N`` for a variadic one."""
    if isinstance(model, Runner):
        return model.graph.names[:count]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return tuple((names + [f"args.{n}" for n in range(len(names), count)])[:count])


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dim: int, attempt: str
) -> tuple[ExportedProgram, list[Any]]:
    """The exported program and the leaves of the call it was exported with."""
    flat, spec = _pytree.tree_flatten((args, kwargs))
    batched = _batched(flat, dim, attempt)
    if attempt in _ATTEMPTS[:2]:
        flat = [_at_least_two(x, dim) if free else x for x, free in zip(flat, batched, strict=True)]
    mark = Dim.AUTO if attempt == "what export finds free" else Dim.DYNAMIC
    marks = [{dim: mark} if free else None for free in batched]
    args, kwargs = _pytree.tree_unflatten(flat, spec)
    shapes = _dynamic_shapes(model, args, kwargs, _pytree.tree_unflatten(marks, spec))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)  # else attention layers fuse into one opaque operator
    try:
        with torch.no_grad(), quiet(), idle_autocast():  # no_grad: a block inside adds no subgraph
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(value=fast)
    return program, flat


@contextmanager
def idle_autocast() -> Iterator[None]:
    """``torch.autocast(enabled=False)`` does nothing, as it does in fp32; export would make a subgraph of its block."""
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    torch.autocast.__enter__ = (  # type: ignore[method-assign]
        lambda self: enter(self) if self._enabled else self  # type: ignore[no-untyped-call]
    )
    torch.autocast.__exit__ = (  # type: ignore[method-assign]
        lambda self, *raised: leave(self, *raised) if self._enabled else None
    )
    try:
        yield
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


def _batched(flat: Sequence[Any], dim: int, attempt: str) -> list[bool]:
    candidates = [isinstance(x, Tensor) and x.dim() > dim for x in flat]
    if attempt == "nothing" or not any(candidates):
        return [False] * len(flat)
    first = candidates.index(True)
    size = flat[first].shape[dim]
    same = [free and x.shape[dim] == size for x, free in zip(flat, candidates, strict=True)]
    if attempt == "the first input":
        return [number == first for number in range(len(flat))]
    if attempt == "what export finds free" and size < 2:
        return [False] * len(flat)
    return same


def _at_least_two(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x], dim) if x.shape[dim] == 1 else x


def _dynamic_shapes(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], marks: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, Any]:
    """``marks`` by argument name, as ``torch.export`` wants them."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    marked = inspect.signature(model.forward).bind(*marks[0], **marks[1])
    return {name: marked.arguments[name] for name in bound.arguments}
