"""What specs are made of beside layers: branches, sums, shuffles, cuts; refused where they are no such thing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from espalier.core.blocks import MOST_PADS, Add, Branches, ChannelShuffle, First, Pad
from espalier.core.edits import Replace
from espalier.core.errors import Corrupt, LimitExceeded
from espalier.core.plan import Plan
from espalier.core.recipe import FileOptions
from espalier.core.spec import MAX_DEPTH, build, outline_of
from espalier.core.task import Task
from espalier.runs.files import freeze_model, load, write_self_contained, write_weights

CONV = {"class": "Conv2d", "args": {"in_channels": 2, "out_channels": 4, "kernel_size": 1}}
EVERY = {
    "class": "Sequential",
    "children": [
        {"class": "Pad", "args": {"amounts": [1, 1, 0, -1]}},
        {
            "class": "Branches",
            "args": {"sizes": [2, 4]},
            "children": [CONV, {"class": "Add", "children": [{"class": "Identity"}, {"class": "ReLU"}]}],
        },
        {"class": "ChannelShuffle", "args": {"groups": 4}},
        {"class": "First", "args": {"channels": 5}},
    ],
}


def test_branches_join_what_they_make() -> None:
    x = torch.randn(2, 6, 3)
    assert torch.equal(Branches(nn.Identity(), nn.ReLU())(x), torch.cat([x, x.relu()], 1))
    split = Branches(nn.ReLU(), nn.Identity(), sizes=(2, 4))
    assert torch.equal(split(x), torch.cat([x[:, :2].relu(), x[:, 2:]], 1))
    assert "sizes=(2, 4)" in repr(split)


def test_a_sum_is_a_residual_block() -> None:
    x = torch.randn(2, 6)
    assert torch.equal(Add(nn.Identity(), nn.ReLU(), nn.Identity())(x), x + x.relu() + x)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_shuffled_channels_are_where_the_docstring_says(groups: int) -> None:
    found = ChannelShuffle(groups)(torch.arange(12.0).reshape(1, 12, 1))[0, :, 0].tolist()
    per = 12 // groups
    for a in range(groups):
        for r in range(per):
            assert found[r * groups + a] == a * per + r


def test_pads_and_cuts() -> None:
    x = torch.randn(1, 3, 4, 5)
    assert Pad((1, 0, -1, 2))(x).shape == (1, 3, 5, 6)
    assert torch.equal(Pad((-1, -1, -1, -1))(x), x[:, :, 1:-1, 1:-1])
    assert torch.equal(First(2)(x), x[:, :2])


def test_a_spec_holds_them_and_the_graph_and_both_files_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Identity(), nn.BatchNorm2d(5)).eval()
    fresh = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Identity(), nn.BatchNorm2d(5)).eval()
    Plan.from_json(Plan((Replace(path="1", spec=EVERY),)).to_json()).apply(model)
    x = torch.randn(3, 1, 4, 4)
    wanted = model(x)
    assert wanted.shape == (3, 5, 3, 6)
    frozen = freeze_model(model, Task(val=[(x, torch.zeros(3))]))
    assert not frozen.refusal
    write_self_contained(frozen, tmp_path / "a", FileOptions(), "fp32")
    write_weights(frozen, tmp_path / "b", FileOptions(), "fp32")
    for loaded in (load(tmp_path / "a"), load(tmp_path / "b", into=fresh)):
        torch.testing.assert_close(loaded.eval()(x[:1]), wanted[:1])
        loaded.train()
        loaded(x).square().mean().backward()
        assert all(p.grad is not None for p in loaded.parameters())


@pytest.mark.parametrize(
    "spec",
    [
        {"class": "Branches"},
        {"class": "Branches", "children": [CONV], "args": {"sizes": [1, 2]}},
        {"class": "Branches", "children": [CONV, CONV], "args": {"sizes": [1, 0]}},
        {"class": "Branches", "children": [CONV], "args": {"sizes": [True]}},
        {"class": "Branches", "children": [CONV], "args": {"size": [1]}},
        {"class": "Branches", "children": 3},
        {"class": "Branches", "children": [3]},
        {"class": "Add"},
        {"class": "Add", "children": [CONV], "args": {"x": 1}},
        {"class": "ReLU", "children": [CONV]},
        {"class": "ChannelShuffle", "args": {"groups": 0}},
        {"class": "ChannelShuffle", "args": {"groups": "2"}},
        {"class": "ChannelShuffle", "args": {"groups": True}},
        {"class": "ChannelShuffle"},
        {"class": "First", "args": {"channels": -1}},
        {"class": "First", "args": {"channels": 2.0}},
        {"class": "Pad", "args": {"amounts": [MOST_PADS + 1, 0]}},
        {"class": "Pad", "args": {"amounts": [0, -MOST_PADS - 1]}},
        {"class": "Pad", "args": {"amounts": [1, 1, 1]}},
        {"class": "Pad", "args": {"amounts": 1}},
        {"class": "Pad", "args": {"amounts": ["1", 1]}},
        {"class": "Unflatten", "args": {"dim": 1}},
        {"class": "Branch", "children": [CONV]},
        {"class": "GroupNorm", "args": {"num_groups": 0, "num_channels": 4}},
        {"class": "Embedding", "args": {"num_embeddings": 3, "embedding_dim": 2, "padding_idx": 9}},
        {"class": "Embedding", "args": {"num_embeddings": 3, "embedding_dim": 2, "_weight": 1}},
        {"class": "Linear", "args": {"in_features": 2**70, "out_features": 1}},
    ],
    ids=str,
)
def test_forged_specs_are_refused(spec: Any) -> None:
    with pytest.raises(Corrupt):
        build(spec)


@pytest.mark.parametrize("name", ["Sequential", "Branches", "Add"])
def test_depth_and_elements_are_limited(name: str) -> None:
    spec: Any = {"class": "ReLU"}
    for _ in range(MAX_DEPTH - 1):
        spec = {"class": name, "children": [spec]}
    build(spec)
    with pytest.raises(Corrupt, match="deeper"):
        build({"class": name, "children": [spec]})
    large = {"class": "Linear", "args": {"in_features": 2**16, "out_features": 2**14}}
    outline = outline_of({"class": name, "children": [large]})
    assert sum(p.numel() for p in outline.parameters()) == 2**30 + 2**14
    assert all(p.is_meta for p in outline.parameters())
    with pytest.raises(LimitExceeded):
        build({"class": name, "children": [large, large]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(
    name=st.sampled_from(["Branches", "Add", "Sequential", "ChannelShuffle", "First", "Pad", "Unflatten"]),
    keys=st.dictionaries(st.sampled_from(["sizes", "groups", "channels", "amounts", "dim"]), json_values, max_size=2),
    children=json_values | st.just([{"class": "ReLU"}]),
)
@settings(max_examples=150, deadline=None)
def test_any_json_is_a_module_or_refused(name: str, keys: dict[str, Any], children: Any) -> None:
    with contextlib.suppress(Corrupt):
        assert isinstance(build({"class": name, "args": keys, "children": children}), nn.Module)
