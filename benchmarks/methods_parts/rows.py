"""The rows of ``benchmarks/methods.py``: what is done to which network. None is tuned; kinds are compared alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.methods_parts import compact, distill, factorize, recipes, share, train
from benchmarks.methods_parts.row import Row, Setting
from torch import Tensor
from torch.nn import functional as F

import espalier.prune as p
import espalier.quantize as q
import espalier.train as t
from espalier.core.recipe import FileOptions
from espalier.recipes import DeepCompression
from espalier.share import KMeans

ONE_SHOT, WHILE = "one-shot, then fine-tuned", "while training"


def rows(setting: Setting) -> Iterator[Row]:
    """All rows: those of pruning and quantization stand here, each other room's in a file of its name."""
    for part in (_criteria, _patterns, _scopes, _schedules, _trained, _before, _share, _quantize, _files, _training):
        yield from part(setting)
    for room in (train, share, factorize, compact, distill, recipes):
        yield from room.rows(setting)


def weights(**fields: Any) -> p.Prune:
    """Single weights of all layers together, 95 %."""
    return p.Prune(**{"sparsity": 0.95, "scope": p.Global(), **fields})


def channels(**fields: Any) -> p.Prune:
    """Half of the channels of all layers together."""
    return p.Prune(**{"sparsity": 0.5, "scope": p.Global(), "pattern": p.Channels(), **fields})


def _criteria(s: Setting) -> Iterator[Row]:
    for criterion in (
        p.Magnitude(), p.Random(), p.Sensitivity(), p.OptimalBrainDamage(), p.Lamp(), p.Momentum(level="weights"),
    ):  # fmt: skip
        yield Row(id=criterion.name, what=ONE_SHOT, steps=(weights(criterion=criterion), s.tune))
    threshold = weights(criterion=p.Threshold(quality=1.9), sparsity=None, scope=p.Layer())
    yield Row(id="prune.threshold", what=ONE_SHOT, steps=(threshold, s.tune))
    wanda = weights(criterion=p.Wanda(), scope=p.Row())
    yield Row(id="prune.wanda", what="one-shot in each row, then fine-tuned", steps=(wanda, s.tune))
    solving = weights(criterion=p.OBS(form="sparsegpt", batches=4), scope=p.Layer())
    yield Row(id="prune.obs", what="SparseGPT form, one-shot in each layer, then fine-tuned", steps=(solving, s.tune))
    moving = weights(criterion=p.Movement(), schedule=p.Linear(), epochs=s.longer, every=s.every)
    yield Row(id="prune.movement", what="linear, while training", steps=(moving,))
    for unit in (
        p.Magnitude(), p.Random(), p.GeometricMedian(), p.MeanWeight(), p.Saliency(), p.ActivationMean(),
        p.AveragePercentageOfZeros(), p.Entropy(), p.HRank(), p.Scale(), p.Momentum(),
    ):  # fmt: skip
        step = channels(criterion=unit)
        yield Row(id=unit.name, what="half of the channels, then fine-tuned", steps=(step, s.tune), network="conv")


def _patterns(s: Setting) -> Iterator[Row]:
    yield Row(
        id="prune.weights", what="cubic, global", steps=(weights(schedule=p.Cubic(), epochs=s.longer, every=s.every),)
    )
    yield Row(id="prune.n-m", what="2 of 4, then fine-tuned", steps=(p.Prune(pattern=p.NM()), s.tune))
    blocks = weights(pattern=p.Blocks(), sparsity=0.9)
    yield Row(id="prune.blocks", what="90 % of 4 x 4 blocks, then fine-tuned", steps=(blocks, s.tune))
    singular = p.Prune(pattern=p.Singular(), sparsity=0.5)
    yield Row(id="prune.singular", what="half of the singular values, no training", steps=(singular,))
    for pattern, sparsity, what in (
        (p.KernelParts(part="stripe"), 0.5, "half of the stripes"),
        (p.KernelParts(part="kernel"), 0.5, "half of the kernels"),
        (p.KernelPatterns(), None, "4 of 9, 8 patterns"),
        (p.Units(), 0.5, "half of the units, masked"),
    ):
        step = p.Prune(pattern=pattern, sparsity=sparsity)
        yield Row(id=pattern.name, what=f"{what}, then fine-tuned", steps=(step, s.tune), network="conv")
    half = channels(epochs=s.longer, schedule=p.Cubic())
    yield Row(id="prune.channels", what="half, while training", steps=(half,), network="conv")
    for part in ("heads", "feed-forward"):
        step = channels(pattern=p.Heads(part=part))
        yield Row(
            id="prune.heads", what=f"half of {part}, then fine-tuned", steps=(step, s.tune), network="transformer"
        )
    blocks_gone = p.Prune(pattern=p.Layers(), sparsity=0.5)
    yield Row(id="prune.layers", what="half of the blocks, then fine-tuned", steps=(blocks_gone, s.tune),
              network="residual")  # fmt: skip
    fading = p.Prune(pattern=p.Activations(), sparsity=0.5)
    yield Row(id="prune.activations", what="half of them, then fine-tuned", steps=(fading, s.tune), network="residual")
    crude = p.Prune(pattern=p.Tensors(), scope=p.Global(), sparsity=0.2)
    yield Row(id="prune.tensors", what="a fifth of the weights, then fine-tuned", steps=(crude, s.tune),
              network="residual")  # fmt: skip


