"""Tied weights: neurons by clusters, kernels, whole layers, and kernels that are the middle of others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.crop import Crop, CroppedConv2d
from espalier.core.errors import Corrupt, ModelError, PhaseError, UnknownNameError
from espalier.core.parametrize import plain, slots
from espalier.core.plan import Plan, applied
from espalier.core.recipe import FileOptions
from espalier.core.task import classification
from espalier.prune import Prune
from espalier.quantize import Quantize
from espalier.runs.checkpoint import load_model, save_model
from espalier.runs.files import write_files
from espalier.share import Tied
from espalier.share.tied import cluster
from espalier.testing.compare import bits, frozen_copy


class Branches(nn.Module):
    """Kernels of 3, 5 and 1 side by side, then two equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 5, padding=2)
        self.c = nn.Conv2d(4, 6, 1, bias=False)
        self.d, self.e = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.e(torch.relu(self.d((self.a(x) + self.b(x) + self.c(x)).mean((2, 3)))))


def branches() -> Branches:
    torch.manual_seed(0)
    return Branches().eval()


def task() -> Any:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 4, 6, 6, generator=generator), torch.arange(4)) for _ in range(3)]
    return classification(data, data[:1])


def test_clusters_of_rows_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 5, generator=generator).double()
    wanted = torch.arange(20) % 3
    rows = centres[wanted] + 1e-3 * torch.randn(20, 5, generator=generator)
    found = torch.tensor(cluster(rows, 3, generator))
    assert (found[:, None] == found).equal(wanted[:, None] == wanted)
    assert len(set(cluster(centres[wanted], 7, generator))) == 3  # no more clusters than different rows
    assert set(cluster(rows, 1, generator)) == {0}


def test_equal_neurons_are_one_row() -> None:
    model = nn.Sequential(nn.Linear(5, 6))
    model[0].weight.data[1::2] = model[0].weight.data[::2]
    shared = Tied(keep=0.5)(model, Context())
    assert torch.allclose(slots(shared)["0.weight"].value(), model[0].weight)
    assert slots(shared)["0.weight"].latent.numel() == 15


def test_kernels_are_left_alone_where_there_are_none() -> None:
    context = Context()
    Tied(what="kernels").transform(nn.Sequential(nn.Linear(5, 6), nn.Conv2d(3, 4, 3)), context)
    assert context.record.skipped == [{"name": "0.weight", "reason": "it has no kernel"}]
    assert context.record.details["layers"]["1.weight"]["numbers"] == 4 * (3 + 9)


def test_layers_of_one_shape_get_their_mean() -> None:
    model, context = branches(), Context()
    tied = Tied(what="layers").transform(branches(), context)
    assert tied.d.weight is tied.e.weight  # type: ignore[union-attr]
    assert torch.allclose(tied.d.weight, (model.d.weight + model.e.weight) / 2)  # type: ignore[union-attr]
    assert torch.equal(tied.d.bias, model.d.bias)  # type: ignore[union-attr, arg-type]
    assert {row["name"] for row in context.record.skipped} == {"a.weight", "b.weight", "c.weight"}
    assert context.record.details["layers"]["e.weight"]["numbers"] == 0


def test_recurrent_and_frozen_layers_are_not_tied_to_others() -> None:
    frozen = nn.Linear(8, 32)
    frozen.weight.requires_grad_(requires_grad=False)
    model, context = nn.Sequential(nn.LSTM(8, 8), frozen, nn.Linear(8, 32)), Context()
    Tied(what="layers").transform(model, context)
    assert len(context.record.skipped) == 4
    assert "recurrent" in context.record.skipped[0]["reason"]


def test_crops_are_the_middle_of_the_largest_kernel() -> None:
    model, context = branches(), Context(task=task())
    tied = Tied(what="crops").transform(branches(), context)
    a, b, c = tied.a, tied.b, tied.c
    assert isinstance(a, CroppedConv2d)
    assert isinstance(c, CroppedConv2d)
    assert a.weight is b.weight is c.weight  # type: ignore[union-attr]
    weight = b.weight.detach()  # type: ignore[union-attr, operator]
    middle = (model.a.weight[..., 1, 1] + model.b.weight[..., 2, 2] + model.c.weight[..., 0, 0]) / 3
    assert torch.allclose(weight[..., 2, 2], middle)
    assert torch.allclose(weight[..., 1, 2], (model.a.weight[..., 0, 1] + model.b.weight[..., 1, 2]) / 2)
    assert torch.equal(weight[..., 0, 0], model.b.weight[..., 0, 0])
    conv = nn.functional.conv2d
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(a(x), conv(x, weight[..., 1:4, 1:4].contiguous(), model.a.bias, padding=1))
    assert torch.equal(c(x), conv(x, weight[..., 2:3, 2:3].contiguous()))
    assert {row["name"] for row in context.record.skipped} == {"d.weight", "e.weight"}


