"""Techniques that make a network sparse by training it: a sparsifier acts for a while, then what is zero is fixed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import ModelError, NumericError
from espalier.core.fields import Epochs, Fraction
from espalier.core.forms import Form, Mask, dense_representation
from espalier.core.parametrize import Slot, attach, bake, require_phase, slots
from espalier.core.representation import Representation
from espalier.core.selection import Selection, select
from espalier.train import Training


class Sparsifier(Callback):
    """Acts while the model trains. ``settle`` fixes what is zero, in place; ``finish`` leaves masks behind.

    What acts per step goes into ``loss``, ``before_step`` and ``after_step``, which are called until settled.
    ``until``: the share of the steps after which that is, set by the technique.
    """

    until: float = 1.0

    def acting(self, loop: Loop) -> int:
        """How many steps it acts for; it settles after the last of them."""
        return round(self.until * loop.steps)

    @abstractmethod
    def settle(self) -> None:
        """Fix the zeros; the training that follows repairs the rest. Called once."""

    def finish(self) -> None:
        """Put every weight into its lasting form; called after the training, settled."""

    def details(self) -> dict[str, Any]:
        """What the record tells."""
        return {}


class Masking(Sparsifier):
    """Carries a mask beside every selected weight; what is exactly zero when it settles stays so."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        for slot in selection:
            if not isinstance(slot.form, Mask):
                attach(slot, Mask(torch.ones_like(slot.latent, dtype=torch.bool)))

    def weights(self) -> Iterator[tuple[Slot, Mask]]:
        """The selected weights with their masks."""
        for slot in self.selection:
            assert isinstance(slot.form, Mask)  # noqa: S101 - attached above
            yield slot, slot.form

    def settle(self) -> None:
        for slot, form in self.weights():
            form.mask.logical_and_(slot.value() != 0)

    def finish(self) -> None:
        for slot, form in self.weights():
            if bool(form.mask.all()):
                bake(slot)


class Transient(Form):
    """A stochastic form that lives only while its technique trains: noise in training mode, none in eval mode.

    ``generator``: a CPU generator, set for the length of an epoch; noise is drawn there and moved.
    """

    phase = "mask"
    generator: torch.Generator | None = None

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform noise in (0, 1), of the shape of ``like``."""
        noise = torch.rand(like.shape, generator=self.generator, dtype=torch.float32)
        return noise.clamp_(1e-6, 1 - 1e-6).to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``like``."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float32).to(like.device)

    def settle(self, latent: Tensor) -> None:
        """Fix the zeros in place."""

    def freeze(self, latent: Tensor) -> Representation:
        before, self.training = self.training, False
        try:
            return dense_representation(self(latent).detach())
        finally:
            self.training = before

    @classmethod
    def blank(cls, spec: dict[str, Any], weight: Tensor) -> Form:
        raise ModelError(f"a {cls.kind} form lives only while its technique trains and is in no checkpoint.")


class Noisy(Sparsifier):
    """Carries a :class:`Transient` form at every selected weight."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        for slot in selection:
            value = slot.value()
            kept = slot.form.mask if isinstance(slot.form, Mask) else torch.ones_like(value, dtype=torch.bool)
            attach(slot, self.form(slot, value, kept))

    @abstractmethod
    def form(self, slot: Slot, value: Tensor, kept: Tensor) -> Transient:
        """The form of one weight of which earlier steps have left ``kept``."""

    def forms(self) -> Iterator[tuple[Slot, Any]]:
        """The selected weights with their forms."""
        for slot in self.selection:
            yield slot, slot.form

    def on_epoch_start(self, loop: Loop) -> None:
        for _, form in self.forms():
            form.generator = loop.generator

    def settle(self) -> None:
        for slot, form in self.forms():
            form.settle(slot.latent)

    def finish(self) -> None:
        for slot, form in self.forms():
            form.generator = None
            form.eval()
            bake(slot)
            kept = slot.value() != 0
            if not bool(kept.all()):
                attach(slot, Mask(kept))


