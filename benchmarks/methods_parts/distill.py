"""The rows of distillation: after pruning, in the place of fine-tuning; the untouched network teaches."""

from __future__ import annotations

from typing import Any

from benchmarks.methods_parts.row import Row, Setting

import espalier.distill as d
import espalier.prune as p
from espalier.core.method import Technique


def rows(setting: Setting) -> tuple[Row, ...]:
    """One row for every loss and every teaching."""
    weights = p.Prune(sparsity=0.95, scope=p.Global())
    channels = p.Prune(sparsity=0.5, scope=p.Global(), pattern=p.Channels())

    def taught(**fields: Any) -> Technique:
        return d.Distill(epochs=setting.epochs, lr=1e-3, **fields)

    outputs: list[tuple[d.DistillLoss, str]] = [
        (d.SoftTargets(), ""), (d.Logits(), ", on logits"), (d.Logits(space="predictions"), ", on predictions"),
        (d.DKD(warmup=1), ""),
    ]  # fmt: skip
    features: list[tuple[d.DistillLoss, str]] = [
        (d.Hints(epochs=1), ", two-stage"), (d.Hints(mode="joint"), ", joint"), (d.Features(), ""),
        (d.Attention(), ", as in the code"), (d.Attention(mode="paper"), ", as in the paper"), (d.Relational(), ""),
    ]  # fmt: skip
    teachings: list[tuple[d.Teaching, str]] = [
        (d.Single(), ""), (d.MultiTeacher(beside=("current",)), ", the pruned network as it came teaches as well"),
        (d.Assistant(between=("original",)), ", the assistant is the network itself, trained further"),
        (d.Mutual(), ", a fresh dense copy learns along"),
        (d.SelfDistillation(start="copied"), ", from the pruned weights"),
    ]  # fmt: skip
    return (
        Row(id="distill.distill", what="95 % pruned, then distilled", steps=(weights, taught())),
        *(
            Row(id=part.name, what=f"95 % pruned, then distilled{how}", steps=(weights, taught(losses=(part,))))
            for part, how in outputs
        ),
        *(
            Row(id=part.name, what=f"half of the channels, then distilled{how}", network="conv",
                steps=(channels, taught(losses=(part,))))
            for part, how in features
        ),
        *(
            Row(id=part.name, what=f"95 % pruned, then distilled{how}", steps=(weights, taught(teaching=part)))
            for part, how in teachings
        ),
    )  # fmt: skip