def _scopes(s: Setting) -> Iterator[Row]:
    for scope in (p.Layer(), p.Global(), p.Row()):
        yield Row(id=scope.name, what=ONE_SHOT, steps=(weights(scope=scope), s.tune))
    for scope in (p.Global(), p.Apart()):
        step = weights(scope=scope, sparsity=0.9)
        yield Row(id=scope.name, what="90 % of the CNN, then fine-tuned", steps=(step, s.tune), network="conv")
    for scope in (p.Global(), p.Isomorphic()):
        step = channels(scope=scope, sparsity=0.3)
        yield Row(id=scope.name, what="30 % of the channels, heads and widths, then fine-tuned", steps=(step, s.tune),
                  network="transformer")  # fmt: skip


def _schedules(s: Setting) -> Iterator[Row]:
    for schedule in (p.OneShot(), p.Linear(), p.Cubic(), p.Exponential(), p.Listed(values=(0.8, 0.9, 0.95)),
                     p.Percentile(percent=0.45)):  # fmt: skip
        sparsity = None if schedule.final is not None else 0.95
        step = weights(schedule=schedule, sparsity=sparsity, epochs=s.longer, every=s.every)
        yield Row(id=schedule.name, what=WHILE, steps=(step,))
    step = weights(schedule=p.Cubic(), epochs=s.longer, every=s.every)
    yield Row(id="prune.prune", what="cubic, global", steps=(step,))
    for regrowth in (p.MomentumRegrowth(), p.GradientRegrowth()):
        yield Row(id=regrowth.name, what="cubic, 30 % exchanged at each update",
                  steps=(step.replace(regrow=0.3, regrowth=regrowth),))  # fmt: skip


def _trained(s: Setting) -> Iterator[Row]:
    """What becomes sparse by training. Gates and scales move slowly: in fewer than eight epochs, or at slimming's
    default strength, most stay as they are on these few steps."""
    epochs, what = max(8, s.longer), "while training, eight epochs"
    for network, penalty in (
        ("plain", p.L1()), ("plain", p.Growing(sparsity=0.9)), ("plain", p.HardConcrete()), ("conv", p.GroupLasso()),
        ("conv", p.Slimming(strength=0.01)),
    ):  # fmt: skip
        step = p.Regularize(penalty=penalty, epochs=epochs)
        yield Row(id=penalty.name, what=what, steps=(step,), network=network)
    lasso = p.Regularize(penalty=p.GroupLasso(), epochs=epochs)
    yield Row(id="prune.regularize", what="group lasso, then half of the channels", network="conv",
              steps=(lasso, channels(), s.tune))  # fmt: skip
    for rule in (p.TargetedDropout(sparsity=0.9), p.VariationalDropout()):
        yield Row(id=rule.name, what=what, steps=(p.Dropout(rule=rule, epochs=epochs),))
    units = p.Dropout(rule=p.TargetedDropout(of="units"), epochs=epochs)
    yield Row(id="prune.dropout", what="targeted, half of the units", steps=(units,))
    backward = p.Backward(epochs=s.longer, simplify=0.02)
    yield Row(id="prune.backward", what="10 % of the gradients, rare units masked", steps=(backward,))
    causal = p.Causality(samples=500, tolerance=0.01)
    yield Row(id="prune.causality", what="1 % of 500 answers, then fine-tuned", steps=(causal, s.tune), network="conv")


def squared(output: Tensor, target: Tensor) -> Tensor:
    """The squared error of the probabilities."""
    return F.mse_loss(output.softmax(1), F.one_hot(target, output.shape[1]).float())


