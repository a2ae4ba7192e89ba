"""Rows of the factorisations: every layer as smaller ones at the rank that half of its numbers allow, then tuned."""

from __future__ import annotations

from benchmarks.methods_parts.row import Row, Setting

import espalier.factorize as f

HALF = "half of the numbers of each layer"


def rows(setting: Setting) -> tuple[Row, ...]:
    """One row for every technique, on the convolutional network, and one for every choice of ranks."""
    half = f.Ratio(keep=0.5)
    methods: tuple[tuple[f.Factorization, str], ...] = (
        (f.SVD(rank=half), HALF), (f.ChannelSVD(rank=half), HALF), (f.SpatialSVD(rank=half), HALF),
        (f.Tucker(rank=half), HALF), (f.CP(rank=half), HALF), (f.TensorTrain(rank=half), HALF),
        (f.Autoencoder(rank=half), f"{HALF}, of the outputs"),
        (f.Autoencoder(rank=half, of="weight"), f"{HALF}, of the weight"),
        (f.ActivationAwareSVD(rank=half), HALF), (f.BasisFilters(rank=half), HALF),
        (f.LowRankTraining(rank=half, epochs=setting.epochs, lr=1e-3), f"{HALF}, trained to low rank"),
    )  # fmt: skip
    found = [
        Row(id=method.name, what=f"{what}, then fine-tuned", steps=(method, setting.tune), network="conv")
        for method, what in methods
    ]
    ranks: tuple[f.RankChoice, ...] = (f.Energy(), f.Ratio(), f.Evbmf(), f.Budget(), f.Fixed(rank=8))
    for rank in ranks:
        step = f.ChannelSVD(rank=rank)
        found.append(Row(id=rank.name, what="channel-svd, then fine-tuned", steps=(step, setting.tune), network="conv"))
    return tuple(found)
