r"""AdaRound: whether each weight goes up or down is learned, so that the layer's output changes least.

Paper    Nagel, Amjad, van Baalen, Louizos, Blankevoort. Up or Down? Adaptive Rounding for Post-Training Quantization.
         ICML 2020. arXiv:2004.10568
Formula  w^ = s clip(floor(w / s) + h(V));   h = clip(sigma(V) (zeta - gamma) + gamma, 0, 1), zeta = 1.1, gamma = -0.1;
         min_V || f(W x) - f(W^ x^) ||^2 + lambda sum (1 - |2h - 1|^beta),   f the ReLU that follows, x^ from the layers
         that are solved already
Departs  beta falls linearly. Scales are per channel unless per=tensor, which is the paper's, and of least squared
         error. Where the layer's float weights are not those of the original model (batch norms folded, weights
         pruned), W x^ is the target in place of W x. Only a ReLU that alone reads the layer's output counts. Of large
         inputs a random part is kept, 2^27 numbers per layer in all.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from espalier.core.context import Context
from espalier.core.fields import Batches, Fraction, Group, LearningRate, Penalty, Positive, Steps
from espalier.core.model import evaluating
from espalier.core.parametrize import Slot, slots
from espalier.core.quantized import QuantizedWeight
from espalier.quantize.affine import Affine
from espalier.quantize.gptq import unsolved
from espalier.quantize.grid import Grid
from espalier.quantize.mse import Mse
from espalier.quantize.parts import LayerSolver, Observer
from espalier.train.layers import owners
from espalier.train.looking import batches, looking
from espalier.train.pairs import Kept, joined, part, samples

ZETA, GAMMA = 1.1, -0.1
MEMORY = 2**27
"""How many numbers of a layer's inputs and outputs are held."""


def rectified(v: Tensor) -> Tensor:
    """h(V), eq. 23: a sigmoid stretched beyond 0 and 1 and clipped there."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def start_of(fraction: Tensor) -> Tensor:
    """V with h(V) = ``fraction``, which lies in [0, 1)."""
    share = (fraction - GAMMA) / (ZETA - GAMMA)
    return torch.log(share / (1 - share))


def regulariser(h: Tensor, beta: float, kept: Tensor | None = None) -> Tensor:
    """Eq. 24: the sum of 1 - |2h - 1|^beta, over the ``kept`` weights."""
    each = 1 - (2 * h - 1).abs().pow(beta)
    return each.sum() if kept is None else each[kept].sum()


def annealed(step: int, steps: int, warm_up: float, start: float, end: float) -> float | None:
    """beta at ``step`` (0-based) of ``steps``; None while the regulariser is off."""
    first = warm_up * steps
    if step < first:
        return None
    return end + (start - end) * (1 - (step - first) / max(1.0, steps - first))


def soft(weight: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """The weight with h(V) added to the codes below it (float32)."""
    below = torch.floor(weight.float() / grid.scale) + grid.zero
    return ((below + rectified(v)).clamp(grid.low, grid.high) - grid.zero) * grid.scale


def hard(weight: Tensor, v: Tensor, grid: Grid) -> Tensor:
    """The weight on its grid: up where h(V) >= 1/2."""
    below = torch.floor(weight.float() / grid.scale) + grid.zero
    codes = (below + (rectified(v) >= 0.5)).clamp(grid.low, grid.high)
    return grid.values(codes.to(torch.int32))


@dataclass(frozen=True, kw_only=True)
class AdaRound(Affine, LayerSolver):
    """Learns on ``batches`` of train data, ``samples`` of them (images, or rows of a matrix) in each iteration.

    ``regularisation`` is lambda; beta goes from ``beta_start`` to ``beta_end`` after ``warm_up`` of the iterations.
    """

    id: ClassVar[str] = "adaround"
    observer: Observer = field(default_factory=Mse)
    iterations: Steps = 10_000
    lr: LearningRate = 1e-3
    regularisation: Penalty = 0.01
    beta_start: Positive = 20.0
    beta_end: Positive = 2.0
    warm_up: Fraction = 0.2
    samples: Group = 32
    batches: Batches = 8

    def solve(self, model: nn.Module, slot: Slot, bits: int, axis: int | None, context: Context) -> Tensor:
        weight, form = slot.latent.detach(), slot.form
        assert isinstance(form, QuantizedWeight)  # noqa: S101 - the caller has put it there
        reason = unsolved(slot, axis)
        data = None if reason else _data(model, slot, context, self.batches)
        if data is None:
            context.note(f"{slot.name} was rounded to nearest: {reason or 'the model does not call its layer'}.")
            return weight
        layer = owners(slot)[0]
        relu = followed_by_relu(model, layer, context)
        generator = context.generator(f"mini-batches of {slot.name}")
        with torch.enable_grad():
            return self.learn(layer, weight, self.grid(form.view(slot.latent)), form.kept, *data, relu, generator)

    def learn(
        self, layer: nn.Module, weight: Tensor, grid: Grid, kept: Tensor | None, x: Tensor, target: Tensor, relu: bool,
        generator: torch.Generator,
    ) -> Tensor:  # fmt: skip
        """The rounded ``weight`` of ``layer`` that gives ``target`` on the inputs ``x``, samples first in both."""
        scaled = weight.float() / grid.scale
        v = start_of(scaled - torch.floor(scaled)).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=self.lr)
        samples = min(len(x), self.samples)
        for step in range(self.iterations):
            chosen = torch.randint(len(x), (samples,), generator=generator)
            values = soft(weight, v, grid)
            values = values if kept is None else torch.where(kept, values, 0)
            output = run(layer, x[chosen].to(weight.device), values)
            wanted = target[chosen].to(weight.device)
            if relu:
                output, wanted = output.relu(), wanted.relu()
            channel = output.ndim - 1 if isinstance(layer, nn.Linear) else 1
            loss = (output - wanted).square().sum(channel).mean()
            beta = annealed(step, self.iterations, self.warm_up, self.beta_start, self.beta_end)
            if beta is not None:
                loss = loss + self.regularisation * regulariser(rectified(v), beta, kept)
            optimizer.zero_grad()
            loss.backward(inputs=[v])  # type: ignore[no-untyped-call]
            optimizer.step()
        solved = hard(weight, v.detach(), grid)
        return (solved if kept is None else torch.where(kept, solved, 0)).to(weight.dtype)


def run(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer on another weight, with its own bias."""
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    weight = weight.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    found: Tensor = layer._conv_forward(x, weight, bias)  # type: ignore[operator]
    return found


