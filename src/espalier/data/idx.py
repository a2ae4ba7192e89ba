"""MNIST and Fashion-MNIST: four idx files each, packed with gzip or plain.

idx: two zero bytes, the type (8 = uint8), the number of dimensions, each dimension as big-endian uint32, the values.
"""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from espalier.core.errors import DataError
from espalier.data.download import fetch
from espalier.data.files import Progress, opened, read_exactly, reading
from espalier.data.images import Images
from espalier.data.sources import SOURCES, Source, data_folder, find, missing

SIDE = 28
LIMIT = 1 << 28  # bytes of one unpacked file; the largest published one has 47 MB


def read_idx(stream: IO[bytes], dims: int) -> NDArray[np.uint8]:
    """One uint8 array of ``dims`` dimensions that fills the stream. Raises ``ValueError``."""
    zeros, kind, found = struct.unpack(">HBB", read_exactly(stream, 4))
    if (zeros, kind, found) != (0, 8, dims):
        raise ValueError(f"its header {(zeros, kind, found)} is not {(0, 8, dims)}: zeros, uint8, {dims} dimension(s)")
    shape = struct.unpack(f">{dims}I", read_exactly(stream, 4 * dims))
    count = math.prod(shape)
    if not 0 < count <= LIMIT:
        raise ValueError(f"its header names the shape {shape}, which is empty or beyond {LIMIT:,} bytes")
    values = np.frombuffer(bytearray(read_exactly(stream, count)), dtype=np.uint8)
    if stream.read(1):
        raise ValueError(f"bytes follow the {count:,} values that its header names")
    return values.reshape(shape)


def mnist(
    folder: str | Path | None = None, *, download: bool = False, progress: Progress | None = None
) -> tuple[Images, Images]:
    """MNIST's training and test images, uint8 (N, 1, 28, 28). Raises ``DataError``.

    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner. Gradient-based learning applied to document recognition. 1998.
    """
    return _read("mnist", folder, download, progress)


def fashion_mnist(
    folder: str | Path | None = None, *, download: bool = False, progress: Progress | None = None
) -> tuple[Images, Images]:
    """Fashion-MNIST's training and test images, uint8 (N, 1, 28, 28). Raises ``DataError``.

    H. Xiao, K. Rasul, R. Vollgraf. Fashion-MNIST. arXiv:1708.07747
    """
    return _read("fashion-mnist", folder, download, progress)


def _read(name: str, folder: str | Path | None, download: bool, progress: Progress | None) -> tuple[Images, Images]:
    source = SOURCES[name]
    root = data_folder(folder, source.title)
    markers = [file.name for file in source.files]
    found = find(source, root, [form for marker in markers for form in (marker, marker.removesuffix(".gz"))])
    if found is None and not download:
        raise missing(source, root, markers)
    place = found.parent if found else root / source.places[0]
    paths = []
    for remote in source.files:
        packed, plain = place / remote.name, place / remote.name.removesuffix(".gz")
        path = next((path for path in (plain, packed) if path.is_file()), None)
        if path is None and not download:
            raise DataError(
                f"{source.title} in {place} lacks {remote.name} (packed or plain). Complete the folder, name another, "
                "or let download=True fetch what is missing."
            )
        paths.append(path or fetch(remote, place, progress=progress))
    return _pair(source, paths[0], paths[1], training=True), _pair(source, paths[2], paths[3], training=False)


def _pair(source: Source, image_path: Path, label_path: Path, *, training: bool) -> Images:
    with reading(image_path, f"an idx file of uint8 images (N, {SIDE}, {SIDE})"), opened(image_path) as stream:
        images = read_idx(stream, 3)
        if images.shape[1:] != (SIDE, SIDE):
            raise ValueError(f"it holds images of {images.shape[1]} x {images.shape[2]}")
    with reading(label_path, f"an idx file of {len(images)} uint8 labels 0..9"), opened(label_path) as stream:
        labels = read_idx(stream, 1)
        if len(labels) != len(images) or labels.max() >= len(source.classes):
            raise ValueError(f"it holds {len(labels)} labels up to {labels.max()}")
    if training:
        _check_which(source, label_path, labels)
    return Images(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), source.classes)


def _check_which(source: Source, path: Path, labels: NDArray[np.uint8]) -> None:
    """MNIST and Fashion-MNIST share their file names: the labels of one must not pass for the other's."""
    digest = hashlib.sha256(struct.pack(">HBBI", 0, 8, 1, len(labels)) + labels.tobytes()).hexdigest()
    for other in SOURCES.values():
        if other is not source and other.labels_sha256 == digest:
            raise DataError(f"{path} belongs to {other.title}, not {source.title}. Name the folder of {source.title}.")
