"""Rows of the compact blocks: each stands for the layers of a trained network that it can, then all is fine-tuned."""

from __future__ import annotations

from benchmarks.methods_parts.row import Row, Setting

import espalier.compact as c

WHAT = "regressed layer by layer, then fine-tuned"
CONV: tuple[c.Block, ...] = (
    c.DepthwiseSeparable(), c.InvertedResidual(expansion=1.0), c.Shuffle(), c.Shuffle(version=1), c.Fire(), c.Ghost(),
    c.Bottleneck(), c.AsymmetricKernels(),
)  # fmt: skip
LARGE: tuple[c.Block, ...] = (c.Stacked3x3(width=0.5), c.Dilated())


def rows(setting: Setting) -> tuple[Row, ...]:
    """3x3 kernels in the CNN, 5x5 ones in LeNet-5, the fully connected layer behind the CNN's maps."""
    found = []
    for network, blocks in (("conv", CONV), ("lenet5", LARGE)):
        for block in blocks:
            layers = ("type:Conv2d",)
            what = f"version 1, {WHAT}" if block == c.Shuffle(version=1) else f"all convolutions, {WHAT}"
            steps = (c.Swap(block=block, layers=layers), setting.tune)
            found.append(Row(id=block.name, what=what, steps=steps, network=network))
    pooled = (c.Swap(block=c.GlobalPooling()), setting.tune)
    found.append(Row(id="compact.global-pooling", what=f"the first linear layer, {WHAT}", steps=pooled, network="conv"))
    for regression, what in ((0, "depthwise separable, least squares alone"), (200, "depthwise separable, regressed")):
        step = c.Swap(layers=("type:Conv2d",), regression=regression)
        found.append(Row(id="compact.swap", what=f"{what}, not fine-tuned", steps=(step,), network="conv"))
    return tuple(found)
