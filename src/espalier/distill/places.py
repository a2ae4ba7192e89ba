"""Where features are taken from: paths of modules, and pairs of them found by shape. No model is edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.errors import ModelError, UnknownNameError, did_you_mean

WRAPPERS = ("module.", "_orig_mod.")
Side = Literal["in", "out"]
SIDES: tuple[Side, ...] = ("in", "out")


@dataclass(frozen=True)
class Place:
    """What the module at ``path`` hands back, or what it is handed (``in``): the first tensor of it."""

    path: str
    side: Side = "out"

    def __str__(self) -> str:
        return f"the input of {self.path}" if self.side == "in" else self.path


Pair = tuple[Place, Place]
"""A place in the student and one in the teacher."""


@dataclass(frozen=True)
class Seen:
    """The features at one place in a forward pass: their shape, and the dimension of the channels."""

    place: Place
    shape: tuple[int, ...]
    channel_dim: int
    weighted: bool
    final: bool

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self.shape[self.channel_dim]

    @property
    def size(self) -> tuple[int, ...]:
        """All but samples and channels: height and width, tokens, or nothing."""
        return tuple(n for dim, n in enumerate(self.shape) if dim not in (0, self.channel_dim))


def is_1d(module: nn.Module) -> bool:
    """Whether its three dimensions are (n, channels, positions): layers called ...1d."""
    return type(module).__name__.endswith("1d")


def tensor_in(value: Any) -> Tensor | None:
    """The first tensor of what a module takes or hands back, None where there is none."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(tensor_in, items) if found is not None), None)


@contextmanager
def caught(model: nn.Module, places: Sequence[Place], *, copied: bool = True) -> Iterator[dict[Place, Tensor]]:
    """Within the block the features at ``places`` are kept, those of the last call; the hooks are gone after it.

    ``copied``: outputs are kept as they were handed back, whatever is done in place to them afterwards.
    """
    found: dict[Place, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(place: Place, _: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        tensor = tensor_in(output if place.side == "out" else (inputs, named))
        if tensor is not None:
            found.pop(place, None)  # the order is that of the last calls
            found[place] = tensor.clone() if copied and place.side == "out" else tensor

    with ExitStack() as stack:
        for place in places:
            hook = partial(keep, place)
            stack.callback(modules[place.path].register_forward_hook(hook, with_kwargs=True).remove)
        yield found


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the plain model by all their names, but the model itself; what makes weights is no part of it."""
    found = model.named_modules(remove_duplicate=False)
    return {path: module for path, module in found if path and "parametrizations" not in path.split(".")}


def everywhere(model: nn.Module) -> list[Place]:
    """Both sides of every module, once."""
    first: dict[int, str] = {}
    for path, module in modules_of(model).items():
        first.setdefault(id(module), path)
    return [Place(path, side) for path in first.values() for side in SIDES]


def seen(model: nn.Module, features: Mapping[Place, Tensor], output: Tensor) -> list[Seen]:
    """What was caught :func:`everywhere` and has one row for each sample, in the order of the calls.

    Channels are the second dimension; the last of (n, tokens, channels), unless it comes from a layer called ...1d, or
    is as large as what one has handed back before.
    """
    modules = dict(model.named_modules())
    rows, signals = [], set()
    for place, tensor in features.items():
        if tensor.ndim < 2 or not tensor.is_floating_point() or tensor.shape[0] != output.shape[0]:
            continue
        module = modules[place.path]
        weighted = any(p.ndim >= 2 for p in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        weighted = weighted or hasattr(module, "parametrizations")
        if is_1d(module) and place.side == "out":
            signals.add(tensor.shape[1:])
        dim = 1 if tensor.ndim != 3 or is_1d(module) or tensor.shape[1:] in signals else 2
        same = tensor.data_ptr() == output.data_ptr() and tensor.numel() == output.numel()
        rows.append(Seen(place, tuple(tensor.shape), dim, weighted, same))
    return rows


def matched(student: Sequence[Seen], teacher: Sequence[Seen]) -> list[Pair]:
    """For each size that both have: what comes last in the student, and in the teacher, of as many channels if it can.

    Sizes in the student's order; what the networks hand back is left out.
    """
    mine: dict[tuple[int, ...], Seen] = {}
    for place in student:
        if place.place.side == "out" and not place.final:
            mine.pop(place.size, None)
            mine[place.size] = place
    pairs = []
    for size, place in mine.items():
        theirs = [other for other in teacher if other.size == size and other.place.side == "out" and not other.final]
        theirs = [other for other in theirs if len(other.shape) == len(place.shape)]
        like = [other for other in theirs if other.channels == place.channels]
        if theirs:
            pairs.append((place.place, (like or theirs)[-1].place))
    return pairs


def named(path: str, model: nn.Module, who: str, whose: str) -> Place:
    """The module of that name, without the prefixes of wrappers. Raises ``UnknownNameError`` with close names."""
    modules, bare = modules_of(model), path
    while bare not in modules and bare.startswith(WRAPPERS):
        bare = bare.partition(".")[2]
    if bare not in modules:
        raise UnknownNameError(f"{who}: the {whose} has no module called {path!r}.{did_you_mean(bare, modules)}")
    return Place(next(first for first, module in modules.items() if module is modules[bare]))


def given(layers: tuple[str, ...] | dict[str, str], student: nn.Module, teacher: nn.Module, who: str) -> list[Pair]:
    """The pairs that ``layers`` names."""
    table = layers if isinstance(layers, dict) else {path: path for path in layers}
    return [(named(a, student, who, "student"), named(b, teacher, who, "teacher")) for a, b in table.items()]


def require(pair: Pair, student: Sequence[Seen], teacher: Sequence[Seen], who: str) -> tuple[Seen, Seen]:
    """What was seen at both places. Raises ``ModelError`` for a module that the forward pass does not call."""
    sides = []
    for place, there, whose in zip(pair, (student, teacher), ("student", "teacher"), strict=True):
        found = next((row for row in there if row.place == place), None)
        if found is None:
            raise ModelError(
                f"{who}: {place} of the {whose} has no features on a batch: the module is not called, or hands back no "
                f"floating-point tensor with one row for each sample. Name another one in layers."
            )
        sides.append(found)
    return sides[0], sides[1]


def channels_first(features: Tensor, dim: int) -> Tensor:
    """(n, channels, ...) in float32."""
    return features.movedim(dim, 1).float()


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both (n, channels, ...) with the smaller of each size: the larger one is averaged (adaptive pooling)."""
    if a.shape[2:] == b.shape[2:]:
        return a, b
    size = [min(m, n) for m, n in zip(a.shape[2:], b.shape[2:], strict=True)]
    return _pooled(a, size), _pooled(b, size)


def _pooled(x: Tensor, size: list[int]) -> Tensor:
    if list(x.shape[2:]) == size:
        return x
    pools: tuple[Any, ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    pooled: Tensor = pools[len(size) - 1](x, size)
    return pooled
