"""A data set by name, split and ready to train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from espalier.core.errors import UnknownNameError, did_you_mean
from espalier.data.cifar import locate_cifar10, read_cifar10
from espalier.data.digits import digits
from espalier.data.files import Progress
from espalier.data.idx import fashion_mnist, mnist
from espalier.data.images import Images, Normalisation, Size
from espalier.data.loader import Loader
from espalier.data.sources import SOURCES

EVALUATION_BATCH = 1000
Parts = tuple[Images, Images, Images]


@dataclass(frozen=True)
class Splits:
    """Three loaders, the class names, the shape ``(C, H, W)`` of one image, the normalisation, and what was read."""

    train: Loader
    val: Loader
    test: Loader
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    normalisation: Normalisation
    source: str


def standard(
    name: str,
    folder: str | Path | None = None,
    *,
    seed: int = 0,
    batch_size: int = 128,
    val: Size | None = None,
    variant: str = "auto",
    normalisation: Normalisation | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Splits:
    """``digits``, ``mnist``, ``fashion-mnist`` or ``cifar10`` (``variant``: see ``cifar10``) as seeded splits.

    ``val``: a count or a fraction. Default: digits 20 % (and 20 % test), else 5,000 of the training images; JPEG
    CIFAR-10 half of the test images (then ``val`` is taken from them). Only ``train`` is shuffled. Raises
    ``DataError``, ``NeedError`` (a reader's package is missing), ``UnknownNameError``.
    """
    known = name.lower().replace("_", "-").replace("cifar-10", "cifar10")
    if known not in SOURCES:
        raise UnknownNameError(f"no data set {name!r}.{did_you_mean(known, SOURCES)}")
    source, title = SOURCES[known], SOURCES[known].title
    if known == "digits":
        parts = _split_digits(val, seed)
    elif known == "cifar10":
        parts, title = _split_cifar10(folder, variant, val, seed, download=download, progress=progress)
    else:
        reader: Callable[..., tuple[Images, Images]] = mnist if known == "mnist" else fashion_mnist
        train, test = reader(folder, download=download, progress=progress)
        parts = (*_hold_out(train, val, seed), test)
    scale = normalisation or source.normalisation
    train, held, test = parts
    return Splits(
        Loader.of(train, batch_size=batch_size, shuffle=True, normalisation=scale),
        Loader.of(held, batch_size=EVALUATION_BATCH, normalisation=scale),
        Loader.of(test, batch_size=EVALUATION_BATCH, normalisation=scale),
        source.classes,
        train.shape,
        scale,
        title,
    )


def _hold_out(train: Images, val: Size | None, seed: int) -> tuple[Images, Images]:
    rest, held = train.split(-1, 5000 if val is None else val, seed=seed)
    return rest, held


def _split_digits(val: Size | None, seed: int) -> Parts:
    train, held, test = digits().split(-1, 0.2 if val is None else val, 0.2, seed=seed)
    return train, held, test


def _split_cifar10(
    folder: str | Path | None,
    variant: str,
    val: Size | None,
    seed: int,
    *,
    download: bool,
    progress: Progress | None,
) -> tuple[Parts, str]:
    found, path = locate_cifar10(folder, variant, download=download, progress=progress)
    train, test = read_cifar10(found, path, progress)
    title = f"{SOURCES['cifar10'].title} ({found})"
    if found == "jpeg":  # decisions on images of the same kind that no network was trained on
        held, test = test.split(0.5 if val is None else val, -1, seed=seed)
        return (train, held, test), title
    return (*_hold_out(train, val, seed), test), title
