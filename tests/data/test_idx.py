from __future__ import annotations

import gzip
import hashlib
import io
import struct
from dataclasses import replace

import numpy as np
import pytest

from espalier.core.errors import DataError
from espalier.data import fashion_mnist, mnist
from espalier.data.idx import LIMIT, read_idx
from espalier.data.sources import ENVIRONMENT, SOURCES

NAMES = [remote.name.removesuffix(".gz") for remote in SOURCES["mnist"].files]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
def test_images_and_labels_are_read_from_every_place(tmp_path, place, packed, contents, write_idx):
    arrays = contents()
    write_idx(tmp_path / place, arrays, packed=packed)
    train, test = mnist(tmp_path)
    for part, half in ((train, "train"), (test, "t10k")):
        assert np.array_equal(part.images.squeeze(1).numpy(), arrays[f"{half}-images-idx3-ubyte"])
        assert np.array_equal(part.labels.numpy(), arrays[f"{half}-labels-idx1-ubyte"])
    assert train.shape == (1, 28, 28)
    assert train.classes == tuple("0123456789")


def test_the_environment_names_the_folder_and_an_argument_wins(tmp_path, monkeypatch, contents, write_idx):
    write_idx(tmp_path / "one" / "mnist", contents(train=4))
    write_idx(tmp_path / "two" / "mnist", contents(train=5))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "one"))
    assert len(mnist()[0]) == 4
    assert len(mnist(tmp_path / "two")[0]) == 5


def test_fashion_has_its_own_places_and_classes(tmp_path, contents, write_idx):
    write_idx(tmp_path / "mnist", contents(train=4))
    write_idx(tmp_path / "FashionMNIST" / "raw", contents(train=5))
    train, _ = fashion_mnist(tmp_path)
    assert len(train) == 5
    assert train.classes[9] == "Ankle boot"


def test_without_a_folder_the_error_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(DataError, match=rf"MNIST.*--data-dir.*{ENVIRONMENT}.*download=True"):
        mnist()
    monkeypatch.setenv(ENVIRONMENT, "")
    with pytest.raises(DataError, match="none was named"):
        mnist()


def test_a_folder_without_the_data_is_named_with_what_was_looked_for(tmp_path, contents, write_idx):
    with pytest.raises(DataError) as caught:
        mnist(tmp_path / "nowhere")
    message = str(caught.value)
    for words in ("is not a folder", NAMES[0], str(tmp_path / "nowhere" / "MNIST/raw"), "--data-dir", "download=True"):
        assert words in message
    write_idx(tmp_path / "mnist", {NAMES[0]: contents()[NAMES[0]]})
    with pytest.raises(DataError, match=rf"lacks {NAMES[1]}"):
        mnist(tmp_path)


def test_mnist_does_not_pass_for_fashion_mnist(tmp_path, monkeypatch, idx, contents, write_idx):
    arrays = contents()
    write_idx(tmp_path, arrays)
    digest = hashlib.sha256(idx(arrays[NAMES[1]])).hexdigest()
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], labels_sha256=digest))
    assert len(mnist(tmp_path)[0]) == 7
    with pytest.raises(DataError, match="belongs to MNIST, not Fashion-MNIST"):
        fashion_mnist(tmp_path)


HEADER = struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends after 0 of 4"),
        (b"\x01" + HEADER[1:] + bytes(8), "header"),
        (HEADER[:2] + b"\x0d" + HEADER[3:] + bytes(8), "header"),
        (HEADER[:3] + b"\x01" + HEADER[4:] + bytes(8), "header"),
        (HEADER[:3] + b"\xff" + HEADER[4:] + bytes(8), "header"),
        (HEADER[:10], "ends after 6 of 12"),
        (HEADER + bytes(7), "ends after 7 of 8"),
        (HEADER + bytes(9), "bytes follow"),
        (struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28), "empty"),
        (struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), f"beyond {LIMIT:,}"),
    ],
)
def test_damaged_idx_streams_say_what_is_wrong(data, words):
    with pytest.raises(ValueError, match=words):
        read_idx(io.BytesIO(data), 3)


@pytest.mark.parametrize("packed", [False, True])
def test_every_truncation_of_a_label_file_is_named(tmp_path, packed, contents, write_idx):
    write_idx(tmp_path, contents(), packed=packed)
    victim = tmp_path / (NAMES[1] + ".gz" * packed)
    whole = victim.read_bytes()
    for length in range(len(whole)):
        victim.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"{victim.name} cannot be used.*Expected an idx file of 7 uint8 labels"):
            mnist(tmp_path)


def test_every_bit_flip_of_a_packed_file_is_refused_or_harmless(tmp_path, contents, write_idx):
    arrays = contents()
    write_idx(tmp_path, arrays, packed=True)
    victim = tmp_path / (NAMES[1] + ".gz")
    whole = victim.read_bytes()
    harmless = 0
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        victim.write_bytes(flipped)
        try:
            train, _ = mnist(tmp_path)
        except DataError:
            continue
        else:
            harmless += 1  # gzip's time stamp and the like
            assert np.array_equal(train.labels.numpy(), arrays[NAMES[1]])
    assert harmless < 80


def test_files_that_do_not_fit_together_are_named(tmp_path, contents, write_idx):
    arrays = contents()
    write_idx(tmp_path, arrays | {NAMES[1]: arrays[NAMES[1]][:5]})
    with pytest.raises(DataError, match=rf"{NAMES[1]}.*holds 5 labels.*7 uint8 labels"):
        mnist(tmp_path)
    write_idx(tmp_path, arrays | {NAMES[1]: np.full(7, 10, dtype=np.uint8)})
    with pytest.raises(DataError, match="up to 10"):
        mnist(tmp_path)
    write_idx(tmp_path, arrays | {NAMES[0]: np.zeros((7, 28, 27), dtype=np.uint8)})
    with pytest.raises(DataError, match="28 x 27"):
        mnist(tmp_path)


def test_a_small_file_that_unpacks_to_more_than_it_names_is_stopped(tmp_path, idx, contents, write_idx):
    write_idx(tmp_path, contents(), packed=True)
    bomb = gzip.compress(idx(np.zeros(7, dtype=np.uint8)) + bytes(50_000_000), 1)
    (tmp_path / (NAMES[1] + ".gz")).write_bytes(bomb)
    with pytest.raises(DataError, match="bytes follow the 7 values"):
        mnist(tmp_path)


def test_a_plain_file_that_is_no_gzip_is_named(tmp_path, contents, write_idx):
    write_idx(tmp_path, contents(), packed=True)
    (tmp_path / (NAMES[2] + ".gz")).write_bytes(b"<html>moved</html>")
    with pytest.raises(DataError, match=rf"{NAMES[2]}\.gz cannot be used: Not a gzipped file"):
        mnist(tmp_path)
