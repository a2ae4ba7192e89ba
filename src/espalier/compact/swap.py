r"""Swapping a trained layer for a compact block that starts from it and is regressed on its inputs and outputs.

Paper    Guo, Li, Lin, Chen, Li. Network Decoupling: From Regular to Depthwise Separable Convolutions. BMVC 2018.
         arXiv:1808.05517 (the start). Zhang, Zou, He, Sun. Accelerating Very Deep Convolutional Networks for
         Classification and Detection. TPAMI 2016. arXiv:1505.06798 (the regression, layer after layer)
Formula  min_theta sum || f_theta(x^) - y ||^2,   y = outputs of the layer in the model as it came, x^ = its inputs now
         that the layers before are swapped
Departs  The regression is least squares for the block's last layer and Adam for all of it, in place of the papers'
         decompositions, as blocks may hold activations. Errors are judged on every fifth sample, which is not fitted
         on. Of large inputs a random part is kept, 2^26 numbers per layer in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.compact.depthwise_separable import DepthwiseSeparable
from espalier.compact.feature_maps import feature_maps
from espalier.compact.parts import LAYERS, Block, Layer
from espalier.compact.regression import Pairs, regress
from espalier.compact.seen import seen
from espalier.compact.starting import settle
from espalier.core.context import Context
from espalier.core.edits import Replace, put_module
from espalier.core.errors import EspalierError
from espalier.core.fields import Batches, Count, Epochs, Group, LearningRate
from espalier.core.model import copy_model
from espalier.core.parametrize import Slot, require_phase, slots
from espalier.core.plan import Plan
from espalier.core.selection import select
from espalier.core.spec import outline_of
from espalier.train import Training
from espalier.train.layers import in_order
from espalier.train.looking import batches, looking

SEEN = 64
"""Samples by which scales and shifts inside a block are set."""


@dataclass(frozen=True, kw_only=True)
class Swap(Training):
    """Every layer of ``layers`` that ``block`` can stand for with fewer weights, in the order the model runs them.

    ``batches`` of train data are looked at. ``least_squares`` solves the last layer of each block; ``regression`` steps
    of Adam, at ``regression_lr`` on ``samples`` at a time, train all of it. With ``epochs`` the whole model is
    fine-tuned at the end.
    """

    id: ClassVar[str] = "swap"
    epochs: Epochs = 0
    block: Block = field(default_factory=DepthwiseSeparable)
    layers: tuple[str, ...] = ("*",)
    batches: Batches = 8
    least_squares: bool = True
    regression: Count = 200
    regression_lr: LearningRate = 1e-2
    samples: Group = 32
    densify: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """Data to regress on."""
        return super().needs | {"train"}

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Swap layer after layer, then fine-tune."""
        chosen = self._chosen(model, context)
        rows: list[dict[str, Any]] = context.record.details.setdefault("swapped", [])
        if chosen:
            before = copy_model(model)
            order = [slot.path for slot in in_order(model, [slot for slot, _ in chosen.values()], context)]
            for number, path in enumerate(order):
                context.progress("layers", number, len(order))
                row = self._swap(model, before, path, chosen[path][1], context)
                rows += [row] if row else []
        if self.epochs and rows:
            self.train(model, context)
        return model

    def _chosen(self, model: nn.Module, context: Context) -> dict[str, tuple[Slot, Layer]]:
        """The layers to swap, by path; the others are skipped with a reason."""
        known = slots(model)
        maps: Mapping[str, tuple[int, ...]] = feature_maps(model, context) if self.block.reads_map else {}
        found: dict[str, tuple[Slot, Layer]] = {}
        for slot in select(model, self.layers, who=self.name):
            reason = _obstacle(slot, known)
            if not reason:
                layer = Layer.of(slot.module, maps.get(slot.path))
                reason = self.block.refusal(layer)
            if not reason:
                size = _numbers(outline_of(self.block.spec(layer)))
                if size >= layer.elements:
                    reason = f"the block would hold {size} numbers, the layer has {layer.elements}"
            if reason:
                context.skip(slot.name, f"not swapped for {self.block.id}: {reason}")
                continue
            require_phase(slot, ("dense",), self.name, densify=self.densify)
            found[slot.path] = slot, layer
        return found

    def _swap(
        self, model: nn.Module, before: nn.Module, path: str, layer: Layer, context: Context
    ) -> dict[str, Any] | None:  # fmt: skip
        """Put a block at ``path``; returns its row of the record, or None where the layer is left alone."""
        old: Any = model.get_submodule(path)
        pairs = seen(model, before, path, context, self.batches)
        reason = _reads_more(model, path, context) if pairs is not None else "the model does not call it as a module"
        if pairs is None or reason:
            context.skip(f"{path}.weight", f"not swapped for {self.block.id}: {reason}")
            return None
        weight = old.weight.detach()
        bias = old.bias.detach() if old.bias is not None else None
        spec = self.block.spec(layer)
        with context.forked(f"block at {path}"):
            model = Plan((Replace(path=path, spec=spec),)).apply(model)
        block = model.get_submodule(path).to(device=weight.device)
        rng = context.generator(f"regression of {path}")
        pairs = Pairs(pairs.x.to(weight.device), pairs.y.to(weight.device))
        if len(pairs) < 2:
            context.note(f"{path}: one sample is too few to fit to; its block stays as it starts.")
        if self.least_squares and len(layer.kernel) == 3:
            context.note(f"{path}: least squares solve no Conv3d; only the steps of Adam fit its block.")
        self.block.start(block, layer, weight, bias, rng)
        settle(block, pairs.x[:SEEN])
        first, last = regress(
            block, pairs, least_squares=self.least_squares, steps=self.regression, lr=self.regression_lr,
            samples=self.samples, rng=rng, tell=partial(context.progress, f"regression of {path}"),
        )  # fmt: skip
        if last >= 1 and not self.epochs:
            context.warn(
                f"{path}: {self.block.id} misses {last:.3g} times the variance of the outputs on samples that it was "
                "not fitted on, more than their mean would; give more data or regression, or leave the layer out."
            )
        return {
            "layer": path,
            "block": self.block.id,
            "numbers": [layer.elements, _numbers(block)],
            "error": {"start": first, "regressed": last},
        }


