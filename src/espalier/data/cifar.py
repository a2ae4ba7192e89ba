"""CIFAR-10 from its official archives (packed or unpacked) and from .npz files; no pickle is executed.

A. Krizhevsky. Learning multiple layers of features from tiny images. 2009.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.core.errors import DataError, NeedError, UnknownNameError, did_you_mean
from espalier.data.download import fetch
from espalier.data.files import Progress, reading, tar_members
from espalier.data.images import Images
from espalier.data.pickled import parse_pickle
from espalier.data.sources import SOURCES, data_folder, find, missing

Bytes = NDArray[np.uint8]
Labelled = tuple[Bytes, Bytes]  # images (N, 3, 32, 32), labels (N,)

IMAGE = (3, 32, 32)
PIXELS = 3 * 32 * 32
BATCH = 10_000  # images in each official file
MEMBER_LIMIT = 1 << 25  # bytes of one official file; the largest has 31 MB
ARRAY_LIMIT = 1 << 28  # bytes of one array of an .npz


def parse_binary(content: bytes, count: int) -> Labelled:
    """``count`` records of one label byte and 3 x 32 x 32 pixels. Raises ``ValueError``."""
    if len(content) != count * (1 + PIXELS):
        raise ValueError(f"it has {len(content):,} bytes, not {count:,} x {1 + PIXELS}")
    records = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(count, 1 + PIXELS)
    return records[:, 1:].reshape(count, *IMAGE), records[:, 0]


def parse_python(content: bytes, count: int) -> Labelled:
    """A pickled dict with ``data`` uint8 (count, 3072) and ``labels``, read as data. Raises ``ValueError``."""
    batch = parse_pickle(content)
    if type(batch) is not dict:
        raise ValueError("it holds no dict")
    data = batch.get(b"data", batch.get("data"))
    labels = batch.get(b"labels", batch.get("labels"))
    if not isinstance(data, np.ndarray) or data.shape != (count, PIXELS):
        raise ValueError(f"its 'data' is no uint8 array of shape {(count, PIXELS)}")
    if type(labels) is not list or len(labels) != count or not all(type(y) is int and 0 <= y < 10 for y in labels):
        raise ValueError(f"its 'labels' are not {count:,} integers in 0..9")
    return data.reshape(count, *IMAGE).copy(), np.array(labels, dtype=np.uint8)


def decode_jpegs(packed: Bytes, offsets: NDArray[Any], tick: Callable[[int, int], None]) -> Bytes:
    """JPEG ``i`` = ``packed[offsets[i]:offsets[i + 1]]``, to uint8 (N, 3, 32, 32). Raises ``ValueError``.

    ``tick(done, total)`` is called every 500 images. Raises ``NeedError`` without pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise NeedError("JPEG images need pillow, which is missing: pip install 'espalier[images]'.") from error
    bounds = offsets.astype(np.int64)
    if (
        bounds.ndim != 1
        or len(bounds) < 2
        or bounds[0] != 0
        or bounds[-1] != len(packed)
        or (np.diff(bounds) < 1).any()
    ):
        raise ValueError(f"its offsets do not cut its {len(packed):,} bytes into images")
    total = len(bounds) - 1
    images = np.empty((total, 32, 32, 3), dtype=np.uint8)
    for i in range(total):
        try:
            with Image.open(io.BytesIO(packed[bounds[i] : bounds[i + 1]].tobytes()), formats=("JPEG",)) as image:
                if image.size != (32, 32) or image.mode != "RGB":  # known before a pixel is decoded
                    raise ValueError(
                        f"its image {i} is {image.mode} {image.size[0]} x {image.size[1]}, not RGB 32 x 32"
                    )
                images[i] = np.asarray(image)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"its image {i} is damaged: {error}") from error
        if i % 500 == 499 or i + 1 == total:
            tick(i + 1, total)
    return images.transpose(0, 3, 1, 2)


def _contents(found: Path, names: list[str]) -> Iterator[tuple[Path, bytes]]:
    """The named official files, from the archive ``found`` or from the folder it lies in."""
    if found.suffix == ".gz":
        with reading(found, f"the official archive with {names[0]} ... {names[-1]}"):
            members = tar_members(found, names, MEMBER_LIMIT)
        yield from ((found / name, members.pop(name)) for name in names)
        return
    for name in names:
        path = found.parent / name
        with reading(path, f"a CIFAR-10 file of at most {MEMBER_LIMIT:,} bytes"):
            if path.stat().st_size > MEMBER_LIMIT:
                raise ValueError(f"it has {path.stat().st_size:,} bytes")
            content = path.read_bytes()
        yield path, content


def _official(found: Path, suffix: str, parse: Callable[[bytes, int], Labelled]) -> tuple[Labelled, Labelled]:
    names = [f"data_batch_{i}{suffix}" for i in range(1, 6)] + [f"test_batch{suffix}"]
    parts = []
    for path, content in _contents(found, names):
        with reading(path, f"{BATCH:,} CIFAR-10 images with their labels"):
            parts.append(parse(content, BATCH))
    images, labels = (np.concatenate([part[i] for part in parts[:-1]]) for i in (0, 1))
    return (images, labels), parts[-1]


