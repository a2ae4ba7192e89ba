from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import DataError, UsageError
from espalier.data import Loader, Normalisation


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(count)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.integers(1, 20), st.booleans(), st.booleans())
def test_every_sample_comes_once_with_its_label(count, batch_size, shuffle, drop_last):
    x, y = numbered(count)
    if drop_last and count < batch_size:
        with pytest.raises(DataError, match="at least one batch"):
            Loader(x, y, batch_size=batch_size, drop_last=True)
        return
    loader = Loader(x, y, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(bx) == len(by) == batch_size for bx, by in batches[:-1])
        labels = torch.cat([by for _, by in batches])
        assert loader.samples == len(labels) == (count - count % batch_size if drop_last else count)
        assert len(set(labels.tolist())) == len(labels)
        pixels = torch.cat([bx for bx, _ in batches]).flatten() * 255
        torch.testing.assert_close(pixels, labels.float(), rtol=0, atol=1e-4)
        if not shuffle:
            assert torch.equal(labels, y[: len(labels)])


def order(loader: Loader) -> list[int]:
    return torch.cat([y for _, y in loader]).tolist()


def test_seeding_torch_repeats_an_epoch_and_epochs_differ():
    loader = Loader(*numbered(64), batch_size=10, shuffle=True)
    torch.manual_seed(5)
    first, second = order(loader), order(loader)
    torch.manual_seed(5)
    assert order(loader) == first != second
    assert sorted(second) == sorted(first)


def test_the_order_is_drawn_when_the_iterator_is_made():
    loader = Loader(*numbered(64), batch_size=64, shuffle=True)
    torch.manual_seed(7)
    expected = order(loader)
    torch.manual_seed(7)
    iterator = iter(loader)
    torch.manual_seed(8)
    assert next(iterator)[1].tolist() == expected


def test_a_loader_without_shuffle_draws_nothing():
    before = torch.get_rng_state()
    order(Loader(*numbered(20), batch_size=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_bytes_are_normalised_and_other_types_pass():
    x, y = numbered(6)
    scale = Normalisation((0.5,), (0.25,))
    ((batch, _),) = Loader(x, y, batch_size=6, normalisation=scale)
    assert torch.equal(batch, scale(x))
    tokens = torch.arange(12).view(6, 2)
    ((batch, _),) = Loader(tokens, y, batch_size=6)
    assert batch.dtype == torch.int64
    assert torch.equal(batch, tokens)


def test_what_cannot_be_loaded_is_named():
    x, y = numbered(6)
    with pytest.raises(UsageError, match="got 0"):
        Loader(x, y, batch_size=0)
    with pytest.raises(DataError, match="got 0 samples"):
        Loader(x[:0], y[:0], batch_size=2)
    with pytest.raises(DataError, match="one row per sample"):
        Loader(x, y[:5], batch_size=2)
    with pytest.raises(DataError, match="one row per sample"):
        Loader(torch.tensor(1.0), y, batch_size=2)
    with pytest.raises(DataError, match="3 channel"):
        Loader(x, y, batch_size=2, normalisation=Normalisation((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(DataError, match="float32"):
        Loader(x.float(), y, batch_size=2, normalisation=Normalisation((0.5,), (0.5,)))