@pytest.mark.parametrize("what", ["crops", "layers"])
def test_files_and_checkpoints_hold_one_weight(what: Any, tmp_path: Path) -> None:
    model, data = branches(), task()
    before = write_files(model, model, Context(task=data), FileOptions(floats="fp32"), tmp_path)
    tied = Tied(what=what, epochs=1)(model, Context(task=data)).eval()
    after = write_files(tied, model, Context(task=data), FileOptions(floats="fp32"), tmp_path)
    x = data.example()[0]
    for name, file in after.files.items():
        saved = {"crops": 4 * 6 * (9 + 1), "layers": 36}[what] * 4
        assert file["bytes"] < before.files[name]["bytes"] - saved + 330, "the plan takes some bytes of its own"
    assert torch.allclose(after.model(x), tied(x), atol=1e-6)
    save_model(tied, tmp_path / "kept")
    kept = load_model(branches(), tmp_path / "kept").eval()
    assert applied(kept) == applied(tied)
    assert torch.equal(kept(x), tied(x))
    coarse = Quantize(bits=4, epochs=0)(kept, Context(task=data)).eval()
    assert {slot.name: slot.names for slot in slots(coarse).values()} == {
        slot.name: slot.names for slot in slots(tied).values()
    }
    assert bits(frozen_copy(coarse, through_file=True).state_dict()) == bits(plain(coarse).state_dict())


def test_what_cannot_be_cropped_is_said() -> None:
    shared = nn.Conv2d(4, 4, 3)
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({
        "even": nn.Conv2d(4, 4, 4), "big": nn.Conv2d(4, 4, 5), "same": nn.Conv2d(4, 4, 5), "hooked": hooked,
        "up": nn.ConvTranspose2d(4, 4, 3), "one": shared, "flat": nn.Conv1d(4, 4, 3),
    })  # fmt: skip
    tied = nn.Conv2d(4, 4, 3)
    tied.weight = shared.weight
    model["two"] = tied
    context = Context()
    Tied(what="crops").transform(model, context)
    reasons = {row["name"]: row["reason"] for row in context.record.skipped}
    assert "middle of that of big.weight" in reasons["even.weight"]
    assert "middle of that of big.weight" in reasons["same.weight"]
    assert "hooks" in reasons["hooked.weight"]
    assert "Conv1d, Conv2d and Conv3d" in reasons["up.weight"]
    assert "several layers" in reasons["one.weight"]
    assert "smaller kernel" in reasons["flat.weight"]


@pytest.mark.parametrize("what", ["crops", "layers"])
def test_masks_are_kept_or_given_up_on_purpose(what: Any) -> None:
    pruned = Prune(sparsity=0.5)(branches(), Context())
    with pytest.raises(PhaseError, match="weight"):
        Tied(what=what)(pruned, Context())
    assert len(slots(Tied(what=what, densify=True)(pruned, Context()))) < len(slots(pruned))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"path": "a", "to": "f.weight"}, UnknownNameError, "f.weight"),
        ({"path": "f", "to": "b.weight"}, UnknownNameError, "f.weight"),
        ({"path": "d", "to": "b.weight"}, ModelError, "Linear"),
        ({"path": "b", "to": "a.weight"}, ModelError, "no middle"),
        ({"path": "a", "to": "d.weight"}, ModelError, "no middle"),
        ({"path": "a", "to": 3}, Corrupt, "crop"),
    ],
)
def test_a_forged_crop_is_refused(edit: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Plan.from_json([{"edit": "crop", **edit}]).apply(branches())


def test_a_crop_is_plain_data() -> None:
    plan = Plan((Crop(path="a", to="b.weight"),))
    assert Plan.from_json(plan.to_json()) == plan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(plan.apply(branches()).a, CroppedConv2d)