def _binary(found: Path, _: Progress | None) -> tuple[Labelled, Labelled]:
    return _official(found, ".bin", parse_binary)


def _python(found: Path, _: Progress | None) -> tuple[Labelled, Labelled]:
    return _official(found, "", parse_python)


def _arrays(path: Path, keys: tuple[str, ...]) -> list[NDArray[Any]]:
    with reading(path, f"an .npz file with {', '.join(keys)}"):
        with zipfile.ZipFile(path) as archive:
            if any(entry.file_size > ARRAY_LIMIT for entry in archive.infolist()):
                raise ValueError(f"an array in it unpacks to more than {ARRAY_LIMIT:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            loaded = [np.asarray(arrays[key]) for key in keys]
        if any(array.dtype.kind not in "ui" for array in loaded):
            raise ValueError("it holds arrays of other types than integers")
    return loaded


def _lossless(found: Path, _: Progress | None) -> tuple[Labelled, Labelled]:
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    train_x, train_y, test_x, test_y = _arrays(found, keys)
    with reading(found, "uint8 images (N, 32, 32, 3)"):
        for images in (train_x, test_x):
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
                raise ValueError(f"it holds {images.dtype} {images.shape}")
    return (train_x.transpose(0, 3, 1, 2), train_y), (test_x.transpose(0, 3, 1, 2), test_y)


def _jpeg(found: Path, progress: Progress | None) -> tuple[Labelled, Labelled]:
    halves = []
    for half in ("train", "test"):
        packed, offsets, labels = _arrays(found, (f"{half}_jpeg", f"{half}_offsets", f"{half}_labels"))

        def tick(done: int, total: int, label: str = f"decode CIFAR-10 {half}") -> None:
            if progress is not None:
                progress(label, done, total)

        with reading(found, "32 x 32 RGB JPEG images, uint8, with increasing offsets"):
            halves.append((decode_jpegs(packed.astype(np.uint8, copy=False), offsets, tick), labels))
    return halves[0], halves[1]


@dataclass(frozen=True)
class Variant:
    """One form in which CIFAR-10 is kept: the files that show it, how they are read, the archive that holds it."""

    markers: tuple[str, ...]
    read: Callable[[Path, Progress | None], tuple[Labelled, Labelled]]
    archive: str = ""


VARIANTS = {
    "binary": Variant(
        ("data_batch_1.bin", "cifar-10-batches-bin/data_batch_1.bin", "cifar-10-binary.tar.gz"),
        _binary,
        "cifar-10-binary.tar.gz",
    ),
    "python": Variant(
        ("data_batch_1", "cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz"),
        _python,
        "cifar-10-python.tar.gz",
    ),
    "jpeg": Variant(("cifar10_jpeg.npz",), _jpeg),
    "lossless": Variant(("cifar10_lossless_subset.npz",), _lossless),
}
AUTO = ("binary", "python", "jpeg")  # the whole sets; the lossless subset is for evaluation, and only by name


def locate_cifar10(
    folder: str | Path | None, variant: str, *, download: bool = False, progress: Progress | None = None
) -> tuple[str, Path]:
    """Which variant ``auto`` comes to, and the file that shows it. Raises ``DataError``, ``UnknownNameError``."""
    if variant != "auto" and variant not in VARIANTS:
        raise UnknownNameError(f"no CIFAR-10 variant {variant!r}.{did_you_mean(variant, ('auto', *VARIANTS))}")
    source = SOURCES["cifar10"]
    root = data_folder(folder, source.title)
    wanted = AUTO if variant == "auto" else (variant,)
    for name in wanted:
        found = find(source, root, VARIANTS[name].markers)
        if found is not None:
            return name, found
    archive = VARIANTS[wanted[0]].archive
    if download and archive:
        remote = next(file for file in source.files if file.name == archive)
        return wanted[0], fetch(remote, root / source.places[0], progress=progress)
    error = missing(source, root, [marker for name in wanted for marker in VARIANTS[name].markers])
    raise error if archive else DataError(f"{error} (Variant {variant!r} is not published: it cannot be downloaded.)")


def cifar10(
    folder: str | Path | None = None,
    *,
    variant: str = "auto",
    download: bool = False,
    progress: Progress | None = None,
) -> tuple[Images, Images]:
    """CIFAR-10's training and test images, uint8 (N, 3, 32, 32). Raises ``DataError``.

    ``variant``: ``binary`` and ``python`` (the official archives), ``jpeg`` (all images, lossy), ``lossless`` (a
    subset for evaluation); ``auto`` takes the first of binary, python, jpeg that is there.
    """
    name, found = locate_cifar10(folder, variant, download=download, progress=progress)
    return read_cifar10(name, found, progress)


def read_cifar10(variant: str, found: Path, progress: Progress | None = None) -> tuple[Images, Images]:
    """The images of a located variant. Raises ``DataError``."""
    classes = SOURCES["cifar10"].classes
    halves = []
    for images, labels in VARIANTS[variant].read(found, progress):
        with reading(found, "as many labels in 0..9 as images"):
            if len(images) == 0 or labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() > 9:
                raise ValueError(f"it holds {len(images)} images and labels of shape {labels.shape}")
        halves.append(
            Images(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)), classes)
        )
    return halves[0], halves[1]