def _before(s: Setting) -> Iterator[Row]:
    """Before training: these start from fresh values and get the epochs of the dense network and the fine-tuning."""
    for connections in (p.Snip(), p.Grasp(), p.SynFlow()):
        step = p.LossPrune(connections=connections, sparsity=0.95, epochs=s.longer + s.epochs, lr=2e-3)
        yield Row(id=connections.name, what="before training", steps=(step,))
    loss = p.CompositeLoss({"cross-entropy": (1.0, F.cross_entropy), "again": (0.5, F.cross_entropy),
                            "squared": (1.0, squared)})  # fmt: skip
    step = p.LossPrune(sparsity=0.95, terms=0.99, epochs=s.longer + s.epochs, lr=2e-3)
    yield Row(id="prune.loss-prune", what="SNIP on a composite loss, redundant terms dropped", steps=(step,), loss=loss)


def _share(s: Setting) -> Iterator[Row]:
    for init in ("linear", "density", "random"):
        step = KMeans(bits=4, init=init)
        yield Row(id="share.kmeans", what=f"Lloyd, {init} initialisation, no training", steps=(step,))
    exact = KMeans(bits=4, algorithm="exact")
    yield Row(id="share.kmeans", what="exact, no training", steps=(exact,))
    yield Row(id="share.kmeans", what="exact, centroids fine-tuned", steps=(exact, s.tune))
    yield Row(id="share.kmeans", what="one codebook for all layers", steps=(KMeans(bits=4, group="all"),))


def _quantize(s: Setting) -> Iterator[Row]:
    """Weights alone, inputs beside 8-bit weights, ranges without training, and what is done around them."""
    plain: list[tuple[q.WeightQuantizer, int]] = [
        (q.Affine(), 4), (q.FixedPoint(), 8), (q.QAT(), 4), (q.LSQ(), 2), (q.SAWB(), 2), (q.DoReFa(), 2),
        (q.Relaxed(), 4), (q.PowerOfTwo(), 4), (q.Log(), 4), (q.APoT(), 4), (q.LQNet(), 2), (q.Quantile(), 3),
        (q.Levels(), 3), (q.Binary(), 1), (q.BinaryStochastic(), 1), (q.BWN(), 1), (q.BSFixed(), 1), (q.Ternary(), 2),
        (q.TernaryBernoulli(), 2), (q.TWN(), 2), (q.TTQ(), 2), (q.LAB(), 1), (q.LAT(), 2), (q.LAQ(), 3), (q.Inq(), 3),
        (q.Admm(), 2), (q.Elq(), 2), (q.LrNet(), 2), (q.ValueAware(), 3),
    ]  # fmt: skip
    for method, bits in plain:
        step = q.Quantize(weights=method, bits=bits, epochs=s.longer)
        yield Row(id=method.name, what=f"weights in {bits} bits, ends in 8, while training", steps=(step,))
    for solver in (q.GPTQ(batches=4), q.AdaRound(iterations=500)):
        step = q.Quantize(weights=solver, bits=3)
        yield Row(id=solver.name, what="weights in 3 bits, ends in 8, no training", steps=(step,))
    yield Row(id="quantize.half", what="fp16, no training", steps=(q.Quantize(weights=q.Half()),))
    inputs: list[tuple[q.ActivationQuantizer, int, str]] = [
        (q.AffineInput(), 4, "conv"), (q.FixedPointInput(), 8, "conv"), (q.QATInput(), 4, "conv"),
        (q.LSQInput(), 2, "conv"), (q.PACT(), 4, "conv"), (q.DoReFaInput(), 4, "conv"), (q.RelaxedInput(), 4, "conv"),
        (q.LogInput(), 4, "conv"), (q.APoTInput(), 4, "conv"), (q.LQNetInput(), 2, "conv"), (q.HWGQ(), 2, "conv"),
        (q.ValueAwareInput(), 3, "conv"), (q.HalfInput(), 16, "conv"), (q.BinaryInput(), 1, "signed"),
        (q.XNORInput(), 1, "signed"),
    ]  # fmt: skip
    for method, bits, network in inputs:
        weights_part = q.BWN() if bits == 1 else q.Affine()
        step = q.Quantize(
            weights=weights_part, bits=1 if bits == 1 else 8, activations=method, activation_bits=bits, epochs=s.longer
        )
        what = f"inputs in {bits} bits, weights in {1 if bits == 1 else 8}, while training"
        yield Row(id=method.name, what=what, steps=(step,), network=network)
    for observer in (q.MinMax(), q.Ema(), q.Percentile(), q.Mse(), q.Entropy()):
        step = q.Quantize(
            weights=q.Affine(observer=observer), bits=4, activations=q.AffineInput(observer=observer),
            activation_bits=4,
        )  # fmt: skip
        yield Row(id=observer.name, what="weights and inputs in 4 bits, no training", steps=(step,), network="conv")
    low = q.Quantize(weights=q.DoReFa(), bits=2, activations=q.LSQInput(), activation_bits=2, epochs=max(4, s.longer))
    yield Row(id="quantize.quantize", what="2 bits, while training", steps=(low,), network="conv")
    for scheme in (q.TwoStage(), q.Progressive(), q.Guided(), q.ValueAwareMemory()):
        yield Row(
            id=scheme.name, what="2 bits, while training", steps=(low.replace(schemes=(scheme,)),), network="conv"
        )
    for bits in (8, 4):
        flowing = q.Quantize(
            weights=None, gradients=q.GradientQuantization(), gradient_bits=bits, errors=q.ErrorQuantization(),
            error_bits=bits, epochs=s.longer,
        )  # fmt: skip
        for part in ("quantize.gradient-quantization", "quantize.error-quantization"):
            yield Row(id=part, what=f"gradients and errors in {bits} bits", steps=(flowing,), network="conv")
    rounded = q.Quantize(bits=3)
    yield Row(id="quantize.equalise", what="then 3 bits, no training", steps=(q.Equalise(), rounded), network="conv")
    yield Row(id="quantize.bias-correction", what="after 3 bits, no training", steps=(rounded, q.BiasCorrection()),
              network="conv")  # fmt: skip
    eight = q.Quantize(activations=q.AffineInput())
    yield Row(id="quantize.smoothquant", what="then 8 bits, no training", steps=(q.SmoothQuant(), eight),
              network="transformer")  # fmt: skip
    yield Row(id="quantize.ptq-int8", what="no training", steps=(q.PTQInt8(),), network="conv")
    yield Row(id="quantize.mixed-bits", what="4 bits on average, no training", steps=(q.MixedBits(budget=4.0),),
              network="conv")  # fmt: skip


