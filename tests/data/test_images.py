from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import DataError, UsageError
from espalier.data import Images, Normalisation

CLASSES = ("a", "b", "c")


def some(count: int = 10, channels: int = 2) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, channels, 4, 5), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 3, CLASSES)


def test_normalisation_is_the_written_formula():
    images = some()
    scale = Normalisation((0.25, 0.5), (0.5, 0.125))
    expected = images.images.double() / 255
    expected[:, 0] = (expected[:, 0] - 0.25) / 0.5
    expected[:, 1] = (expected[:, 1] - 0.5) / 0.125
    assert images.float(scale).dtype == torch.float32
    torch.testing.assert_close(images.float(scale).double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(images.float(), images.images / 255)


def test_measured_normalisation_centres_and_scales():
    images = some(50)
    values = images.float(images.normalisation())
    torch.testing.assert_close(values.mean(dim=(0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.std(dim=(0, 2, 3), correction=0), torch.ones(2), rtol=0, atol=1e-5)


def test_conversion_leaves_the_bytes_alone():
    images = some()
    before = images.images.clone()
    images.float(images.normalisation())
    assert torch.equal(images.images, before)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.booleans(), st.integers(0, 5))
def test_a_split_is_disjoint_seeded_and_of_the_asked_sizes(count, sizes, rest, seed):
    images = Images(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(count).long(), ("a",))
    asked = (-1, *sizes) if rest else tuple(sizes)
    if sum(sizes) + rest > count:
        with pytest.raises(UsageError, match=f"there are {count}"):
            images.split(*asked, seed=seed)
        return
    parts = images.split(*asked, seed=seed)
    assert [len(part) for part in parts][-len(sizes) :] == sizes
    seen = torch.cat([part.images.flatten() for part in parts]).tolist()
    assert len(set(seen)) == len(seen) == (count if rest else sum(sizes))
    again = images.split(*asked, seed=seed)
    assert all(torch.equal(a.images, b.images) for a, b in zip(parts, again, strict=True))


def test_a_split_depends_on_the_seed_and_not_on_the_global_generator():
    images = some(60)
    first = images.split(-1, 20, seed=0)[1]
    torch.manual_seed(99)
    assert torch.equal(images.split(-1, 20, seed=0)[1].images, first.images)
    assert not torch.equal(images.split(-1, 20, seed=1)[1].images, first.images)


def test_labels_travel_with_their_images():
    images = Images(torch.arange(9, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(9) % 3, CLASSES)
    for part in images.split(0.5, -1, seed=3):
        assert torch.equal(part.images.flatten() % 3, part.labels)
    taken = images.take(torch.tensor([7, 2]))
    assert taken.images.flatten().tolist() == [7, 2]
    assert taken.labels.tolist() == [1, 2]


@pytest.mark.parametrize("sizes", [(), (0,), (-1, -1), (0.0,), (1.5,), (0.001,), (-2, 3), (float("nan"),)])
def test_senseless_splits_are_refused(sizes):
    with pytest.raises(UsageError, match="split"):
        some().split(*sizes, seed=0)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), "uint8"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2).long(), r"\(N, C, H, W\)"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0).long(), "non-empty"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3).long(), "one per image"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "int64"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 3]), r"0\.\.2"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([-1, 0]), r"-1\.\.0"),
    ],
)
def test_images_that_are_none_are_refused(images, labels, words):
    with pytest.raises(DataError, match=words):
        Images(images, labels, CLASSES)


def test_normalisation_refuses_bad_numbers_and_other_images():
    for mean, std in (((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,))):
        with pytest.raises(UsageError, match="per channel"):
            Normalisation(mean, std)
    with pytest.raises(DataError, match=r"1 channel.*\(10, 2, 4, 5\)"):
        some().float(Normalisation((0.5,), (0.5,)))
    with pytest.raises(DataError, match="float32"):
        Normalisation((0.5,), (0.5,))(torch.zeros(1, 1, 2, 2))
