"""Looking at a model over a few training batches: what flows through it, and derivatives of a scalar.

What every method that looks at data shares: the batches, the scalar (the loss, the output itself, or the top
logit), and the effective weights as leaves - those of frozen parameters and of masked ones as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from espalier.core.context import Context
from espalier.core.errors import DataError, ModelError, NumericError
from espalier.core.metric import first_tensor
from espalier.core.model import device_of, evaluating
from espalier.core.selection import Selection
from espalier.core.task import to_device

Against = Literal["loss", "output", "top"]
"""The scalar that is differentiated: the task's loss, half the squared norm of the output, or the largest logit."""


def needs(against: Against) -> frozenset[str]:
    """What the task must offer: labels only where the loss is asked for."""
    return frozenset({"train", "labels"}) if against == "loss" else frozenset({"train"})


def scalar(output: Any, batch: Any, context: Context, against: Against) -> Tensor:
    """The scalar of one batch; means over the samples (the first dimension of the output's first tensor)."""
    if against == "loss":
        return context.data.training_loss(output, batch)
    answer = first_tensor(output)
    if answer.ndim == 0:
        return answer.square() / 2 if against == "output" else answer
    rows = answer.reshape(answer.shape[0], -1)
    return (rows.square().sum(1) / 2 if against == "output" else rows.amax(1)).mean()


def batches(model: nn.Module, context: Context, count: int, label: str) -> Iterator[Any]:
    """The first ``count`` training batches on the model's device, with progress. Raises DataError without any."""
    data = context.data.data("train")
    total = min(count, len(data)) if isinstance(data, Sized) else count
    device, done = device_of(model), 0
    for done, batch in enumerate(islice(iter(data), count), 1):
        yield to_device(batch, device)
        context.progress(label, done, total)
    if not done:
        raise DataError("the training data holds no batch; give Task(train=...) at least one.")


@contextmanager
def normalising(model: nn.Module) -> Iterator[None]:
    """Batch norms use the batch's own statistics, as in training; theirs, empty in a fresh network, are put back."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    modes = [norm.training for norm in norms]
    before: list[dict[str, Any]] = [{k: v.clone() for k, v in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        for norm in norms:
            norm.train()
        yield
    finally:
        with torch.no_grad():
            for norm, mode, buffers in zip(norms, modes, before, strict=True):
                norm.training = mode
                for name, buffer in norm.named_buffers(recurse=False):
                    buffer.copy_(buffers[name])


@contextmanager
def looking(model: nn.Module, context: Context, *, grad: bool = True, batch_statistics: bool = False) -> Iterator[None]:
    """Eval mode, the same batches every time, and kernels that can be differentiated twice; all is put back.

    ``batch_statistics``: batch norms use those of the batch, as in training; theirs are put back as well.
    """
    with ExitStack() as stack:
        stack.enter_context(context.forked("batches"))
        stack.enter_context(evaluating(model))
        if batch_statistics:  # after the eval mode, which would undo it
            stack.enter_context(normalising(model))
        if grad:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused kernels have no second derivative
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):
                # cuDNN's recurrent layers have no backward in eval mode
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def leaves(selection: Selection) -> Iterator[dict[str, Tensor]]:
    """Within the block the model runs on these leaves: name -> effective weight that takes a gradient."""
    found: dict[str, Tensor] = {}
    with ExitStack() as undo:
        for slot in selection:
            if slot.form is None:
                undo.callback(slot.latent.requires_grad_, slot.latent.requires_grad)
                found[slot.name] = slot.latent.requires_grad_()
            else:
                leaf = slot.value().clone().requires_grad_()
                vars(slot.form)["forward"] = partial(_instead, leaf)
                undo.callback(vars(slot.form).pop, "forward")
                found[slot.name] = leaf
        yield found


def _instead(leaf: Tensor, _: Tensor) -> Tensor:
    return leaf


def derivative(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, **options: Any) -> list[Tensor]:
    """d value / d inputs; zeros for an input that ``value`` does not depend on."""
    if not inputs or not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    grads = torch.autograd.grad(value, list(inputs), create_graph=create_graph, allow_unused=True, **options)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]


def each_gradient(
    model: nn.Module,
    selection: Selection,
    context: Context,
    *,
    against: Against,
    count: int,
    fn: Callable[[str, Tensor, Tensor], None],
    label: str,
    split: Callable[[Any], Iterator[Any]] = lambda batch: iter((batch,)),
    batch_statistics: bool = False,
) -> int:
    """``fn(name, gradient, effective weight)`` for every batch (or part of one, see ``split``); returns how many.

    ``batch_statistics``: as in :func:`looking`. Raises ModelError where the scalar does not depend on any weight,
    NumericError where a gradient is not finite.
    """
    done = 0
    if not selection.count:
        return done
    with looking(model, context, batch_statistics=batch_statistics), leaves(selection) as weights:
        for batch in batches(model, context, count, label):
            for part in split(batch):
                value = scalar(context.data.predict(model, part), part, context, against)
                connected(value)
                grads = derivative(value, list(weights.values()))
                with torch.no_grad():
                    for (name, weight), grad in zip(weights.items(), grads, strict=True):
                        fn(name, finite(name, grad), weight.detach())
                done += 1
    return done


def connected(value: Tensor) -> None:
    """Raise ModelError where no gradient can flow from ``value``."""
    if not value.requires_grad:
        raise ModelError(
            "the scalar to differentiate does not depend on any chosen weight: the model's forward or the task's loss "
            "cuts the graph (no_grad, detach, argmax). Use a criterion without gradients, such as magnitude."
        )


def finite(name: str, scores: Tensor) -> Tensor:
    """``scores`` themselves. Raises NumericError where they cannot be ranked."""
    if not bool(torch.isfinite(scores).all()):
        raise NumericError(
            f"the gradient of {name} holds NaN or infinity on the training data; the model cannot be ranked by it. "
            "Check the loss and the inputs, or use a criterion without gradients, such as magnitude."
        )
    return scores


def samples(batch: Any) -> Iterator[Any]:
    """A batch cut into batches of one sample: every tensor in it is cut along its first dimension."""
    from torch.utils import _pytree

    flat, spec = _pytree.tree_flatten(batch)
    sizes = {item.shape[0] for item in flat if isinstance(item, Tensor) and item.ndim}
    if len(sizes) != 1:
        raise DataError(
            f"per-sample gradients need batches whose tensors agree in their first dimension; got {sorted(sizes)}. "
            "Use curvature=hutchinson."
        )
    for row in range(sizes.pop()):
        parts = [item[row : row + 1] if isinstance(item, Tensor) and item.ndim else item for item in flat]
        yield _pytree.tree_unflatten(parts, spec)
