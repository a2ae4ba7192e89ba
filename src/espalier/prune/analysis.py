r"""Sensitivity analysis: how the metric falls when one coupled group after another loses its least important units.

Paper    Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets. ICLR 2017. arXiv:1608.08710,
         section 3.2
Formula  value(group, s) = metric on val of the network without the floor(s * size) lowest units of that group alone
Departs  A group is all layers that share the units, with one score per unit; nothing is fine-tuned or re-estimated
         in between. The network is really without the units, not masked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espalier.core.context import EpochStore
from espalier.core.errors import UsageError
from espalier.core.model import digest
from espalier.core.recipe import step_to_data
from espalier.core.task import Split
from espalier.prune.unit_removal import Removal

LEVELS = (0.25, 0.5, 0.75)
"""Shares of a group that are tried by default."""


def lowest(scores: Tensor, share: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mask of the ``floor(share * n)`` lowest of (n,) scores; one unit at least stays."""
    count = min(int(share * len(scores) + 1e-9), len(scores) - 1)
    gone = np.zeros(len(scores), dtype=np.bool_)
    gone[torch.argsort(scores, stable=True)[:count].numpy()] = True
    return gone


def analyse(
    removal: Removal, levels: Sequence[float] = LEVELS, *, split: Split = "val", store: EpochStore | None = None
) -> dict[str, Any]:
    """What there was (``full``, its ``stderr``), and ``groups``: name, size, tensors, values; as plain data.

    ``values``: the metric at each of ``levels`` (shares in (0, 1)). ``store``: where finished groups are kept after
    each; a second call goes on where the first was stopped, if model, criterion and levels are the same.
    Raises UsageError for levels outside (0, 1).
    """
    if not levels or any(not 0 < level < 1 for level in levels):
        raise UsageError(f"levels are shares above 0 and below 1; got {', '.join(f'{x:g}' for x in levels) or 'none'}.")
    context, scores = removal.context, removal.scores()
    full, metric = context.measure(removal.small({}), split), context.data.scorer()
    groups = removal.candidates()
    head: dict[str, Any] = {
        "metric": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better, "split": split,
        "full": full.value, "stderr": full.stderr, "levels": list(levels), "criterion": removal.method.criterion.id,
        "units": {group.name: group.size for group in groups}, "model": digest(removal.model),
        "method": json.loads(json.dumps(step_to_data(removal.method))),
    }  # fmt: skip
    kept = store.load() if store is not None else None
    rows: list[dict[str, Any]] = kept[2]["rows"] if kept is not None and kept[2]["head"] == head else []
    done = {row["name"] for row in rows}
    for number, group in enumerate(groups, 1):
        if group.name not in done:
            values = [
                context.measure(removal.small({group.name: lowest(scores[group.name], level)}), split).value
                for level in levels
            ]
            rows.append({"name": group.name, "size": group.size, "tensors": list(group.tensors), "values": values})
            if store is not None:
                store.save(number, {}, {"head": head, "rows": rows})
        context.progress("sensitivity", number, len(groups))
    return {**head, "groups": rows}
