"""The models of the channel-pruning comparison: names from ``torchvision.txt`` and ``timm.txt``, built here.

They need an environment of their own (``benchmarks/zoo_requirements.txt`` says how to make it). Weights are random:
pruning must be exact whatever they are, and nothing is downloaded.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
LISTS = ("torchvision", "timm")
BATCH = 2
QUICK = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/squeezenet1_1",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/densenet121",
    "torchvision/lraspp_mobilenet_v3_large",
    "timm/vit_tiny_patch16_224",
    "timm/regnety_004",
    "timm/ghostnet_100",
    "timm/poolformer_s12",
    "timm/repvgg_a0",
    "timm/edgenext_xx_small",
)
_LIBRARY: list[torch.library.Library] = []


def names(group: str) -> list[str]:
    """``torchvision/resnet18`` and so on: every model of ``group``."""
    lines = (HERE / f"{group}.txt").read_text().splitlines()
    return [f"{group}/{line.strip()}" for line in lines if line.strip() and not line.startswith("#")]


def import_libraries() -> None:
    """Import torchvision and timm beside the CPU build of torch.

    The registry's torchvision is built for CUDA; beside the CPU build its compiled operators do not load and
    its import fails on two that were never declared. Declaring them is enough for all models but detection.
    """
    if not _LIBRARY:
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for schema in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
            _LIBRARY[0].define(schema)
    import torchvision  # noqa: F401


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The model ``name`` in eval mode with random weights and statistics, and an example batch of 2."""
    import_libraries()
    group, _, plain = name.partition("/")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, size = _torchvision(plain) if group == "torchvision" else _timm(plain)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    return model, torch.randn(BATCH, 3, size, size, generator=generator)


def _torchvision(name: str) -> tuple[nn.Module, int]:
    from torchvision import models

    extra: dict[str, Any] = {"weights": None}
    if "segmentation" in models.get_model_builder(name).__module__:
        extra |= {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):  # a second head serves training only; default weights cost a minute
        extra |= {"aux_logits": False, "init_weights": False}
    return models.get_model(name, **extra), 256 if name.startswith("swin_v2") else 224


def _timm(name: str) -> tuple[nn.Module, int]:
    import timm

    model = timm.create_model(name, pretrained=False)
    size = int(model.default_cfg["input_size"][-1])
    return model, min(size, 256)


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random statistics, and random values wherever an initialisation is constant (all 0, all 1, all 1e-6).

    Otherwise a residual branch that starts at zero would hide what pruning did to it.
    """
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.copy_(torch.randn(mean.shape, generator=generator) * 0.1)
            variance.copy_(torch.rand(variance.shape, generator=generator) + 0.5)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def first_tensor(output: Any) -> Tensor:
    """The main result of a model (segmentation models return a dict)."""
    from torch.utils import _pytree

    return next(leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def relative(actual: Any, expected: Any) -> float:
    """Largest absolute difference of two outputs over the largest magnitude; infinite where the shapes differ."""
    from torch.utils import _pytree

    left, right = (
        [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (actual, expected)
    )
    if [x.shape for x in left] != [x.shape for x in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        gap, scale = float((a - b).abs().max()), float(b.abs().max())
        worst = max(worst, gap / max(scale, 1e-12) if gap == gap else float("inf"))  # noqa: PLR0124 - NaN
    return worst
