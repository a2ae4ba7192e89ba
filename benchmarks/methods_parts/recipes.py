"""The rows of the whole recipes; their defaults train for long, so the epochs are the setting's."""

from __future__ import annotations

from benchmarks.methods_parts.row import Row, Setting

import espalier.prune as p
import espalier.quantize as q
import espalier.recipes as r
from espalier.distill import Distill
from espalier.share import KMeans


def rows(s: Setting) -> tuple[Row, ...]:
    """One row for each recipe (deep-compression stands with the coders)."""
    joint = r.PruneQuantize(
        strength=None, sparsity=0.95, quantize=q.Quantize(weights=q.LSQ(), bits=3), epochs=s.longer, every=s.every,
        schedule=p.Cubic(end=0.5), lr=2e-3,
    )  # fmt: skip
    lesson = Distill(epochs=s.epochs, lr=1e-3)
    pruning = p.Prune(
        sparsity=0.95, scope=p.Global(), schedule=p.Cubic(), epochs=s.longer, every=s.every, lr=1e-3
    )  # fmt: skip
    ternary = q.Quantize(weights=q.TTQ(), bits=2, epochs=s.longer, lr=1e-3)
    federated = r.Federated(clients=10, rounds=3 * s.epochs, lr=0.1, sparsity=0.98)
    quick = p.Prune(sparsity=0.6, scope=p.Global(), schedule=p.Cubic(), epochs=s.epochs, every=s.every, lr=1e-3)
    until = r.IterateUntil(steps=(quick, KMeans(bits=4, epochs=s.epochs, lr=3e-4)), size="60x", max_drop=1.0, rounds=4)
    return (
        Row(id="recipes.prune-quantize", what="95 %, 3 bits, ends in 8, in one training", steps=(joint,)),
        Row(
            id="recipes.prune-quantize-distill", what="the same, then taught by the network as it was",
            steps=(r.PruneQuantizeDistill(strength=None, compress=joint, distill=lesson, recover=lesson),),
        ),
        Row(
            id="recipes.low-rank-then-int8", what="half of the parameters, then int8", network="conv",
            steps=(r.LowRankInt8(strength=None, finetune=s.tune),),
        ),
        Row(
            id="recipes.ternary-network", what="62 % zeros, ends in 8 bits", network="conv",
            steps=(r.TernaryNetwork(quantize=ternary, finetune=s.tune),),
        ),
        Row(
            id="recipes.mobile-int8", what="45 % of the multiply-adds gone, then int8", network="conv",
            steps=(r.MobileInt8(finetune=s.tune),),
        ),
        Row(id="recipes.new-head", what="a fresh output layer, then fine-tuned", steps=(r.NewHead(), s.tune)),
        Row(
            id="recipes.transfer", what="a fresh output layer, 95 %, 5 bits, the same task",
            steps=(r.Transfer(strength=None, prune=pruning, finetune=s.tune),),
        ),
        Row(
            id="recipes.federated", what=f"10 clients of two shards, {3 * s.epochs} rounds, 2 % of each update",
            steps=(federated,),
        ),
        Row(id="recipes.iterate-until", what="60 % again and again, then 4 bits, to 1/60", steps=(until,)),
    )  # fmt: skip
