r"""Autoencoder of a layer: what comes out is coded in few numbers, and the coder becomes a part of the layer.

Paper    Zhang, Zou, He, Sun. Accelerating Very Deep Convolutional Networks for Classification and Detection. TPAMI
         2016. arXiv:1505.06798 (linear, of the outputs). Baldi, Hornik. Neural Networks and Principal Component
         Analysis: Learning from Examples without Local Minima. Neural Networks 2, 1989 (its optimum is the PCA).
         Bourlard, Kamp. Auto-association by Multilayer Perceptrons and Singular Value Decomposition. Biological
         Cybernetics 59, 1988 (nor is it better with non-linear codes and a linear decoder)
Formula  min E || y - D E y - d ||^2 over the outputs y = W x + b: P_r = leading vectors of Cov(y), E = P_r^T, D = P_r;
         first layer P_r^T W, last layer P_r with the bias mu + P_r P_r^T (b - mu)
         of="weight": min || W - D E W ||^2;   hidden="relu": D relu(C E y + c) + d, fitted by gradient descent
Departs  The linear optimum is computed, not trained; that of the weight is its SVD. The form with a ReLU has it in a
         decoder of two layers, twice as many units as codes, and as many numbers in all as the linear form; it begins
         at the PCA and stays only where it is better on outputs that it has not seen. Layers do not make up for the
         errors of those before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.core.context import Context
from espalier.core.fields import Batches, Count, Epochs
from espalier.core.task import Task
from espalier.factorize.factorization import Factorization
from espalier.factorize.layer import Layer
from espalier.factorize.split import Factors, Pair, Ranks, Split, Unfolding, flat
from espalier.factorize.stages import Spec
from espalier.factorize.statistics import Outputs, outputs_of
from espalier.train import AdamW, Cosine, fit

HELD_OUT, BATCH, RATE = 5, 128, 0.03
"""One sample of so many is held out; the size of a batch; the learning rate on outputs of unit variance."""


class Coded(Pair):
    """The outputs in the coordinates of their principal components."""

    def __init__(self, layer: Layer, seen: Outputs, method: Autoencoder) -> None:
        super().__init__(layer, flat(layer), grow_macs=method.grow_macs)
        self.seen, self.method = seen, method
        self.codes = 0  # of the form with a ReLU, where it stays

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Variances (groups, outputs) and components (groups, outputs, outputs) of each group's outputs."""
        groups, outputs = self.matrices.shape[:2]
        blocks = self.seen.covariance.reshape(groups, outputs, groups, outputs)
        values, vectors = torch.linalg.eigh(torch.stack([blocks[group, :, group] for group in range(groups)]))
        return values.flip(-1).clamp(min=0), vectors.flip(-1)

    @property
    def limits(self) -> Ranks:
        return (self.matrices.shape[1],)

    @cached_property
    def unfoldings(self) -> tuple[Unfolding, ...]:
        return (Unfolding((self.eigen[0] * self.seen.count).sqrt(), (self.matrices.shape[1], self.seen.count)),)

    @property
    def has_bias(self) -> bool:
        return True

    def specs(self, ranks: Ranks) -> list[Spec]:
        return self._relu_specs(self.codes) if self.codes else super().specs(ranks)

    def _relu_specs(self, codes: int) -> list[Spec]:
        first, last = super().specs((codes,))
        hidden = self.layer.stage(codes, 2 * codes, bias=True)
        last = self.layer.stage(2 * codes, self.layer.outputs, bias=True)
        return [first, hidden, {"class": "ReLU", "args": {}}, last]

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        components = self.eigen[1][..., :rank].to(self.matrices.dtype)
        codes = components.mT @ self.matrices
        size = codes.norm(dim=2, keepdim=True).sqrt().clamp(min=1e-6)  # evenly on both layers
        return components * size.mT, codes / size

    def bias_of(self, rank: int) -> Tensor:
        """mu + P P^T (b - mu)."""
        mean, components = self.seen.mean, self.eigen[1][..., :rank]
        bias = torch.zeros_like(mean) if self.layer.bias is None else self.layer.bias.to(mean)
        off = (bias - mean).reshape(len(components), -1, 1)
        back = (components @ (components.mT @ off)).reshape(-1)
        return (mean + back).to(self.matrices.dtype)

    def factors(self, ranks: Ranks, context: Context) -> Factors:
        left, right = self.pair(ranks[0])
        made = Factors((right, self.rows(left)), {1: self.bias_of(ranks[0])}, self.product(left, right))
        if self.method.hidden != "relu" or self.layer.groups > 1:
            return made
        return self._with_relu(ranks, made, context)

    def _with_relu(self, ranks: Ranks, linear: Factors, context: Context) -> Factors:
        """The form with a ReLU where it is better on held-out outputs, else ``linear``."""
        allowed, mean = self.cost(ranks).parameters, self.seen.mean.float()
        codes = max(
            (k for k in range(1, ranks[0] + 1) if self.layer.cost(self._relu_specs(k)).parameters <= allowed), default=0
        )
        if not codes:
            return linear
        y = torch.cat(self.seen.samples).float() - mean
        scale = float(y.square().mean().sqrt().clamp(min=1e-12))
        y = y / scale
        held = torch.arange(len(y)) % HELD_OUT == 0
        components = self.eigen[1][0].float()
        coder = relu_coder(components[:, :codes])
        inner = replace(context, task=Task(train=_batches(y[~held], context, self.name), loss=F.mse_loss))
        fit(
            coder, inner, epochs=self.method.passes, optimizer=AdamW().over(coder, RATE), schedule=Cosine(),
            name=f"relu-{self.name}",
        )  # fmt: skip
        with torch.no_grad():
            unseen, kept = y[held], components[:, : ranks[0]]
            errors = [float(F.mse_loss(made, unseen)) for made in (unseen @ kept @ kept.T, coder(unseen))]
        better = errors[1] < errors[0]
        facts = {"hidden": "relu" if better else "linear", "held_out": {"pca": errors[0], "relu": errors[1]}}
        if not better:
            return replace(linear, facts=facts)
        self.codes = codes
        E, C, c, D, d = (parameter.detach() for parameter in coder.parameters())
        bias = torch.zeros_like(mean) if self.layer.bias is None else self.layer.bias.float()
        first = (E / scale) @ self.matrices[0].float()
        biases = {1: C @ (E @ ((bias - mean) / scale)) + c, 2: d * scale + mean}
        return Factors((first, C, D * scale), biases, None, {**facts, "codes": codes})


