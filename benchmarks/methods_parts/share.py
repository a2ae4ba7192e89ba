"""The rows of weights that are made from few numbers: a quarter of them is kept, then they are fine-tuned."""

from __future__ import annotations

import dataclasses

from benchmarks.methods_parts.row import Row, Setting

from espalier.share import Circulant, Hashed, Monarch, Sharing, Tied, Toeplitz

QUARTER = "a quarter of the numbers"
INNER = ("type:Conv2d", "#-2")
"""All but the output layer, whose classes tying would make equal."""


def rows(setting: Setting) -> tuple[Row, ...]:
    """All of them."""

    def tuned(method: Sharing) -> tuple[Sharing]:
        return (dataclasses.replace(method, epochs=setting.epochs, lr=1e-3),)

    alike: tuple[tuple[Sharing, str], ...] = (
        (Circulant(), QUARTER), (Circulant(flips=True), f"{QUARTER}, signs flipped"), (Toeplitz(), QUARTER),
        (Monarch(), QUARTER), (Hashed(), QUARTER),
    )  # fmt: skip
    tied: tuple[tuple[Tied, str, str], ...] = (
        (Tied(layers=INNER), "a quarter of the filters and neurons", "conv"),
        (Tied(what="kernels"), "one kernel for each filter", "conv"),
        (Tied(what="layers", layers=("type:Conv2d",)), "convolutions of one shape are one", "residual"),
    )
    plain = tuple(Row(id=m.name, what=f"{what}, no training", steps=(m,)) for m, what in alike)
    after = tuple(Row(id=m.name, what=f"{what}, fine-tuned", steps=tuned(m)) for m, what in alike)
    return *plain, *after, *(
        Row(id=m.name, what=f"{what}, fine-tuned", steps=tuned(m), network=network) for m, what, network in tied
    )  # fmt: skip
