"""The rows of what training offers beside optimizers, schedules and penalties; each in the same pruning step."""

from __future__ import annotations

from typing import Any

from benchmarks.methods_parts.row import Row, Setting

import espalier.prune as p
import espalier.train as t

PRUNED = "in the pruning step (cubic, 95 %)"


def rows(setting: Setting) -> tuple[Row, ...]:
    """All of them."""
    return *_averaged_and_changed(setting), *_dropout(setting), *_norms(setting)


def _pruning(setting: Setting, **fields: Any) -> p.Prune:
    return p.Prune(
        sparsity=0.95, scope=p.Global(), schedule=p.Cubic(), epochs=setting.longer, every=setting.every, **fields
    )


def _averaged_and_changed(setting: Setting) -> tuple[Row, ...]:
    parts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("train.ema", {"ema": t.EMA(decay=0.99)}),
        ("train.cutout", {"augment": (t.Cutout(size=0.25),)}),
        ("train.mixup", {"augment": (t.Mixup(alpha=0.2),)}),
        ("train.resized-crop", {"augment": (t.ResizedCrop(area=(0.6, 1.0)),)}),
    )
    return tuple(Row(id=name, what=PRUNED, steps=(_pruning(setting, **fields),)) for name, fields in parts)


def _dropout(setting: Setting) -> tuple[Row, ...]:
    """The network called plain has dropout layers, at rate 0."""
    low, pruned = t.Dropout(mode="set", rate=0.2), p.Prune(sparsity=0.95, scope=p.Global())
    before = (t.Dropout(mode="set", rate=0.5), setting.tune, pruned)
    return (
        Row(id="train.dropout", what=f"put in at rate 0.2, {PRUNED}", network="conv",
            steps=(t.Dropout(rate=0.2), _pruning(setting))),
        Row(id="train.dropout", what=f"rate 0.2, {PRUNED}", steps=(low, _pruning(setting))),
        Row(id="train.dropout", what="rate 0.5, trained, pruned 95 %, fine-tuned", steps=(*before, setting.tune)),
        Row(id="train.dropout", what="rate 0.5, trained, pruned 95 %, rate lowered, fine-tuned",
            steps=(*before, t.Dropout(mode="rescale"), setting.tune)),
        *(Row(id=part.name, what=f"of the rate 0.2, {PRUNED}", steps=(low, _pruning(setting, dropout=part)))
          for part in (t.CurriculumDropout(), t.EarlyDropout())),
    )  # fmt: skip


def _norms(setting: Setting) -> tuple[Row, ...]:
    return (
        Row(id="train.batch-norm", what=f"put in, {PRUNED}", steps=(t.BatchNorm(mode="insert"), _pruning(setting))),
        Row(id="train.batch-norm", what=f"put in, {PRUNED}, folded",
            steps=(t.BatchNorm(mode="insert"), _pruning(setting), t.BatchNorm(mode="fold"))),
        Row(id="train.batch-norm", what=f"of the network folded, {PRUNED}", network="normed",
            steps=(t.BatchNorm(mode="fold"), _pruning(setting))),
    )  # fmt: skip