def _obstacle(slot: Slot, known: Mapping[str, Slot]) -> str:
    """Why a layer must stay as it is, whatever the block; empty where nothing speaks against it."""
    module, (path, _, attribute) = slot.module, slot.owners[0]
    kind = type(module).__name__.removeprefix("Parametrized")
    plain = {cls.__name__: cls for cls in LAYERS}.get(kind)
    if attribute != "weight" or plain is None or not isinstance(module, plain):
        return f"blocks stand for Linear, Conv1d, Conv2d and Conv3d; this is {attribute} of a {kind}"
    bias = known.get(f"{path}.bias")
    if len(slot.owners) > 1 or (bias is None) != (module.bias is None) or (bias is not None and len(bias.owners) > 1):
        return "its parameters have other owners too"
    if not path:
        return "it is the whole model"
    if not slot.latent.requires_grad:
        return "it is frozen"
    if slot.latent.dtype != torch.float32:
        return f"its weight is {str(slot.latent.dtype).removeprefix('torch.')}; blocks are built in float32"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it carries hooks, which a block would not have"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding == "same" and uneven(module):
        return "it puts more padding on one side than on the other"
    return ""


def _numbers(block: nn.Module) -> int:
    """How many numbers a file stores for a block: statistics of batch norms go into their weights and biases."""
    return sum(parameter.numel() for parameter in block.parameters())


def uneven(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether a padding that keeps the size must be larger on one side."""
    return any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))


def _reads_more(model: nn.Module, path: str, context: Context) -> str:
    """Why the model needs the very layer at ``path``; empty where it only calls it. Tried on one batch."""
    layer = model.get_submodule(path)
    put_module(model, path, nn.Sequential(layer))
    try:
        with looking(model, context, grad=False):
            for batch in batches(model, context, 1, f"the model without {path}"):
                context.data.predict(model, batch)
    except EspalierError:
        raise
    except Exception as error:
        return f"the model reads more of it than its output ({type(error).__name__}: {error})"
    finally:
        put_module(model, path, layer)
    return ""