def _data(model: nn.Module, slot: Slot, context: Context, count: int) -> tuple[Tensor, Tensor] | None:
    """Inputs of the layer as it is now, and the outputs it should have, samples first; None where it is not called."""
    layer, weight = owners(slot)[0], slot.latent.detach()
    twin = _original(slot, context)
    generator = context.generator(f"inputs of {slot.name}")
    kept: Kept = []
    now: tuple[list[Tensor], list[Tensor]] = [], []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now[0].append((args[0] if args else kwargs["input"]).detach().clone())  # the model may go on in place

    def give(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        now[1].append(output.detach().clone())

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(take, with_kwargs=True).remove)
        stack.enter_context(looking(model, context, grad=False))
        if twin is not None:
            stack.callback(twin[1].register_forward_hook(give).remove)
            stack.enter_context(evaluating(twin[0]))
        for batch in batches(model, context, count, f"inputs of {slot.name}"):
            context.data.predict(model, batch)
            if twin is not None:
                context.data.predict(twin[0], batch)
            outputs = now[1] if len(now[1]) == len(now[0]) else [run(layer, x, weight) for x in now[0]]
            for x, y in zip(now[0], outputs, strict=True):
                kept += part(*samples(layer, x, y), MEMORY // count // len(outputs), generator)
            now[0].clear()
            now[1].clear()
    return joined(kept, slot.name)


def _original(slot: Slot, context: Context) -> tuple[nn.Module, nn.Module] | None:
    """The original model and its layer of this weight, where that has just these float weights and this bias."""
    original = context.models.get("original")
    found = slots(original).get(slot.name) if original is not None else None
    if original is None or found is None or found.form is not None or found.latent.shape != slot.latent.shape:
        return None
    layer, twin = owners(slot)[0], owners(found)[0]
    pairs = [(found.latent, slot.latent), (twin.bias, layer.bias)]
    if type(twin.bias) is not type(layer.bias) or len(owners(found)) > 1 or twin is layer:
        return None
    same = all(torch.equal(a.to(b), b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor))
    return (original, twin) if same else None


def followed_by_relu(model: nn.Module, layer: nn.Module, context: Context) -> bool:
    """Whether nothing but a ReLU reads the output of ``layer``, in one forward on the first training batch."""
    readers = _Readers()
    with ExitStack() as stack:
        stack.callback(layer.register_forward_hook(readers.mark).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, 1, "what follows the layer"):
            with readers:
                context.data.predict(model, batch)
    return bool(readers.names) and readers.names == ["relu"] * len(readers.outputs)


class _Readers(TorchFunctionMode):
    """Names of the functions that read the outputs of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.names: list[str] = []

    def mark(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        """Hook of the layer."""
        self.outputs.append(output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if isinstance(result, Tensor) and name != "get":
            given = [item for item in (*args, *(kwargs or {}).values()) if isinstance(item, Tensor)]
            self.names += [name for item in given if any(item is output for output in self.outputs)]
        return result
