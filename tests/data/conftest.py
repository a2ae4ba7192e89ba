"""Small files in the published formats, written for the tests; each fixture is the function that writes."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest

from espalier.data.sources import SOURCES

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
UINT8 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def _idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def _contents(train: int = 7, test: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    names = [remote.name.removesuffix(".gz") for remote in SOURCES["mnist"].files]
    shapes = [(train, 28, 28), (train,), (test, 28, 28), (test,)]
    return {
        name: random.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)
        for name, shape in zip(names, shapes, strict=True)
    }


def _write_idx(folder: Path, arrays: dict[str, np.ndarray], *, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        data = _idx(values)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)


def _text(value: bytes) -> bytes:
    return b"U" + struct.pack("<B", len(value)) + value


def _official(images: np.ndarray, labels: list[int]) -> bytes:
    rows, width = images.shape
    out = io.BytesIO()
    out.write(b"\x80\x02}q\x01(" + _text(b"batch_label") + b"q\x02" + _text(b"training batch 1 of 5") + b"q\x03")
    out.write(_text(b"labels") + b"q\x04]q\x05(" + b"".join(b"K" + bytes([y]) for y in labels) + b"e")
    out.write(_text(b"data") + b"q\x06" + RECONSTRUCT + b"q\x07(K\x01M" + struct.pack("<H", rows))
    out.write(b"M" + struct.pack("<H", width) + b"\x86" + UINT8 + b"\x89T" + struct.pack("<i", images.size))
    out.write(images.tobytes() + b"tb" + _text(b"filenames") + b"]q\x08(")
    out.write(b"".join(_text(b"image_%d.png" % i) for i in range(rows)) + b"eu.")
    return out.getvalue()


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95)
    return out.getvalue()


def _jpeg_arrays(count: int = 6) -> dict[str, np.ndarray]:
    arrays = {}
    for half in ("train", "test"):
        coded = [_jpeg(np.full((32, 32, 3), 25 * i, dtype=np.uint8)) for i in range(count)]
        arrays[f"{half}_jpeg"] = np.frombuffer(b"".join(coded), dtype=np.uint8)
        arrays[f"{half}_offsets"] = np.cumsum([0, *map(len, coded)]).astype(np.uint32)
        arrays[f"{half}_labels"] = np.arange(count, dtype=np.uint8)
    return arrays


@pytest.fixture
def idx():
    """An array as idx bytes."""
    return _idx


@pytest.fixture
def contents():
    """Random arrays for the four files of MNIST: name -> uint8."""
    return _contents


@pytest.fixture
def write_idx():
    """The four files in a folder, packed or plain."""
    return _write_idx


@pytest.fixture
def official():
    """A CIFAR-10 batch as Python 2's cPickle wrote the archive's: protocol 2, byte strings, unread memo entries."""
    return _official


@pytest.fixture
def jpeg():
    """An array as JPEG bytes."""
    return _jpeg


@pytest.fixture
def jpeg_arrays():
    """The arrays of ``cifar10_jpeg.npz`` with grey images of level 25 i and label i."""
    return _jpeg_arrays