def _files(s: Setting) -> Iterator[Row]:
    sparse = (weights(schedule=p.Cubic(), epochs=s.longer, every=s.every), KMeans(bits=4), s.tune)
    for coder in ("adaptive", "rans", "huffman", "packed"):
        file = FileOptions(coders=(coder,))
        yield Row(id=f"encode.{coder}", what="pruned 95 %, 4 bits", steps=sparse, file=file)
    yield Row(id="encode.planes", what="fp32, nothing changed", steps=(t.Finetune(epochs=1, lr=1e-6),),
              file=FileOptions(floats="fp32"))  # fmt: skip
    recipe = DeepCompression(strength=0.7)
    recipe = recipe.replace(prune=recipe.prune.replace(epochs=s.longer), finetune=s.tune)
    yield Row(id="recipes.deep-compression", what="strength 0.7", steps=(recipe,))


def _training(s: Setting) -> Iterator[Row]:
    base = weights(schedule=p.Cubic(), epochs=s.longer, every=s.every)
    variants: list[tuple[str, dict[str, Any]]] = [
        ("train.adamw", {"optimizer": t.AdamW()}), ("train.sgd", {"optimizer": t.SGD(), "lr": 0.05}),
        ("train.constant", {"lr_schedule": t.Constant()}), ("train.linear", {"lr_schedule": t.Linear()}),
        ("train.step", {"lr_schedule": t.Step()}), ("train.cosine", {"lr_schedule": t.Cosine()}),
        ("train.one-cycle", {"lr_schedule": t.OneCycle()}), ("train.l1", {"penalties": (t.L1(strength=3e-5),)}),
        ("train.l2", {"penalties": (t.L2(strength=1e-5),)}),
        ("train.label-smoothing", {"smoothing": t.LabelSmoothing()}),
        ("train.early-stopping", {"stopping": t.EarlyStopping()}), ("train.shift", {"augment": (t.Shift(pixels=1),)}),
        ("train.crop", {"augment": (t.Crop(padding=1),)}), ("train.flip", {"augment": (t.Flip(),)}),
    ]  # fmt: skip
    for name, fields in variants:
        yield Row(id=name, what="in the pruning step (cubic, 95 %)", steps=(base.replace(**fields),))
    yield Row(id="train.finetune", what="the trained network, further", steps=(s.tune,))
    yield Row(id="train.batch-norm", what="network with batch norm, after pruning", network="normed",
              steps=(weights(), t.BatchNorm()))  # fmt: skip
