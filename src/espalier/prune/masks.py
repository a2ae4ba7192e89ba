"""Masks: the callback that holds the masks of a pruning step and brings them to the sparsity asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.forms import Mask
from espalier.core.parametrize import Slot, attach, bake
from espalier.core.ranking import smallest
from espalier.core.selection import Selection, by_pattern
from espalier.prune.n_m import NM, lowest
from espalier.prune.parts import CutCriterion, FixedPattern, Scores, SolvingCriterion, Watcher, WatchingCriterion
from espalier.prune.regrowth import row_by_row, shares
from espalier.prune.rewind import Snapshot
from espalier.prune.scopes import Layer, Ranking, Row, protected
from espalier.prune.threshold import Threshold, against

if TYPE_CHECKING:
    from espalier.prune.prune import Prune


def _transposed(slot: Slot) -> bool:
    return isinstance(slot.module, _ConvTransposeNd) and slot.owners[0][2] == "weight"


def outputs_first(slot: Slot, tensor: Tensor) -> Tensor:
    """A tensor of the weight's shape as ``(out, in, ...)``: transposed convolutions are stored the other way round."""
    if not _transposed(slot):
        return tensor
    groups, (inputs, outputs, *kernel) = int(slot.module.groups), tensor.shape  # type: ignore[arg-type]
    parts = tensor.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return parts.reshape(groups * outputs, inputs // groups, *kernel)


def as_stored(slot: Slot, tensor: Tensor) -> Tensor:
    """Inverse of :func:`outputs_first`."""
    if not _transposed(slot):
        return tensor
    groups, (outputs, inputs, *kernel) = int(slot.module.groups), tensor.shape  # type: ignore[arg-type]
    parts = tensor.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
    return parts.reshape(groups * inputs, outputs // groups, *kernel)


def final_sparsities(method: Prune, model: nn.Module, selection: Selection) -> dict[str, float]:
    """Weight name -> the sparsity it is to end at."""
    default = method.schedule.final if method.schedule.final is not None else method.criterion.default_sparsity
    table = method.sparsity if isinstance(method.sparsity, Mapping) else {}
    flat = default if isinstance(method.sparsity, Mapping) or method.sparsity is None else method.sparsity
    return by_pattern(model, selection, table, flat if flat is not None else 1.0, who=method.name)


def ranked_sets(method: Prune, selection: Selection, finals: Mapping[str, float]) -> list[tuple[list[str], float]]:
    """The names ranked together, with the sparsity they end at."""
    return [
        ([name for name in names if finals[name] == final], final)
        for names in method.scope.apart(selection)
        for final in sorted({finals[name] for name in names})
    ]


class Masks(Callback):
    """Recomputes the masks as the schedule asks. They live in the forms, so that a resume needs no more of them."""

    def __init__(self, method: Prune, model: nn.Module, selection: Selection, context: Context) -> None:
        self.method, self.model, self.selection, self.context = method, model, selection, context
        self.finals = final_sparsities(method, model, selection)
        self.sets = ranked_sets(method, selection, self.finals)
        self.fresh = {slot.name for slot in selection if not isinstance(slot.form, Mask)}
        for slot in selection:
            if slot.name in self.fresh:
                attach(slot, Mask(torch.ones_like(slot.latent, dtype=torch.bool)))
        self.fence = {slot.name: _mask(slot).clone() for slot in selection}
        self.unscored: set[str] = set()
        criterion = method.criterion
        self.watcher: Watcher | None = None
        if isinstance(criterion, WatchingCriterion):
            self.watcher = criterion.watcher(model, selection)
        # of the weights the step starts with: taken again over what is left, a spread rises with every update
        self.bounds = criterion.bounds(selection) if isinstance(criterion, Threshold) else None
        self.snapshot = Snapshot(method.rewind_epoch) if method.rewind == "weights" else None
        self.jumps = 0
        self.reached: list[float] | None = None
        self.gone = 0
        self.clamped: list[str] = []
        self.held: dict[str, Tensor] = {}

    # --- in the loop -----------------------------------------------------------------------------

    def on_start(self, loop: Loop) -> None:
        for slot in self.selection:
            _form(slot).through = self.watcher is not None or self.method.regrow > 0

    def on_epoch_start(self, loop: Loop) -> None:
        if self.snapshot is not None:
            self.snapshot.watch(loop)
        self.step(loop)

    def before_step(self, loop: Loop) -> None:
        """Pruned weights do not move while they are watched; with regrowth the optimizer gathers their moments.

        Momentum and weight decay move a weight without a gradient, so what may come back is put back after the step.
        """
        if self.revives:
            self.held = {slot.name: slot.latent.detach()[~_mask(slot)] for slot in self.selection}
        if self.watcher is None or self.method.regrow:
            return
        for slot in self.selection:
            if slot.latent.grad is not None:
                slot.latent.grad.masked_fill_(~_mask(slot), 0)

    def after_step(self, loop: Loop) -> None:
        with torch.no_grad():
            for slot in self.selection:
                if slot.name in self.held:
                    slot.latent[~_mask(slot)] = self.held.pop(slot.name)
        if loop.step % self.method.every == 0:
            self.step(loop)

    def step(self, loop: Loop) -> None:
        """One mask update, with what belongs to it in the loop."""
        progress = loop.step / loop.steps
        self.update(progress, regrow=self.method.regrow if progress < self.method.regrowth.until else 0.0)
        if self.method.regrow and progress < self.method.regrowth.until:
            self.regrow(loop, progress)
            self.gone = self.count()
        jumps = sum(progress >= at - 1e-9 for at in self.method.schedule.jumps)
        if jumps > self.jumps:
            self.jumps = jumps
            if self.snapshot is not None:
                self.snapshot.restore(self.model, loop.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "jumps": self.jumps,
            "reached": self.reached,
            "gone": self.gone,
            "clamped": self.clamped,
            "unscored": sorted(self.unscored),
            "snapshot": self.snapshot.state_dict() if self.snapshot is not None else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.jumps, self.reached, self.gone = state["jumps"], state["reached"], state["gone"]
        self.clamped, self.unscored = state["clamped"], set(state["unscored"])
        if self.snapshot is not None:
            self.snapshot.load_state_dict(state["snapshot"])

    # --- the masks -------------------------------------------------------------------------------

    def update(self, progress: float, *, regrow: float = 0.0) -> None:
        """Bring every mask to the sparsity the schedule asks for at ``progress``, and ``regrow`` of the rest beyond.

        Where the schedule asks for no more than last time there is nothing to do, unless what went may come back.
        """
        asked = self.asked(progress)
        if isinstance(self.method.criterion, SolvingCriterion):
            self.solve(self.method.criterion, progress)
        elif regrow or asked != self.reached or self.revives:
            pooled = self.pooled()
            with torch.no_grad():
                removed = self.removed(pooled, progress, regrow)
                if asked == self.asked(1.0):
                    self.clamped = self.floored(pooled)
                self.apply(removed)
        self.reached, self.gone = asked, self.count()

    def asked(self, progress: float) -> list[float]:
        """What the schedule asks for: the sparsity of each ranked set, or the share of what knows its own amount."""
        schedule = self.method.schedule
        if isinstance(self.method.criterion, CutCriterion) or isinstance(self.method.pattern, FixedPattern):
            return [schedule.share(progress)]
        return [schedule.sparsity(progress, final) for _, final in self.sets]

    def count(self) -> int:
        """How many weights are masked."""
        return sum(int((~_mask(slot)).sum()) for slot in self.selection)

    @property
    def revives(self) -> bool:
        """Whether what this step has pruned may come back."""
        return isinstance(self.method.criterion, WatchingCriterion) and self.method.criterion.revives

    def scores(self) -> Scores:
        """The criterion's scores, checked."""
        criterion = self.method.criterion
        if self.watcher is not None:
            scores = self.watcher.scores(self.model)
        elif self.bounds is not None:
            scores = against(self.selection, self.bounds)
        else:
            scores = criterion.scores(self.model, self.selection, self.context)
        for name, score in scores.items():
            if bool(torch.isnan(score).any()):
                raise NumericError(
                    f"criterion {criterion.id} gives NaN for {name} ({int(torch.isnan(score).sum())} of "
                    f"{score.numel()} scores), so {self.method.name} cannot rank it. Check the data and the loss on "
                    "the model, or choose another criterion."
                )
        return {name: score.detach() for name, score in scores.items()}

    def pooled(self) -> Scores:
        """Scores of the groups; -inf for groups of which nothing is left."""
        pattern, reduction = self.method.pattern, self.method.criterion.reduction
        scores = self.scores()
        found = {}
        with torch.no_grad():
            for slot in self.selection:
                if slot.name not in scores:
                    self.unscored.add(slot.name)
                    continue
                there = outputs_first(slot, self.fence[slot.name] if self.revives else _mask(slot))
                if self.method.criterion.of == "units":
                    score = scores[slot.name]
                else:
                    score = pattern.pool(outputs_first(slot, scores[slot.name]).masked_fill(~there, 0), reduction)
                found[slot.name] = score.masked_fill(pattern.pool(there.float(), "sum") == 0, -torch.inf)
        return found

    def removed(self, pooled: Scores, progress: float, regrow: float = 0.0) -> dict[str, Tensor]:
        """Masks of the groups that go at ``progress``."""
        method, share = self.method, self.method.schedule.share(progress)
        if isinstance(method.criterion, CutCriterion):
            cut = method.criterion.removed(pooled, share)
            return {name: gone & ~protected(pooled[name], method.scope.floor) for name, gone in cut.items()}
        if isinstance(method.pattern, FixedPattern):
            return {name: method.pattern.removed(score, share) for name, score in pooled.items()}
        scope, removed = method.scope, dict[str, Tensor]()
        rank = scope.rank if method.pattern.empties and isinstance(scope, Ranking) else scope.removed
        for names, final in self.sets:
            asked = method.schedule.sparsity(progress, final)
            removed |= rank({name: pooled[name] for name in names if name in pooled}, asked + regrow * (1 - asked))
        return removed

    def apply(self, removed: Mapping[str, Tensor]) -> None:
        """Write what goes into the masks, in place."""
        for slot in self.selection:
            if slot.name in removed:
                shape = outputs_first(slot, _mask(slot)).shape
                stays = ~as_stored(slot, self.method.pattern.spread(removed[slot.name], shape))
                _mask(slot).copy_(stays & (self.fence[slot.name] if self.revives else _mask(slot)))

    def solve(self, criterion: SolvingCriterion, progress: float) -> None:
        """Let the criterion choose and repair, layer after layer; a layer that is sparse enough is left alone."""
        pattern = self.method.pattern
        groups = (pattern.n, pattern.m) if isinstance(pattern, NM) else None
        for done, slot in enumerate(criterion.order(self.model, self.selection, self.context)):
            asked = self.method.schedule.sparsity(progress, self.finals[slot.name])
            kept = _mask(slot)
            if groups is not None:
                first = outputs_first(slot, kept)
                lacking = bool((first & lowest(first.float(), *groups)).any())
            else:
                lacking = int((~kept).sum()) < int(asked * kept.numel() + 1e-9)
            if lacking:
                weight, stays = criterion.solve(self.model, slot, kept.clone(), asked, groups, self.context)
                with torch.no_grad():
                    slot.latent.copy_(weight)
                    kept.copy_(stays & kept)
            self.context.progress("solving", done + 1, self.selection.count)

    def regrow(self, loop: Loop, progress: float) -> None:
        """Bring connections back where the regrowth asks for them, until the sparsity is what it should be."""
        method = self.method
        wanted = {slot.name: method.regrowth.scores(slot, loop.optimizer) for slot in self.selection}
        by_name = {slot.name: slot for slot in self.selection if wanted[slot.name] is not None}
        across = method.regrowth.redistributes and not isinstance(method.scope, (Layer, Row))
        with torch.no_grad():
            for names, final in self.sets:
                asked = method.schedule.sparsity(progress, final)
                together = [name for name in names if name in by_name]
                if isinstance(method.scope, Row):
                    self._regrow_rows([by_name[name] for name in together], wanted, asked)
                    continue
                for members in [together] if across else [[name] for name in together]:
                    self._regrow_set({name: by_name[name] for name in members}, wanted, asked)

    def _regrow_set(self, members: Mapping[str, Slot], wanted: Mapping[str, Tensor | None], asked: float) -> None:
        free = {name: self.fence[name] & ~_mask(slot) for name, slot in members.items()}
        size = sum(_mask(slot).numel() for slot in members.values())
        gone = sum(int((~_mask(slot)).sum()) for slot in members.values())
        known = {name: found for name in members if (found := wanted[name]) is not None}
        wants = {name: float(found[_mask(members[name])].mean().nan_to_num()) for name, found in known.items()}
        counts = shares(max(0, gone - int(asked * size + 1e-9)), wants, {n: int(f.sum()) for n, f in free.items()})
        for name, count in counts.items():
            back = smallest((-known[name]).masked_fill(~free[name], torch.inf), count) & free[name]
            _bring_back(members[name], back)

    def _regrow_rows(self, members: list[Slot], wanted: Mapping[str, Tensor | None], asked: float) -> None:
        for slot in members:
            found = wanted[slot.name]
            if found is not None:
                kept, fence = (outputs_first(slot, mask) for mask in (_mask(slot), self.fence[slot.name]))
                _bring_back(slot, as_stored(slot, row_by_row(outputs_first(slot, found), kept, fence, asked)))

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Bring the masks to the end of the schedule, and say what came of it.

        Masks that are there already stay: ranking again would give the best epoch's weights the last one's masks.
        """
        if self.reached != self.asked(1.0) or self.count() != self.gone:  # or earlier masks were put back
            self.reached = None
            self.update(1.0)
        for slot in self.selection:
            _form(slot).through = False
            if slot.name in self.unscored:
                self.context.skip(slot.name, f"criterion {self.method.criterion.id} has no scores for it")
                if slot.name in self.fresh:
                    bake(slot)
        record = self.context.record.details
        record["sparsity"] = {
            slot.name: 1 - float(_mask(slot).float().mean())
            for slot in self.selection
            if slot.name not in self.unscored or slot.name not in self.fresh
        }
        if self.clamped:
            record["clamped"] = self.clamped
            self.context.note(
                f"{', '.join(self.clamped)}: kept a share of {self.method.scope.floor:g}, at least one group, where "
                "more would have gone."
            )

    def floored(self, pooled: Scores) -> list[str]:
        """The weights of which the floor keeps more than the ranking or the cut would at the end of the schedule."""
        method = self.method
        if isinstance(method.criterion, CutCriterion):
            cut, floor = method.criterion.removed(pooled, 1.0), method.scope.floor
            return [name for name, gone in cut.items() if bool((gone & protected(pooled[name], floor)).any())]
        if isinstance(method.pattern, FixedPattern) or method.pattern.empties:
            return []
        found: list[str] = []
        for names, final in self.sets:
            group = {name: pooled[name] for name in names if name in pooled}
            found += method.scope.clamped(group, method.schedule.sparsity(1.0, final))
        return found


def _bring_back(slot: Slot, back: Tensor) -> None:
    _mask(slot).logical_or_(back)
    slot.latent.masked_fill_(back, 0)


def _form(slot: Slot) -> Mask:
    assert isinstance(slot.form, Mask)  # noqa: S101 - attached in __init__
    return slot.form


def _mask(slot: Slot) -> Tensor:
    return _form(slot).mask
