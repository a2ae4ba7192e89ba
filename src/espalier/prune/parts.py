"""The four axes of pruning: criterion x pattern x scope x schedule. A method is a small file for one axis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import NeedError
from espalier.core.fields import Fraction
from espalier.core.method import Method
from espalier.core.parametrize import Slot
from espalier.core.selection import Selection

Scores = dict[str, Tensor]
"""Weight name -> scores; low goes first. Of the weight's shape, or one per output unit (see ``Criterion.of``)."""

Reduction = Literal["sum", "mean", "l1", "l2"]
"""How the contributions of the weights of one group make the group's score."""


@dataclass(frozen=True, kw_only=True)
class Criterion(Method):
    """How much each weight, or each output unit of a layer, matters.

    ``of``: ``weights`` scores single weights, and patterns reduce them to groups; ``units`` scores the output channels
    or neurons of each layer, in their order, and goes with structural patterns only. ``default_sparsity``: what is
    removed when the user names no sparsity.
    """

    kind: ClassVar[str] = "criterion"
    of: ClassVar[Literal["weights", "units"]] = "weights"
    default_sparsity: ClassVar[float | None] = 0.5

    @property
    def reduction(self) -> Reduction:
        """How contributions combine inside a group, across all the weights of coupled layers as well."""
        return "sum"

    @abstractmethod
    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        """Contributions of the effective weights (signed where ``reduction`` takes the absolute value itself)."""


@dataclass(frozen=True, kw_only=True)
class CutCriterion(Criterion):
    """A criterion that knows itself which weights go: those with a score below 1."""

    default_sparsity: ClassVar[float | None] = None

    def removed(self, scores: Scores, fraction: float) -> dict[str, Tensor]:
        """Masks of what goes when the cut has grown to ``fraction`` of its final height."""
        return {name: score < fraction for name, score in scores.items()}


class Watcher(Callback, ABC):
    """Gathers, while the model trains, what its criterion scores by.

    In ``before_step`` ``slot.latent.grad`` is the gradient of the *effective* weight, at pruned positions too; read it
    there (the gradients of pruned positions are dropped right after). ``state_dict`` must hold all that was gathered.
    """

    @abstractmethod
    def scores(self, model: nn.Module) -> Scores:
        """The scores from what was seen so far, as ``Criterion.scores`` gives them."""

    @abstractmethod
    def keep(self, name: str, take: Callable[[Tensor], Tensor]) -> None:
        """Cut what was gathered for the weight ``name`` by ``take``, as the weight itself was just cut."""


@dataclass(frozen=True, kw_only=True)
class WatchingCriterion(Criterion):
    """A criterion that can only judge what it has watched training: it needs epochs and a schedule that starts at 0.

    ``revives``: whether a weight pruned in this step comes back when its score has risen above the cut again; its
    value is then what it was when it went. Weights pruned by earlier steps never do.
    """

    revives: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Something to train on."""
        return super().needs | {"train"}

    @abstractmethod
    def watcher(self, model: nn.Module, selection: Selection) -> Watcher:
        """A fresh watcher of ``selection``; the forms are attached already and keep their buffers."""

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        """Only the watcher has scores."""
        raise NeedError(f"{self.name} scores what it saw during training; use it in prune.prune with epochs.")


@dataclass(frozen=True, kw_only=True)
class SolvingCriterion(Criterion):
    """A criterion that chooses what goes and changes what stays so as to make up for it, layer after layer."""

    @abstractmethod
    def refuses(self, slot: Slot) -> str | None:
        """Why this weight cannot be solved for; None where it can."""

    @abstractmethod
    def order(self, model: nn.Module, selection: Selection, context: Context) -> tuple[Slot, ...]:
        """The chosen weights in the order they run, so that each is solved on what comes out of the solved ones."""

    @abstractmethod
    def solve(
        self,
        model: nn.Module,
        slot: Slot,
        kept: Tensor,
        sparsity: float,
        groups: tuple[int, int] | None,
        context: Context,
    ) -> tuple[Tensor, Tensor]:
        """``(weight, kept)``, both of the weight's shape, at ``sparsity`` or at ``groups`` = (n kept, of m inputs).

        ``kept``: bool, what earlier steps have left; nothing else may come back. Layers before this one are solved.
        """


@dataclass(frozen=True, kw_only=True)
class Pattern(Method):
    """What goes together: single weights, blocks, channels ...

    Patterns see every weight with its outputs first: ``(out, in)`` or ``(out, in, *kernel)``, transposed convolutions
    included. ``units``: its groups are the output units, so criteria of units fit. ``rows``: dimension 0 of the pooled
    scores are outputs, which scope ``row`` needs. ``empties``: a group may be a whole layer. ``vectors``: takes 1-D
    parameters too, where ``layers`` names them.
    """

    kind: ClassVar[str] = "pattern"
    units: ClassVar[bool] = False
    rows: ClassVar[bool] = True
    empties: ClassVar[bool] = False
    vectors: ClassVar[bool] = False

    def refuses(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape (outputs first) has no such groups; None where it has."""
        return None

    def unfit(self, slot: Slot) -> str | None:
        """Why this parameter has no such groups, whatever its shape (an embedding has no units); None where it has."""
        return None

    @abstractmethod
    def pool(self, scores: Tensor, reduction: Reduction) -> Tensor:
        """Scores of the groups of one weight, from the contributions of its entries."""

    @abstractmethod
    def spread(self, removed: Tensor, shape: torch.Size) -> Tensor:
        """Mask over the groups -> mask over the entries of a weight of ``shape``."""


