"""Where a training run's randomness comes from: every epoch begins at a seed of its own.

So an epoch is repeated exactly whatever ran before it, and a resume has no generator state to restore. Dropout,
samplers, augmentation and users' transforms draw from the global generators of torch, NumPy and Python; they are
seeded inside and handed back as they were. A ``DataLoader`` with persistent workers escapes this: its workers keep
their generators over the epochs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from espalier.core.context import Context, derive_seed


@contextmanager
def seeded_epochs(context: Context, name: str, loader: Any) -> Iterator[Callable[[int], int]]:
    """Yield ``begin(epoch) -> seed``, which seeds every generator in reach; all are put back at exit."""
    own, samplers = _samplers(loader)
    before = [generator.get_state() for generator in own]
    python, array = random.getstate(), np.random.get_state()

    def begin(epoch: int) -> int:
        seed = derive_seed(context.step_seed, f"{name}/{epoch}")
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for generator in own:
            generator.manual_seed(seed)
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return seed

    try:
        with context.forked(name):
            yield begin
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for generator, state in zip(own, before, strict=True):
            generator.set_state(state)


def _samplers(loader: Any) -> tuple[list[torch.Generator], list[Any]]:
    """The generators a loader holds itself, and its samplers that count epochs (distributed ones)."""
    batches = getattr(loader, "batch_sampler", None)
    places = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    generators = {
        id(g): g for g in (getattr(place, "generator", None) for place in places) if isinstance(g, torch.Generator)
    }
    counting = {id(place): place for place in places[1:] if callable(getattr(place, "set_epoch", None))}
    return list(generators.values()), list(counting.values())
