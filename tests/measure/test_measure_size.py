from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.core.errors import ModelError
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, slots
from espalier.measure import file_bytes, fp32_safetensors_bytes
from espalier.measure.size import safetensors_bytes

DTYPES = [torch.uint64, torch.int64, torch.complex64, torch.float32, torch.uint32, torch.int32, torch.uint16,
          torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    st.dictionaries(
        NAMES, st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=12
    )
)
def test_the_formula_is_the_library_s_length(tensors) -> None:
    real = safetensors.torch.save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()})
    assert safetensors_bytes([(name, tuple(shape), dtype) for name, (shape, dtype) in tensors.items()]) == len(real)


def test_the_header_order_holds_for_every_pair_of_types() -> None:
    # 9 and 10 digits of offsets differ in length only if the order is right
    for first in DTYPES:
        for second in DTYPES:
            tensors = {
                "a": torch.zeros(3, dtype=first),
                "b": torch.zeros(13, dtype=second),
                "c": torch.zeros(101, dtype=first),
            }
            described = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
            assert safetensors_bytes(described) == len(safetensors.torch.save(tensors)), (first, second)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11)
        self.head.weight = self.embed.weight
        self.small = nn.Parameter(torch.zeros(3, dtype=torch.float16), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(1000), persistent=False)


def test_a_model_s_state_as_fp32_with_tied_tensors_once(tmp_path) -> None:
    model = Mixed()
    state = {name: t.float() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    del state["head.weight"]
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({name: t.clone() for name, t in state.items()}, path)
    assert fp32_safetensors_bytes(model) == file_bytes(path) == path.stat().st_size


def test_half_and_double_models_count_as_fp32() -> None:
    model = nn.Linear(300, 100)
    expected = fp32_safetensors_bytes(model)
    assert fp32_safetensors_bytes(copy.deepcopy(model).half()) == expected
    assert fp32_safetensors_bytes(copy.deepcopy(model).double()) == expected


def test_a_masked_model_counts_as_its_plain_self() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    before = fp32_safetensors_bytes(model)
    slot = slots(model)["0.weight"]
    attach(slot, Mask(torch.ones(8, 8, dtype=torch.bool)))
    assert fp32_safetensors_bytes(model) == before


def test_a_type_safetensors_lacks_is_named() -> None:
    model = nn.Module()
    model.register_buffer("odd", torch.zeros(2, dtype=torch.int8).view(torch.bits8))
    with pytest.raises(ModelError, match=r"odd is torch\.bits8"):
        fp32_safetensors_bytes(model)
