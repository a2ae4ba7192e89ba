from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from espalier.core.errors import DataError, UnknownNameError
from espalier.data import cifar, cifar10

BATCH = 4


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cifar, "BATCH", BATCH)
    monkeypatch.setattr(cifar, "MEMBER_LIMIT", 20_000)


@pytest.fixture
def batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(3)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {
        name: (random.integers(0, 256, (BATCH, 3072), dtype=np.uint8), random.integers(0, 10, BATCH, dtype=np.uint8))
        for name in names
    }


def binary(batches) -> dict[str, bytes]:
    return {f"{name}.bin": np.concatenate([y[:, None], x], axis=1).tobytes() for name, (x, y) in batches.items()}


def python(batches, official) -> dict[str, bytes]:
    return {name: official(x, y.tolist()) for name, (x, y) in batches.items()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def pack(path: Path, files: dict[str, bytes], prefix: str = "cifar-10-batches/") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def check(folder: Path, batches, **options) -> None:
    train, test = cifar10(folder, **options)
    whole = list(batches.values())
    assert np.array_equal(train.images.numpy().reshape(-1, 3072), np.concatenate([x for x, _ in whole[:5]]))
    assert np.array_equal(train.labels.numpy(), np.concatenate([y for _, y in whole[:5]]))
    assert np.array_equal(test.images.numpy().reshape(-1, 3072), whole[5][0])
    assert np.array_equal(test.labels.numpy(), whole[5][1])
    assert train.shape == (3, 32, 32)
    assert train.classes[3] == "cat"


@pytest.mark.parametrize("place", ["cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", "cifar10", "."])
def test_unpacked_binary_files(tmp_path, batches, place):
    write(tmp_path / place, binary(batches))
    check(tmp_path, batches)


@pytest.mark.parametrize("place", ["cifar10/cifar-10-batches-py", "."])
def test_unpacked_pickles(tmp_path, batches, place, official):
    write(tmp_path / place, python(batches, official))
    check(tmp_path, batches)


def test_both_official_archives(tmp_path, batches, official):
    pack(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", binary(batches), "cifar-10-batches-bin/")
    pack(tmp_path / "cifar-10-python.tar.gz", python(batches, official), "cifar-10-batches-py/")
    check(tmp_path, batches, variant="binary")
    check(tmp_path, batches, variant="python")


def test_nothing_is_written_where_an_archive_points(tmp_path, batches):
    folder = tmp_path / "data" / "deep"
    pack(folder / "cifar-10-binary.tar.gz", binary(batches), "../../")
    before = sorted(tmp_path.rglob("*"))
    check(folder, batches)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_in_an_archive_are_not_followed(tmp_path, batches):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(binary(batches)["test_batch.bin"])
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, data in binary(batches).items():
            member = tarfile.TarInfo(name)
            if name == "test_batch.bin":
                member.type, member.linkname = tarfile.SYMTYPE, str(secret)
                archive.addfile(member)
            else:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz.*does not hold test_batch\.bin"):
        cifar10(tmp_path)


def test_an_archive_that_unpacks_to_too_much_is_stopped(tmp_path, batches):
    pack(tmp_path / "cifar-10-binary.tar.gz", {"padding": bytes(5_000_000)} | binary(batches))
    with pytest.raises(DataError, match="unpacks to more bytes"):
        cifar10(tmp_path)
    pack(tmp_path / "cifar-10-binary.tar.gz", {"data_batch_1.bin": bytes(30_000)})
    with pytest.raises(DataError, match="larger than 20000"):
        cifar10(tmp_path)
    pack(tmp_path / "cifar-10-binary.tar.gz", binary(batches))
    with gzip.open(tmp_path / "cifar-10-binary.tar.gz") as packed:
        whole = packed.read()
    twice = whole[: tarfile.BLOCKSIZE + 12_800]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(twice + whole))
    with pytest.raises(DataError, match="there twice"):
        cifar10(tmp_path)


def test_truncated_archives_are_named(tmp_path, batches):
    path = tmp_path / "cifar-10-binary.tar.gz"
    pack(path, binary(batches))
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz.*cannot be used"):
            cifar10(tmp_path)


def test_damaged_official_files_are_named(tmp_path, batches):
    files = binary(batches)
    for damaged, words in (
        (files["data_batch_3.bin"][:-3073], r"data_batch_3\.bin cannot be used.*9,219 bytes, not 4 x 3073"),
        (files["data_batch_3.bin"] + b"x", "12,293 bytes"),
        (bytes(30_000), "30,000 bytes.*at most 20,000"),
        (b"\x0a" + files["data_batch_3.bin"][1:], "labels"),
    ):
        write(tmp_path, files | {"data_batch_3.bin": damaged})
        with pytest.raises(DataError, match=words):
            cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*No such file"):
        cifar10(tmp_path)


def test_damaged_pickles_are_named(tmp_path, batches, official):
    files = python(batches, official)
    images, labels = batches["data_batch_2"]
    for damaged, words in (
        (files["data_batch_2"][:500], r"data_batch_2 cannot be used.*ends at byte 500"),
        (official(images[:, :3000], labels.tolist()), r"shape \(4, 3072\)"),
        (official(images, labels.tolist()[:3]), "labels"),
        (official(images, [10] * 4), "labels"),
        (b"cos\nsystem\n(U\x04truetR.", "os system"),
        (b"N.", "no dict"),
        (b"}.", "'data'"),
    ):
        write(tmp_path, files | {"data_batch_2": damaged})
        with pytest.raises(DataError, match=words):
            cifar10(tmp_path)


def test_jpeg_copies_are_decoded_and_progress_is_told(tmp_path, jpeg_arrays):
    np.savez(tmp_path / "cifar10_jpeg.npz", **jpeg_arrays())
    heard = []
    train, test = cifar10(tmp_path, progress=lambda *said: heard.append(said))
    assert train.images.float().mean(dim=(1, 2, 3)).round().tolist() == [25.0 * i for i in range(6)]
    assert test.labels.tolist() == list(range(6))
    assert heard == [("decode CIFAR-10 train", 6, 6), ("decode CIFAR-10 test", 6, 6)]


def test_a_decoded_image_stands_upright(jpeg):
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:16, :, 0] = 255  # the upper half is red
    coded = np.frombuffer(jpeg(image), dtype=np.uint8)
    (decoded,) = cifar.decode_jpegs(coded, np.array([0, len(coded)]), lambda *_: None)
    assert decoded[0, :14].min() > 200
    assert decoded[0, 18:].max() < 60
    assert decoded[1:].max() < 60


