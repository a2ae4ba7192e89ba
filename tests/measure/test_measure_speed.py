from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.core.errors import UsageError
from espalier.measure import Latency, latency
from espalier.measure.speed import quantile


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_quantile_is_numpy_s(values, fraction) -> None:
    import numpy as np

    assert quantile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), rel=1e-9, abs=1e-9)


def test_summary_of_known_times() -> None:
    found = Latency.of([0.001 * k for k in range(1, 12)], batch=12, threads=2)
    assert found.median_ms == pytest.approx(6)
    assert (found.p10_ms, found.p90_ms) == (pytest.approx(2), pytest.approx(10))
    assert found.per_second == pytest.approx(2000)
    assert found.to_json()["batch"] == 12


def test_models_alternate_and_everything_is_put_back() -> None:
    torch_threads = torch.get_num_threads()
    models = {"a": nn.Dropout(), "b": nn.Linear(2, 2)}
    order = []

    def call(model: nn.Module) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        order.append(model)
        assert torch.get_num_threads() == torch_threads + 1

    found = latency(models, call, repeats=4, warmup=2, threads=torch_threads + 1)
    assert order == [models["a"], models["b"]] * 6
    assert {name: timing.runs for name, timing in found.items()} == {"a": 4, "b": 4}
    assert torch.get_num_threads() == torch_threads
    assert gc.isenabled()
    assert torch.is_grad_enabled()
    assert all(model.training for model in models.values())


def test_state_is_put_back_after_an_error() -> None:
    threads, model = torch.get_num_threads(), nn.Linear(2, 2)
    calls = []

    def call(_: nn.Module) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        latency({"a": model}, call, warmup=2, threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert model.training


def test_a_slower_model_is_slower() -> None:
    import time

    seconds = {"slow": 0.02, "fast": 0.001}
    models = {name: nn.Linear(1, 1) for name in seconds}
    names = {id(model): name for name, model in models.items()}
    found = latency(models, lambda m: time.sleep(seconds[names[id(m)]]), repeats=5, warmup=0)
    assert found["slow"].median_ms >= 20  # sleep never returns early
    assert found["fast"].median_ms < found["slow"].median_ms


def test_a_time_cap_keeps_three_rounds() -> None:
    assert latency({"a": nn.Linear(1, 1)}, lambda m: m, repeats=50, seconds=0.0)["a"].runs == 3


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"threads": 0}, {"batch": 0}, {"warmup": -1}])
def test_counts_below_one_are_refused(bad) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        latency({"a": nn.Linear(1, 1)}, lambda m: m, **bad)


def test_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match="0 models"):
        latency({}, lambda m: m)