class _Until(Callback):
    """Hands the loop to a sparsifier until its time has come, then lets it settle."""

    def __init__(self, inner: Sparsifier) -> None:
        self.inner = inner
        self.settled = False

    def acts(self, loop: Loop) -> bool:
        """Whether the sparsifier still acts in this step."""
        if not self.settled and loop.step >= self.inner.acting(loop):
            self.settle()
        return not self.settled

    def settle(self) -> None:
        """Settle, once."""
        if not self.settled:
            with torch.no_grad():
                self.inner.settle()
            self.settled = True

    def on_start(self, loop: Loop) -> None:
        self.inner.on_start(loop)

    def on_epoch_start(self, loop: Loop) -> None:
        self.inner.on_epoch_start(loop)
        self.acts(loop)

    def loss(self, loop: Loop, batch: Any, output: Any, loss: Tensor) -> Tensor:
        return self.inner.loss(loop, batch, output, loss) if not self.settled else loss

    def before_step(self, loop: Loop) -> None:
        if not self.settled:
            self.inner.before_step(loop)

    def after_step(self, loop: Loop) -> None:
        if self.settled:
            return
        with torch.no_grad():
            self.inner.after_step(loop)
        if loop.step + 1 >= self.inner.acting(loop):  # the loop counts this step when its callbacks are done
            self.settle()

    def state_dict(self) -> dict[str, Any]:
        return {"settled": self.settled, "inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.settled = state["settled"]
        self.inner.load_state_dict(state["inner"])


@dataclass(frozen=True, kw_only=True)
class SparsifyingTraining(Training):
    """Trains ``layers`` (patterns) sparse. ``until``: the share of the steps after which the zeros are fixed.

    The rest of the training repairs what is left.
    """

    epochs: Epochs = 10
    layers: tuple[str, ...] = ("*",)
    until: Fraction = 0.5
    densify: bool = False

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if not self.epochs:
            found.append("epochs=0 trains nothing; this method makes weights zero by training, give epochs above 0")
        return found

    @property
    def outputs(self) -> bool:
        """Whether whole output units go: then the model's outputs are left alone."""
        return False

    def refuses(self, slot: Slot) -> str | None:
        """Why what is to become zero together does not exist in this weight; None where it does."""
        return None

    @abstractmethod
    def start(self, model: nn.Module, selection: Selection, context: Context) -> Sparsifier:
        """The sparsifier, its forms attached."""

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Train, fix the zeros on the way, and leave masks."""
        selection = self._choose(model, context)
        sparsifier = self.start(model, selection, context)
        sparsifier.until = self.until
        until = _Until(sparsifier)
        settled = sum(epoch / self.epochs < self.until for epoch in range(1, self.epochs + 1))
        self.train(model, context, callbacks=(until,), settled=settled)
        with torch.no_grad():
            until.settle()  # the time may have run out before
            sparsifier.finish()
        context.record.details["sparsity"] = {
            name: 1 - float((slot.value() != 0).float().mean())
            for name, slot in slots(model).items()
            if name in selection.names
        }
        context.record.details.update(sparsifier.details())
        return model

    def _choose(self, model: nn.Module, context: Context) -> Selection:
        selection = select(model, self.layers, who=self.name)
        refused = {slot.name: reason for slot in selection if (reason := self.refuses(slot)) is not None}
        for name, reason in refused.items():
            context.skip(name, reason)
        for slot in selection:
            if slot.name in refused:
                continue
            require_phase(slot, ("dense", "mask"), self.name, densify=self.densify)
            if not bool(torch.isfinite(slot.value()).all()):
                raise NumericError(
                    f"{slot.name} holds NaN or infinity; {self.name} cannot train it. Load an earlier checkpoint."
                )
        for name, slot in slots(model).items():
            if name not in selection.names and slot.latent.ndim >= 2:
                context.skip(name, "not among the chosen layers")
        for slot in selection:
            if not slot.latent.requires_grad and slot.name not in refused:
                context.skip(slot.name, "frozen: it does not train, so nothing makes it sparse")
        last = selection.names[-1:] if self.outputs and self.layers == ("*",) and selection.count > 1 else ()
        for name in last:
            if name not in refused:
                context.skip(name, "its units are the model's outputs; name it in layers to prune them")
        return selection.where(lambda slot: slot.latent.requires_grad and slot.name not in {*last, *refused})