def huge(data: bytes) -> bytes:
    """The same JPEG with a header that claims 65,535 x 65,535 pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + b"\xff" * 4 + data[at + 4 :]


def test_damaged_jpeg_files_are_named(tmp_path, jpeg, jpeg_arrays):
    path = tmp_path / "cifar10_jpeg.npz"
    good = jpeg_arrays()
    one = jpeg(np.zeros((32, 32, 3), dtype=np.uint8))
    single = lambda data: {
        "train_jpeg": np.frombuffer(data, dtype=np.uint8),
        "train_offsets": np.array([0, len(data)]),
        "train_labels": np.zeros(1, dtype=np.uint8),
    }
    for damage, words in (
        ({"train_offsets": good["train_offsets"][::-1]}, "offsets do not cut"),
        ({"train_offsets": good["train_offsets"][[0, 2, 1, 3, 4, 5, 6]]}, "offsets do not cut"),
        ({"train_offsets": good["train_offsets"][:-1]}, "offsets"),
        ({"train_labels": good["train_labels"][:-1]}, "labels"),
        ({"train_labels": good["train_labels"] + 9}, "labels"),
        ({"train_labels": good["train_labels"].astype(float)}, "other types"),
        ({"train_labels": np.array([{}] * 6, dtype=object)}, "Object arrays"),
        (single(one[:300]), "image 0 is damaged"),
        (single(b"GIF89a"), "image 0 is damaged"),
        (single(huge(one)), "image 0 is damaged"),
        (single(jpeg(np.zeros((32, 31, 3), dtype=np.uint8))), "RGB 31 x 32"),
        (single(jpeg(np.zeros((32, 32), dtype=np.uint8))), "L 32 x 32"),
    ):
        np.savez(path, **(good | damage))
        with pytest.raises(DataError, match=rf"cifar10_jpeg\.npz cannot be used.*{words}"):
            cifar10(tmp_path)


def test_the_lossless_subset_comes_only_by_name(tmp_path):
    random = np.random.default_rng(4)
    arrays = {f"{half}_images": random.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for half in ("train", "test")}
    labels = {f"{half}_labels": np.arange(3, dtype=np.uint8) for half in ("train", "test")}
    path = tmp_path / "cifar10_lossless_subset.npz"
    np.savez(path, **arrays, **labels)
    train, _ = cifar10(tmp_path, variant="lossless")
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), arrays["train_images"])
    with pytest.raises(DataError, match="was not found"):
        cifar10(tmp_path)
    np.savez(path, **(arrays | {"test_images": arrays["test_images"][:, :5]}), **labels)
    with pytest.raises(DataError, match=r"uint8 \(3, 5, 32, 3\)"):
        cifar10(tmp_path, variant="lossless")
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="train_labels"):
        cifar10(tmp_path, variant="lossless")
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match="not a zip file"):
        cifar10(tmp_path, variant="lossless")


def test_an_npz_that_unpacks_to_too_much_is_refused_before_reading(tmp_path, monkeypatch, jpeg_arrays):
    monkeypatch.setattr(cifar, "ARRAY_LIMIT", 1000)
    np.savez_compressed(tmp_path / "cifar10_jpeg.npz", **jpeg_arrays())
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        cifar10(tmp_path)


def test_auto_prefers_the_official_files(tmp_path, batches, jpeg_arrays):
    np.savez(tmp_path / "cifar10_jpeg.npz", **jpeg_arrays())
    assert len(cifar10(tmp_path)[0]) == 6
    write(tmp_path, binary(batches))
    check(tmp_path, batches)


def test_unknown_and_absent_variants_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="Did you mean 'lossless'"):
        cifar10(tmp_path, variant="losless")
    with pytest.raises(DataError, match=r"CIFAR-10 was not found.*data_batch_1\.bin.*--data-dir"):
        cifar10(tmp_path)
    with pytest.raises(DataError, match="not published"):
        cifar10(tmp_path, variant="jpeg", download=True)


def test_a_flipped_bit_in_an_archive_is_noticed(tmp_path, batches):
    path = tmp_path / "cifar-10-binary.tar.gz"
    pack(path, binary(batches))
    whole = path.read_bytes()
    for at in range(40, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz.*cannot be used"):
            cifar10(tmp_path)