def relu_coder(components: Tensor) -> nn.Sequential:
    """D relu(C E y + c) + d that begins at the PCA: z = relu(z) - relu(-z). ``components``: (outputs, codes)."""
    outputs, codes = components.shape
    coder = nn.Sequential(
        nn.Linear(outputs, codes, bias=False), nn.Linear(codes, 2 * codes), nn.ReLU(), nn.Linear(2 * codes, outputs)
    )
    same = torch.eye(codes)
    start = (components.T, torch.cat([same, -same]), torch.zeros(2 * codes), torch.cat([components, -components], 1))
    with torch.no_grad():
        for parameter, value in zip(coder.parameters(), (*start, torch.zeros(outputs)), strict=True):
            parameter.copy_(value)
    return coder.to(components.device)


def _batches(y: Tensor, context: Context, name: str) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(y), generator=context.generator(name)).to(y.device)
    return [(part, part) for part in torch.split(y[order], BATCH)]


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Factorization):
    """``of``: the outputs on ``batches`` training batches, or the weight, without data; so where they are too few.

    ``hidden="relu"`` is fitted in ``passes`` over ``samples`` outputs of each layer; a convolution with groups stays
    linear.
    """

    id: ClassVar[str] = "autoencoder"
    of: Literal["outputs", "weight"] = "outputs"
    hidden: Literal["linear", "relu"] = "linear"
    batches: Batches = 8
    samples: Count = 4096
    passes: Epochs = 50

    def conflicts(self) -> list[str]:
        """A ReLU codes outputs, of which there must be some."""
        found = super().conflicts()
        if self.hidden == "relu" and self.of == "weight":
            found.append("hidden='relu' codes outputs; of='weight' has none")
        if self.hidden == "relu" and not (self.samples and self.passes):
            found.append("hidden='relu' is fitted: samples and passes must be above 0")
        return found

    @property
    def needs(self) -> frozenset[str]:
        """Outputs to code."""
        return super().needs | ({"train"} if self.of == "outputs" else set())

    def look(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> Any:
        """Name -> the outputs."""
        if self.of == "weight":
            return {}
        seen = [layer for layer in layers if not layer.embedding]
        return outputs_of(model, seen, context, self.batches, self.samples if self.hidden == "relu" else 0)

    def split(self, layer: Layer, seen: Any, context: Context) -> Split | str:
        """One rank."""
        if self.of == "weight":
            return Pair(layer, flat(layer), grow_macs=self.grow_macs)
        if layer.embedding:
            return "what comes out of a table are its rows: factorize.svd splits it"
        if layer.name not in seen:
            return "nothing came out on the training batches: of='weight' splits it without data"
        count, outputs = seen[layer.name].count, flat(layer).shape[1]
        if count <= outputs:
            context.note(
                f"{layer.name}: {count} outputs do not show how {outputs} units vary together; its weight is coded, as "
                "by of='weight'. Give more batches."
            )
            return Pair(layer, flat(layer), grow_macs=self.grow_macs)
        return Coded(layer, seen[layer.name], self)
