r"""Post-training int8 of a whole network: batch norms folded, weights per channel, calibrated inputs, biases corrected.

Paper    Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort. A White Paper on Neural Network Quantization.
         2021. arXiv:2106.08295 (section 3.6); Cai et al. ZeroQ. CVPR 2020. arXiv:2001.00281 (inputs without data)
Formula  fold: w <- w gamma / sigma, b <- (b - mu) gamma / sigma + beta;   [equalise];   q_w symmetric per channel, q_x
         asymmetric per tensor, 8 bits;   b <- b - (W^ - W) E[x];   without data: min_x sum_l |mean_l(x) - mu_l|^2 +
         |std_l(x) - sigma_l|^2 over the batch norms
Departs  Bias correction takes the place of AdaRound, which is a weight quantizer of its own. Equalisation is left out
         unless asked for, and ranges are the whole ones, where the paper takes those of least squared error. Without
         data the inputs are standard normal numbers; fitting them to the batch norms is an option, as it is slow and
         gave no better ranges on the networks it was tried on. The record says data-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from espalier.core.context import Context
from espalier.core.errors import NeedError
from espalier.core.fields import Batches, Count, Group
from espalier.core.method import Technique
from espalier.core.model import device_of, evaluating
from espalier.core.norms import BATCH_NORMS
from espalier.core.plan import Plan
from espalier.core.task import Task, capture_call
from espalier.quantize.affine import Affine, AffineInput
from espalier.quantize.bias_correction import BiasCorrection
from espalier.quantize.equalise import Equalise
from espalier.quantize.minmax import MinMax
from espalier.quantize.parts import Observer
from espalier.quantize.quantize import Quantize
from espalier.quantize.wiring import Wiring

BITS = 8
STEP = 0.1
"""Learning rate of the inputs that are made without data."""


class Call(NamedTuple):
    """One made-up call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PTQInt8(Technique):
    """Static int8 of weights and inputs without training. ``observer``: from the inputs seen to their ranges.

    ``batches`` of train data are looked at; without any, as many of ``samples`` standard normal inputs are made, moved
    towards the statistics of the batch norms in ``steps`` of Adam, and the step is marked data-free. ``equalise``,
    ``correct``: null leaves them out.
    """

    id: ClassVar[str] = "ptq-int8"
    observer: Observer = field(default_factory=MinMax)
    equalise: Equalise | None = None
    correct: BiasCorrection | None = field(default_factory=BiasCorrection)
    layers: tuple[str, ...] = ("*",)
    batches: Batches = 8
    samples: Group = 32
    steps: Count = 0

    @property
    def needs(self) -> frozenset[str]:
        """Nothing beyond an example of the input: there is a way without data."""
        return frozenset()

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Run the stages in order, each through ``context.run``."""
        free = not context.data.has("train")
        context.record.details["data-free"] = free
        if free:
            context.warn(
                f"{self.name} found no training data: it calibrates on inputs it has made up, which costs accuracy. "
                "Give Task(train=...) a few batches, labels are not needed."
            )
            context = replace(context, task=self._made(model, context))
        quantize = Quantize(
            weights=Affine(), activations=AffineInput(observer=self.observer), bits=BITS, activation_bits=BITS,
            ends=BITS, layers=self.layers, batches=self.batches,
        )  # fmt: skip
        if self.equalise is not None:
            model = context.run(self.equalise, model, "01-equalise")
        else:
            folds = Wiring(model, context).folds()
            context.record.details["folded"] = [fold.norm for fold in folds]
            model = Plan(tuple(folds)).apply(model)
        model = context.run(quantize, model, "02-quantize")
        if self.correct is not None:
            model = context.run(self.correct, model, "03-bias-correction")
        return model

    def _made(self, model: nn.Module, context: Context) -> Task:
        """The task with made-up training inputs."""
        task = context.data
        args, kwargs = capture_call(task, model, task.example())
        generator = context.generator("inputs")
        made = []
        for number in range(self.batches):
            context.progress("inputs", number, self.batches)
            made.append(Call(*distilled(model, args, kwargs, self.samples, self.steps, generator)))
        return replace(task, train=made, predict=partial(_predict, task), target=partial(_target, task))


def _predict(task: Task, model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Call):
        return model(*batch.args, **batch.kwargs)
    return task.predict(model, batch)


def _target(task: Task, batch: Any) -> Any:
    return None if isinstance(batch, Call) else task.target(batch)


def distilled(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, steps: int,
    generator: torch.Generator,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """A call like the given one on standard normal inputs, moved in ``steps`` towards the batch norms' statistics.

    Raises NeedError where an input is no floating-point tensor: tokens cannot be made up.
    """
    flat, spec = _pytree.tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    if not tensors or not all(x.is_floating_point() for x in tensors):
        raise NeedError("the model's inputs are not all real numbers, so none can be made up; give Task(train=...).")
    batch, device = tensors[0].shape[:1], device_of(model)
    made = [torch.randn(_shape(x, batch, samples), generator=generator).to(device, x.dtype) for x in tensors]
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
    learned = [x.requires_grad_() for x in made]
    optimizer = torch.optim.Adam(learned, lr=STEP)

    def call(values: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = iter(values)
        found = [next(rest) if isinstance(x, Tensor) else x for x in flat]
        answer: tuple[tuple[Any, ...], dict[str, Any]] = _pytree.tree_unflatten(found, spec)
        return answer

    with evaluating(model), torch.enable_grad(), _statistics(norms) as gaps:
        for _ in range(steps if norms else 0):
            gaps.clear()
            given, named = call(learned)
            model(*given, **named)
            if not gaps:
                break
            loss = torch.stack(gaps).sum()
            for x, gradient in zip(learned, torch.autograd.grad(loss, learned, allow_unused=True), strict=True):
                x.grad = gradient
            optimizer.step()
    return call([x.detach() for x in learned])


def _shape(x: Tensor, batch: torch.Size, samples: int) -> tuple[int, ...]:
    return (samples, *x.shape[1:]) if x.ndim and x.shape[:1] == batch else tuple(x.shape)


@contextmanager
def _statistics(norms: list[Any]) -> Iterator[list[Tensor]]:
    """Within the block each forward adds, for each norm, how far its batch is from what the norm has stored."""
    gaps: list[Tensor] = []

    def look(norm: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].transpose(0, 1).flatten(1)
        if rows.shape[1] > 1:
            mean, deviation = rows.mean(1), (rows.var(1, correction=0) + norm.eps).sqrt()
            expected = (norm.running_var + norm.eps).sqrt()
            gaps.append((mean - norm.running_mean).square().mean() + (deviation - expected).square().mean())

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(look).remove)
        yield gaps
