r"""Weight sharing by k-means: every weight becomes one of a few shared values, which are then fine-tuned.

Paper    Han, Mao, Dally. Deep Compression. ICLR 2016. arXiv:1510.00149 (section 3)
Formula  min sum_k sum_{w in C_k} (w - c_k)^2;   dL/dc_k = sum_{w in C_k} dL/dw
Departs  Zero is a symbol of its own among the 2^bits (the paper stores positions apart); the exact one-dimensional
         optimum is offered beside Lloyd's iteration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from espalier.core.cluster import Floats, Init, exact, histogram, lloyd, squared_error
from espalier.core.context import Context
from espalier.core.errors import NumericError
from espalier.core.fields import Bits, Count, Epochs
from espalier.core.forms import Shared
from espalier.core.parametrize import Slot, attach, require_phase
from espalier.core.selection import by_pattern, select
from espalier.share.sharing import obstacle
from espalier.train import Training


@dataclass(frozen=True)
class Clustering:
    """Centroids (k,) in rising order without zero, whether zero is a symbol of its own, and what it cost."""

    centroids: Floats
    zero: bool
    squared_error: float
    bin_error: float


def cluster(
    values: Floats, bits: int, *, algorithm: str, init: Init, bins: int, zero: bool, rng: np.random.Generator
) -> Clustering:
    """Cluster sorted non-zero ``values`` (n,) into at most ``2**bits`` symbols, zero included where ``zero``.

    ``bin_error``: largest distance of a value to the bin that stood for it (0 where no histogram was needed).
    """
    k = max(1, 2**bits - int(zero))
    if not len(values):
        return Clustering(np.zeros(0), zero, 0.0, 0.0)
    error = 0.0
    if algorithm == "lloyd":
        centroids = lloyd(values, k, init=init, rng=rng)
    else:
        points, repeats = np.unique(values, return_counts=True)
        counts = repeats.astype(np.float64)
        if len(points) > bins:
            points, counts, error = histogram(values, bins)
        centroids = exact(points, k, weights=counts)
    return Clustering(centroids, zero, squared_error(values, centroids), error)


def assign(weight: Tensor, centroids: Floats, *, zero: bool) -> Tensor:
    """Symbol of every weight (int32, its shape): the nearest centroid; with ``zero`` exact zeros are symbol 0."""
    if not len(centroids):
        return torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    middle = torch.from_numpy((centroids[1:] + centroids[:-1]) / 2).to(weight.device)
    index = torch.bucketize(weight.double().contiguous(), middle, out_int32=True)
    return torch.where(weight == 0, 0, index + 1) if zero else index


@dataclass(frozen=True, kw_only=True)
class KMeans(Training):
    """Share the weights of ``layers``; with ``epochs`` the shared values are fine-tuned.

    ``bits``: one number, or pattern -> number. ``group``: one codebook per layer, per layer type, or for all; weights
    of different dtype or device, and frozen and trained ones, have none in common.
    ``keep_zero``: exact zeros stay exact zeros. ``algorithm``: ``lloyd`` from ``init``, or ``exact``, on at most
    ``bins`` histogram bins where there are more distinct values.
    """

    id: ClassVar[str] = "kmeans"
    epochs: Epochs = 0
    bits: Bits | dict[str, Bits] = 5
    algorithm: Literal["lloyd", "exact"] = "lloyd"
    init: Init = "linear"
    group: Literal["layer", "type", "all"] = "layer"
    keep_zero: bool = True
    bins: Count = 2**14
    layers: tuple[str, ...] = ("*",)
    densify: bool = False

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Cluster, attach the codebooks, fine-tune."""
        details: dict[str, Any] = {}
        for name, members, bits in self._groups(model, context):
            details[name] = self._share(members, bits, context)
        context.record.details["codebooks"] = details
        if self.epochs:
            self.train(model, context)
        return model

    def _groups(self, model: nn.Module, context: Context) -> Iterator[tuple[str, list[Slot], int]]:
        selection = select(model, self.layers, who=self.name)
        table = self.bits if isinstance(self.bits, dict) else {}
        default = self.bits if isinstance(self.bits, int) else 5
        bits = by_pattern(model, selection, table, default, who=self.name)
        groups: dict[Any, list[Slot]] = {}
        for slot in selection:
            if reason := obstacle(slot, keeps_zero_rows=self.keep_zero):
                context.skip(slot.name, reason)
                continue
            require_phase(slot, ("dense", "mask"), self.name, densify=self.densify)
            kind = type(slot.module).__name__.removeprefix("Parametrized")
            label = {"layer": slot.name, "type": kind, "all": "all"}[self.group]
            latent = slot.latent
            settled = latent.dtype, latent.device, latent.requires_grad
            groups.setdefault((label, bits[slot.name], settled), []).append(slot)
        labels = [label for label, _, _ in groups]
        for (label, width, _), members in groups.items():
            yield label if labels.count(label) == 1 else f"{label} with {members[0].name}", members, width

    def _share(self, members: list[Slot], bits: int, context: Context) -> dict[str, Any]:
        flat = torch.cat([slot.value().reshape(-1).cpu() for slot in members])
        if not bool(torch.isfinite(flat).all()):
            raise NumericError(f"{members[0].name} holds NaN or infinity; {self.name} cannot cluster it.")
        zero = self.keep_zero and bool((flat == 0).any())
        values = np.sort((flat[flat != 0] if zero else flat).double().numpy())
        rng = np.random.default_rng(context.generator(members[0].name).initial_seed())
        found = cluster(values, bits, algorithm=self.algorithm, init=self.init, bins=self.bins, zero=zero, rng=rng)
        latent: nn.Parameter | None = None
        for slot in members:
            index = assign(slot.value(), found.centroids, zero=zero)
            attach(slot, Shared(index, torch.from_numpy(found.centroids), zero=zero), latent)
            latent = slot.latent
        return {
            "layers": [slot.name for slot in members],
            "bits": bits,
            "symbols": len(found.centroids) + int(zero),
            "rms_error": float(np.sqrt(found.squared_error / max(1, len(values)))),
            "bin_error": found.bin_error,
        }
