"""The data sets espalier knows: where they lie in a folder, where they are published, what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from espalier.core.errors import DataError
from espalier.data.images import Normalisation

ENVIRONMENT = "ESPALIER_DATA"


@dataclass(frozen=True)
class Remote:
    """One published file: its name, length in bytes, SHA-256, and the URLs that serve it."""

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set. ``places``: the folders below the user's in which it is looked for; downloads go to the first.

    ``normalisation``: the mean and standard deviation of the training images on the scale 0..1, as usually published.
    ``labels_sha256`` (of the unpacked training labels) tells apart data sets that share their file names.
    """

    title: str
    places: tuple[str, ...]
    files: tuple[Remote, ...]
    classes: tuple[str, ...]
    normalisation: Normalisation
    labels_sha256: str = ""


def _mirrored(bases: tuple[str, ...], files: Mapping[str, tuple[int, str]]) -> tuple[Remote, ...]:
    return tuple(
        Remote(name, size, sha256, tuple(base + name for base in bases)) for name, (size, sha256) in files.items()
    )


DIGIT_CLASSES = tuple(str(digit) for digit in range(10))

SOURCES: dict[str, Source] = {
    "digits": Source(
        title="the scikit-learn digits",
        places=(),
        files=(),
        classes=DIGIT_CLASSES,
        normalisation=Normalisation((0.3053,), (0.3759,)),
    ),
    "mnist": Source(
        title="MNIST",
        places=("mnist", "MNIST/raw", "."),
        files=_mirrored(
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
            {
                "train-images-idx3-ubyte.gz": (
                    9_912_422,
                    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                ),
                "train-labels-idx1-ubyte.gz": (
                    28_881,
                    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    1_648_877,
                    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                ),
                "t10k-labels-idx1-ubyte.gz": (
                    4_542,
                    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
                ),
            },
        ),
        classes=DIGIT_CLASSES,
        normalisation=Normalisation((0.1307,), (0.3081,)),
        labels_sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "fashion-mnist": Source(
        title="Fashion-MNIST",
        places=("fashion_mnist", "fashion-mnist", "FashionMNIST/raw", "."),
        files=_mirrored(
            (
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            ),
            {
                "train-images-idx3-ubyte.gz": (
                    26_421_880,
                    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                ),
                "train-labels-idx1-ubyte.gz": (
                    29_515,
                    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                ),
                "t10k-images-idx3-ubyte.gz": (
                    4_422_102,
                    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                ),
                "t10k-labels-idx1-ubyte.gz": (
                    5_148,
                    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
                ),
            },
        ),
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        normalisation=Normalisation((0.2860,), (0.3530,)),
        labels_sha256="bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "cifar10": Source(
        title="CIFAR-10",
        places=("cifar10", "cifar-10", "CIFAR10", "."),
        files=_mirrored(
            ("https://www.cs.toronto.edu/~kriz/",),
            {
                "cifar-10-binary.tar.gz": (
                    170_052_171,
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                ),
                "cifar-10-python.tar.gz": (
                    170_498_071,
                    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                ),
            },
        ),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        normalisation=Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
}


def data_folder(folder: str | Path | None, title: str) -> Path:
    """The folder the user named: the argument, else the environment variable. Raises ``DataError`` without either."""
    named = folder if folder is not None else os.environ.get(ENVIRONMENT) or None
    if named is None:
        raise DataError(
            f"{title} needs a data folder and none was named. Give folder=..., --data-dir FOLDER or the environment "
            f"variable {ENVIRONMENT}; with download=True the files are fetched into it."
        )
    return Path(named).expanduser()


def find(source: Source, root: Path, markers: Iterable[str]) -> Path | None:
    """The first of ``markers`` (file names, best first) that exists in one of the source's places."""
    candidates = (root / place / marker for marker in markers for place in source.places)
    return next((path for path in candidates if path.is_file()), None)


def missing(source: Source, root: Path, markers: Iterable[str]) -> DataError:
    """What to tell a user whose folder does not hold a data set."""
    places = ", ".join(str(root / place) for place in source.places)
    there = "" if root.is_dir() else f" ({root} is not a folder)"
    return DataError(
        f"{source.title} was not found{there}: looked for {', '.join(markers)} in {places}. Name the folder that "
        f"holds it with folder=..., --data-dir FOLDER or the environment variable {ENVIRONMENT}, or let "
        "download=True fetch it."
    )
