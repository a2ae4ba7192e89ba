r"""Guided training: a full-precision network learns beside the low-bit one, and each pulls at the other's features.

Paper    Zhuang, Shen, Tan, Liu, Reid. Towards Effective Low-bitwidth Convolutional Neural Networks. CVPR 2018.
         arXiv:1711.00205, section 3.4
Formula  L = L_low + L_full + lambda R,   R = 1/2 sum_l ||mu_full_l - mu_low_l||^2 over chosen feature maps;
         both networks descend on L
Departs  In place of adaptors between them, each feature map is brought to mean 0 and variance 1 over the batch:
         quantizers such as DoReFa's change the scale of a layer. The squared norm is the mean over the entries, so that
         lambda means the same for small and large maps. In every stage the full-precision network begins as the
         original again, and learns by an optimizer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError, UnknownNameError, UsageError, did_you_mean
from espalier.core.fields import LearningRate, Penalty
from espalier.core.metric import first_tensor
from espalier.core.model import copy_model, device_of, evaluating
from espalier.quantize.parts import Scheme, Stage
from espalier.quantize.places import LAYERS
from espalier.train import SGD, Optimizer
from espalier.train.augmentation import Mixing
from espalier.train.looking import batches, looking

if TYPE_CHECKING:
    from espalier.quantize.quantize import Quantize

STABLE = 1e-5
"""Added to the variance, as a batch norm does."""


def hint(full: Sequence[Tensor], low: Sequence[Tensor]) -> Tensor:
    """1/2 sum of the mean squared differences between pairs of equal shapes, normalised; differentiable in both."""
    return torch.stack(
        [(normalised(f) - normalised(s)).square().mean() / 2 for f, s in zip(full, low, strict=True)]
    ).sum()


def normalised(features: Tensor) -> Tensor:
    """The same of mean 0 and variance 1; near zero where all are equal."""
    centred = features.float() - features.float().mean()
    return centred / centred.square().mean().add(STABLE).sqrt()


def layers_of(model: nn.Module) -> list[str]:
    """Paths of the layers whose outputs can be compared, in the model's order."""
    return [path for path, module in model.named_modules() if isinstance(module, LAYERS)]


def default_layers(model: nn.Module, context: Context) -> tuple[str, ...]:
    """Of the layers that one batch comes to, in that order, the middle one and the one before the last."""
    calls: dict[str, None] = {}
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for path in layers_of(model):
            note = partial(_note, calls, path)
            stack.callback(modules[path].register_forward_pre_hook(note).remove)
        stack.enter_context(looking(model, context, grad=False))
        for batch in batches(model, context, 1, "order of the layers"):
            context.data.predict(model, batch)
    paths = list(calls)
    if not paths:
        raise ModelError(
            f"guided compares the outputs of layers, and {type(model).__name__} calls none of its layers as a module. "
            "Leave the scheme out."
        )
    return tuple(dict.fromkeys((paths[(len(paths) - 1) // 2], paths[max(0, len(paths) - 2)])))


def _note(calls: dict[str, None], path: str, *_: Any) -> None:
    calls.setdefault(path)


@contextmanager
def caught(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block the outputs of ``layers`` are kept, by path: those of their last call."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(path: str, _: nn.Module, __: Any, output: Any) -> None:
        found[path] = first_tensor(output)

    with ExitStack() as stack:
        for path in layers:
            stack.callback(modules[path].register_forward_hook(partial(keep, path)).remove)
        yield found


@dataclass(frozen=True, kw_only=True)
class Guided(Scheme):
    """``strength``: lambda. ``layers``: paths of the layers whose outputs are compared; by default the one in the
    middle and the one before the last. ``optimizer`` and ``lr`` are the full-precision network's; its learning rate
    follows the schedule of the step.
    """

    id: ClassVar[str] = "guided"
    strength: Penalty = 1.0
    layers: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=SGD)
    lr: LearningRate = 1e-3

    def stages(self, before: Sequence[Stage], method: Quantize) -> tuple[Stage, ...]:
        """The same stages, all of them guided. Raises ``UsageError`` where images are blended."""
        mixing = [part.id for part in method.augment if isinstance(part, Mixing)]
        if mixing:
            raise UsageError(f"guided gives every image one label, and {mixing[0]} blends two; leave one of them out.")
        return tuple(stage.replace(guides=(*stage.guides, self)) for stage in before)

    def callback(self, model: nn.Module, context: Context) -> Callback:
        """The full-precision network at ``model``'s side. Raises ``UnknownNameError``, ``ModelError``."""
        original = context.model("original")
        layers = self.layers or default_layers(model, context)
        for path in layers:
            for network in (model, original):
                paths = layers_of(network)
                if path not in paths:
                    raise UnknownNameError(f"{self.name}: no layer is called {path!r}.{did_you_mean(path, paths)}")
        full = copy_model(original).to(device_of(model))
        return Guide(self, full, layers, original)


class Guide(Callback):
    """The full-precision network, its optimizer, and the hint between both networks."""

    def __init__(self, scheme: Guided, full: nn.Module, layers: Sequence[str], original: nn.Module) -> None:
        self.scheme, self.full, self.layers, self.original = scheme, full, tuple(layers), original
        self.optimizer = scheme.optimizer.over(full, scheme.lr)
        self.features: dict[str, Tensor] = {}

    def on_start(self, loop: Loop) -> None:
        self.full.train()

    @contextmanager
    def around(self, loop: Loop) -> Iterator[None]:
        with caught(loop.model, self.layers) as self.features:
            yield

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        task = loop.context.data
        with caught(self.full, self.layers) as features:
            answer = task.predict(self.full, batch)
        pairs = [(path, features[path], self.features[path]) for path in self.layers
                 if path in features and path in self.features]  # fmt: skip
        if not pairs:
            raise ModelError(f"{self.scheme.name}: none of the layers {', '.join(self.layers)} was called.")
        for path, full, low in pairs:
            if full.shape != low.shape:
                raise ModelError(
                    f"{self.scheme.name}: the output of {path} is {tuple(low.shape)} here and {tuple(full.shape)} in "
                    "the original; name layers whose outputs have kept their shape: Guided(layers=...)."
                )
        apart = hint([full for _, full, _ in pairs], [low for _, _, low in pairs])
        self.optimizer.zero_grad()
        own = task.training_loss(answer, batch, self._reference(loop, batch))
        self.features = {}
        return loss + own + self.scheme.strength * apart

    def _reference(self, loop: Loop, batch: Any) -> Any:
        """The original's answer for tasks without labels, as the loop takes it."""
        task = loop.context.data
        if task.loss is not None or task.target(batch) is not None:
            return None
        with evaluating(self.original):
            return task.predict(self.original, batch)

    def after_step(self, loop: Loop) -> None:
        """The full-precision network steps as well, at the same point of the schedule."""
        group = loop.optimizer.param_groups[0]
        factor = group["lr"] / group["initial_lr"]
        for own in self.optimizer.param_groups:
            own["lr"] = self.scheme.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"full": self.full.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.full.load_state_dict(state["full"])
        self.optimizer.load_state_dict(state["optimizer"])