@dataclass(frozen=True, kw_only=True)
class FixedPattern(Pattern):
    """A pattern that knows itself how much goes from each weight; it leaves nothing to the scope."""

    @abstractmethod
    def removed(self, scores: Tensor, share: float) -> Tensor:
        """Mask of the groups that go when the schedule has reached ``share`` (0..1) of the pattern; masks nest."""


@dataclass(frozen=True, kw_only=True)
class Projection(Pattern):
    """A pattern without a mask: the weight is replaced by the nearest one that has less of something."""

    @abstractmethod
    def project(self, weight: Tensor, removed: Tensor) -> Tensor:
        """The weight without the ``removed`` groups; :meth:`pool` gives the scores from the weight itself."""


@dataclass(frozen=True, kw_only=True)
class Scope(Method):
    """Among which weights the lowest scores are sought. ``floor``: the smallest share of a layer that stays.

    A layer never goes as a whole, whatever the floor: one group at least stays.
    """

    kind: ClassVar[str] = "scope"
    floor: Fraction = 0.0

    def apart(self, selection: Selection) -> tuple[tuple[str, ...], ...]:
        """The names that are ranked together, set by set."""
        return (selection.names,)

    @abstractmethod
    def removed(self, scores: Scores, sparsity: float) -> dict[str, Tensor]:
        """Masks of the groups that go: a fraction ``sparsity`` of all groups."""

    def clamped(self, scores: Scores, sparsity: float) -> tuple[str, ...]:
        """Names of the weights that would have lost more but for the floor."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Schedule(Method):
    """How sparsity grows during training."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def sparsity(self, progress: float, final: float) -> float:
        """The sparsity at ``progress`` (0..1) of the training that ends at ``final``."""

    @property
    def final(self) -> float | None:
        """The sparsity this schedule itself ends at, where it names one."""
        return None

    @property
    def jumps(self) -> tuple[float, ...]:
        """Where it grows in jumps: the shares of the training at which it does; empty where it grows gradually."""
        return ()

    def share(self, progress: float) -> float:
        """How far the schedule has come, 0..1: for what goes by another measure than a final sparsity."""
        final = 0.9 if self.final is None else self.final
        end = self.sparsity(1.0, final)
        return self.sparsity(progress, final) / end if end else 1.0

    def at_epoch(self, epoch: int, epochs: int) -> float:
        """The progress that counts in an epoch (from 0) for what changes once an epoch, at its start.

        A round takes place where it is due; what grows gradually is taken an epoch ahead, so that it ends in time.
        """
        return epoch / epochs if self.jumps else (epoch + 1) / epochs


@dataclass(frozen=True, kw_only=True)
class Regrowth(Method):
    """Where connections come back after a mask update."""

    kind: ClassVar[str] = "regrowth"
    until: Fraction = 0.75
    redistributes: ClassVar[bool] = False

    @abstractmethod
    def scores(self, slot: Slot, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """How much each position of the weight is wanted, of its shape; None where nothing is known yet."""
