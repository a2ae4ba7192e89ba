r"""Whole layers and blocks removed, by rule or by measured impact.

Paper    none; the impact of a block as in Veit, Wilber, Belongie. Residual Networks Behave Like Ensembles of Relatively
         Shallow Networks. NeurIPS 2016. arXiv:1605.06431
Formula  impact_b = |f(x) - f(x; b = identity)|^2 / |f(x)|^2 over val, or the drop of the metric; the lowest go, one at
         a time, measured anew after each;   rule: every k-th block
Departs  Candidates keep the shape of what passes through them; blocks that change it would need a projection and stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from espalier.core.callback import Callback, Loop
from espalier.core.context import Context
from espalier.core.edits import Remove
from espalier.core.errors import ModelError
from espalier.core.fields import Batches, Multiple
from espalier.core.metric import first_tensor
from espalier.core.model import device_of, evaluating
from espalier.core.parametrize import slots
from espalier.core.plan import Plan
from espalier.core.selection import Selection
from espalier.core.task import to_device
from espalier.graph import Runner
from espalier.prune.removing import Removing, final_sparsity, settled

if TYPE_CHECKING:
    from espalier.prune.prune import Prune

_NEVER = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU, nn.ModuleList)


@dataclass(frozen=True, kw_only=True)
class Layers(Removing):
    """Blocks whose input and output have one shape; ``sparsity`` is the share of them that goes.

    ``by``: the distance of the outputs, the metric, the rule (every ``every``-th block, no sparsity), or the criterion,
    whose scores are summed over a block's weights. ``batches``: how many val batches an impact is measured on.
    """

    id: ClassVar[str] = "layers"
    units: ClassVar[bool] = True
    by: Literal["distance", "metric", "rule", "criterion"] = "distance"
    every: Multiple = 2
    batches: Batches = 4

    def misfits(self, method: Prune) -> list[str]:
        found = [*super().misfits(method), *self.no_say(method, criterion=self.by != "criterion", scope=True)]
        if self.by == "rule" and method.sparsity is not None:
            found.append(f"by=rule takes every {self.every}th block away; leave sparsity={method.sparsity} unset")
        return found

    def transform(self, method: Prune, model: nn.Module, context: Context) -> nn.Module:
        """Remove block after block, while training where ``epochs`` says so."""
        if isinstance(model, Runner):
            raise ModelError(
                f"{method.name}: an earlier step left a graph module, which has no blocks any more; put the step with "
                "pattern=layers before the one that removes channels or heads."
            )
        blocks = candidates(model, context)
        if method.layers != ("*",):
            blocks = [path for path in blocks if any(_named(path, pattern) for pattern in method.layers)]
        if not blocks:
            raise ModelError(
                f"{method.name}: {type(model).__name__} has no block with parameters that hands back the shape it was "
                "given; pattern layers has nothing to remove. Use pattern=channels."
            )
        walk = _Walk(self, method, model, context, blocks)
        if method.epochs:
            method.train(model, context, callbacks=(walk,), settled=settled(method))
        walk.until(1.0, None)
        context.record.details |= {"blocks": len(blocks), "removed": walk.gone}
        return model


def _named(path: str, pattern: str) -> bool:
    import fnmatch

    return fnmatch.fnmatchcase(path, pattern)


def candidates(model: nn.Module, context: Context) -> list[str]:
    """Paths of the outermost blocks that keep the shape of their one input, in the order they run.

    A sequence of blocks is no block of its own; norms are none.
    """
    seen: dict[str, bool] = {}
    handles = []
    for path, module in model.named_modules():
        if path and not isinstance(module, _NEVER) and any(True for _ in module.parameters()):

            def look(_: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
                one = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor)
                same = one and args[0].shape == output.shape and args[0].dtype == output.dtype
                seen[path] = seen.get(path, True) and same

            handles.append(module.register_forward_hook(look))
    try:
        with evaluating(model):
            context.data.predict(model, to_device(context.data.example(), device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    keeping = {path for path, same in seen.items() if same}
    keeping -= {p for p in keeping if isinstance(model.get_submodule(p), nn.Sequential) and _inside(p, keeping)}
    return [path for path in seen if path in keeping and not any(path.startswith(f"{other}.") for other in keeping)]


def _inside(path: str, others: set[str]) -> bool:
    return any(other.startswith(f"{path}.") for other in others)


def how_many(share: float, count: int) -> int:
    """The nearest number of things to ``share`` of ``count``; one at least for any share above 0."""
    return max(1, round(share * count)) if share else 0


@contextmanager
def skipped(module: nn.Module) -> Iterator[None]:
    """Within the block the module hands back what it gets."""
    handle = module.register_forward_hook(lambda _, args, __: args[0])
    try:
        yield
    finally:
        handle.remove()


class _Walk(Callback):
    """Which blocks are gone, and which goes next."""

    def __init__(self, pattern: Layers, method: Prune, model: nn.Module, context: Context, blocks: list[str]) -> None:
        self.pattern, self.method, self.model, self.context = pattern, method, model, context
        self.blocks = blocks
        self.gone = [path for path in blocks if isinstance(model.get_submodule(path), nn.Identity)]

    def on_epoch_start(self, loop: Loop) -> None:
        schedule = self.method.schedule
        share = schedule.share(schedule.at_epoch(loop.epoch, loop.epochs))
        self.gone = [path for path in self.blocks if isinstance(self.model.get_submodule(path), nn.Identity)]
        self.until(share, loop.optimizer)

    def until(self, share: float, optimizer: torch.optim.Optimizer | None) -> None:
        """Remove until ``share`` of what is to go in the end is gone."""
        wanted = int(self.count() * share + 1e-9)
        while len(self.gone) < wanted:
            left = [path for path in self.blocks if path not in self.gone]
            path = self.next(left)
            Plan((Remove(path=path),)).apply(self.model, optimizer)
            self.gone.append(path)
            self.context.progress("blocks removed", len(self.gone), wanted)

    def count(self) -> int:
        """How many blocks go in the end."""
        if self.pattern.by == "rule":
            return len(self.blocks) // self.pattern.every
        return how_many(final_sparsity(self.method), len(self.blocks))

    def next(self, left: list[str]) -> str:
        """The block that goes next."""
        pattern = self.pattern
        if pattern.by == "rule":
            return next(path for path in self.blocks[pattern.every - 1 :: pattern.every] if path in left)
        if pattern.by == "criterion":
            scores = self._scores(left)
        elif pattern.by == "metric":
            scores = {path: self._drop(path) for path in left}
        else:
            scores = self._distances(left)
        return min(scores, key=lambda path: scores[path])

    def _scores(self, left: list[str]) -> dict[str, float]:
        chosen = Selection(tuple(slot for slot in slots(self.model).values() if slot.latent.ndim > 1))
        found = self.method.criterion.scores(self.model, chosen, self.context)
        total: dict[str, float] = {}
        for path in left:
            of = [score for name, score in found.items() if name.startswith(f"{path}.")]
            if of:
                total[path] = sum(float(score.abs().sum()) for score in of)
            else:
                self.context.skip(path, f"criterion {self.method.criterion.id} has no scores for it; left whole")
        if not total:
            raise ModelError(f"{self.method.name}: criterion {self.method.criterion.id} scores none of {left}.")
        return total

    def _drop(self, path: str) -> float:
        with skipped(self.model.get_submodule(path)):
            score = self.context.measure(self.model)
        return -score.value if self.context.data.scorer().higher_is_better else score.value

    def _distances(self, left: list[str]) -> dict[str, float]:
        task, device = self.context.data, device_of(self.model)
        total = dict.fromkeys(left, 0.0)
        split = "val" if task.val is not None else "train"
        with evaluating(self.model):
            for number, batch in enumerate(task.data(split)):  # type: ignore[arg-type]
                if number == self.pattern.batches:
                    break
                moved = to_device(batch, device)
                whole = first_tensor(task.predict(self.model, moved))
                for path in left:
                    with skipped(self.model.get_submodule(path)):
                        other = first_tensor(task.predict(self.model, moved))
                    total[path] += float((other - whole).square().sum() / whole.square().sum().clamp_min(1e-30))
        return total
