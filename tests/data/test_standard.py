from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from espalier.core.errors import NeedError, UnknownNameError
from espalier.data import cifar, cifar10, digits, fashion_mnist, mnist, standard
from espalier.data.sources import SOURCES


def real(*names: str) -> Path:
    """The data folder; the test is skipped where it or one of its files is absent."""
    folder = os.environ.get("ESPALIER_DATA")
    if not folder:
        pytest.skip("ESPALIER_DATA names no data folder")
    absent = [name for name in names if not (Path(folder) / name).exists()]
    if absent:
        pytest.skip(f"ESPALIER_DATA lacks {', '.join(absent)}")
    return Path(folder)


def test_digits_are_the_published_ones():
    images = digits()
    assert images.images.shape == (1797, 1, 8, 8)
    assert torch.bincount(images.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]
    assert_published(images, "digits", 1e-3)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(NeedError, match=r"pip install 'espalier\[demo\]'"):
        digits()


def test_standard_digits_are_seeded_60_20_20():
    splits, again, other = standard("digits"), standard("digits"), standard("digits", seed=1)
    assert [part.samples for part in (splits.train, splits.val, splits.test)] == [1079, 359, 359]
    assert torch.equal(splits.val.x, again.val.x)
    assert not torch.equal(splits.val.x, other.val.x)
    assert (splits.shape, len(splits.classes)) == ((1, 8, 8), 10)
    x, y = next(iter(splits.train))
    assert (x.shape, x.dtype, y.dtype) == ((128, 1, 8, 8), torch.float32, torch.int64)
    assert abs(float(splits.train.x.float().mean() / 255) - splits.normalisation.mean[0]) < 0.01
    assert [loader.shuffle for loader in (splits.train, splits.val, splits.test)] == [True, False, False]
    assert len(standard("digits", batch_size=10, val=100).train) == 134


def test_standard_mnist_holds_out_the_end_of_a_seeded_shuffle(tmp_path, contents, write_idx):
    arrays = contents(train=20, test=6)
    write_idx(tmp_path / "mnist", arrays)
    splits = standard("MNIST", tmp_path, val=5, batch_size=4)
    assert [part.samples for part in (splits.train, splits.val, splits.test)] == [15, 5, 6]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(arrays["train-labels-idx1-ubyte"]).long()
    assert torch.equal(splits.val.y, labels[order[-5:]])
    assert torch.equal(splits.test.y, torch.from_numpy(arrays["t10k-labels-idx1-ubyte"]).long())
    write_idx(tmp_path / "fashion_mnist", contents(train=9))
    assert standard("fashion_mnist", tmp_path, val=2).train.samples == 7


def test_standard_jpeg_cifar_decides_on_half_of_the_test_images(tmp_path, jpeg_arrays):
    np.savez(tmp_path / "cifar10_jpeg.npz", **jpeg_arrays(8))
    splits = standard("cifar10", tmp_path)
    assert [part.samples for part in (splits.train, splits.val, splits.test)] == [8, 4, 4]
    assert sorted([*splits.val.y.tolist(), *splits.test.y.tolist()]) == list(range(8))
    assert splits.source == "CIFAR-10 (jpeg)"
    assert standard("cifar-10", tmp_path, val=1).test.samples == 7


def test_standard_official_cifar_decides_on_training_images(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "BATCH", 2)
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (tmp_path / name).write_bytes(bytes(2 * 3073))
    splits = standard("cifar10", tmp_path, val=0.3)
    assert [part.samples for part in (splits.train, splits.val, splits.test)] == [7, 3, 2]
    assert splits.source == "CIFAR-10 (binary)"


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(UnknownNameError, match="Did you mean 'fashion-mnist'"):
        standard("fasion-mnist")


def assert_published(images, name, tolerance):
    measured, published = images.normalisation(), SOURCES[name].normalisation
    assert measured.mean == pytest.approx(published.mean, abs=tolerance)
    assert measured.std == pytest.approx(published.std, abs=tolerance)


@pytest.mark.parametrize(("name", "read"), [("mnist", mnist), ("fashion-mnist", fashion_mnist)])
def test_real_idx_files(name, read):
    folder = real(name.replace("-", "_"))
    train, test = read(folder)
    assert (len(train), len(test)) == (60_000, 10_000)
    assert torch.bincount(test.labels).min() > 890
    assert_published(train, name, 1e-4)


def test_real_lossless_cifar():
    train, test = cifar10(real("cifar10/cifar10_lossless_subset.npz"), variant="lossless")
    assert (len(train), len(test)) == (8068, 1017)
    assert test.labels[:4].tolist() == [3, 8, 8, 0]  # cat, ship, ship, airplane: the known start of the test set
    assert_published(train, "cifar10", 4e-3)  # a seventh of the images


@pytest.mark.slow
def test_real_jpeg_cifar():
    folder = real("cifar10/cifar10_jpeg.npz")
    splits = standard("cifar10", folder, variant="jpeg")
    assert [part.samples for part in (splits.train, splits.val, splits.test)] == [50_000, 5_000, 5_000]
    assert torch.bincount(splits.train.y).tolist() == [5_000] * 10
    assert torch.bincount(splits.val.y).min() > 430
    assert splits.train.x.float().mean(dim=(0, 2, 3)).div(255).tolist() == pytest.approx(
        [0.491, 0.482, 0.447], abs=2e-3
    )
