"""What an output decides: the class along dimension 1, or, where there is a single logit, its sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espalier.core.errors import ModelError

_ALLOWED = (
    "Decisions are read from logits of shape (n, classes) or (n, classes, *positions), and by their sign from single "
    "logits, (n,), (n, 1) or (n, 1, *positions)"
)


def single(answer: Tensor) -> bool:
    """Whether there is one logit for each decision."""
    return answer.ndim == 1 or answer.shape[1] == 1


def decided(answer: Tensor) -> Tensor:
    """Logits ``(n, classes, *positions)``, or single ones, -> classes ``(n, *positions)``, 0 and 1 for single ones.

    Raises ModelError for what holds no logits.
    """
    if not answer.ndim or not answer.is_floating_point() or not answer.numel():
        raise ModelError(
            f"the model's first output is {_shown(answer)}, from which no decision can be read. {_ALLOWED}. Give "
            "Task(predict=...) that calls a model which returns such logits first, or use prune.prune."
        )
    if single(answer):
        return (answer.reshape(len(answer), *answer.shape[2:]) > 0).long()
    return answer.argmax(1)


def wanted(label: Any, answer: Tensor) -> Tensor:
    """The labels of a batch as decisions on ``answer``, of the shape of :func:`decided`; -1 where one names no class.

    Class indices, shares of the classes, or 0 and 1 for single logits. Raises ModelError for labels that do not fit.
    """
    shape = torch.Size((len(answer), *answer.shape[2:]))
    if isinstance(label, Tensor):
        if not single(answer) and label.shape == answer.shape and _shares(label):
            return label.argmax(1)
        flat = label.squeeze(1) if label.ndim == len(shape) + 1 and label.shape[1] == 1 else label
        if flat.shape == shape:
            if single(answer) and bool(((flat == 0) | (flat == 1)).all()):
                return flat.long()
            if not single(answer) and not flat.is_floating_point():
                inside = (flat >= 0) & (flat < answer.shape[1])  # others are what losses are told to ignore
                return torch.where(inside, flat.long(), -1)
    got = _shown(label) if isinstance(label, Tensor) else f"a {type(label).__name__}"
    values = "0 or 1" if single(answer) else f"integers below {answer.shape[1]}, or shares of the classes"
    raise ModelError(
        f"the labels are {got}, which are no decisions on the model's first output, {_shown(answer)}. {_ALLOWED}; "
        f"their labels are {values}, here of shape {tuple(shape)}. Put the classes at dimension 1, give "
        "against=predictions, or use prune.prune, which needs no decisions."
    )


def _shares(label: Tensor) -> bool:
    """Whether every decision is labelled by shares that sum to 1."""
    value = label.double()
    return bool((value >= 0).all()) and bool(((value.sum(1) - 1).abs() < 1e-3).all())


def _shown(x: Tensor) -> str:
    text = f"a tensor of shape {tuple(x.shape)} and {str(x.dtype).removeprefix('torch.')}"
    return f"{text} with values from {float(x.min()):.4g} to {float(x.max()):.4g}" if x.numel() else text
