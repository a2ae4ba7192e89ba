"""Which layers are split, how, and why others are not: ties, hooks, frozen weights, recurrent layers, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.factorize.splitting import numbers, run, seeded, skipped
from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import NeedError, NoEffectWarning, NumericError, PhaseError, UnknownNameError
from espalier.core.parametrize import freeze, slots
from espalier.core.plan import Plan, applied
from espalier.core.structures.form import StructuredWeight
from espalier.core.task import Task
from espalier.factorize import (
    SVD,
    ActivationAwareSVD,
    Autoencoder,
    BasisFilters,
    ChannelSVD,
    Factorization,
    Fixed,
    LowRankTraining,
    Ratio,
    SpatialSVD,
    TensorTrain,
    Tucker,
)
from espalier.prune import Prune
from espalier.share import KMeans
from espalier.testing import EXAMPLES

BY_NAME = {example.name: example for example in EXAMPLES}


def task_of(*batches: Any) -> Task:
    return Task(train=list(batches), val=list(batches[:1]), loss=_squares)


def _squares(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


def on(name: str, method: Factorization) -> tuple[nn.Module, nn.Module, Any]:
    example = BY_NAME[name]
    model = example.build()
    after, record = run(method, model, example.task())
    return model, after, record


def kept_as_factors(model: nn.Module) -> dict[str, int]:
    """Name -> rank of the weights that are kept as factors."""
    return {
        name: slot.form.structure.rank  # type: ignore[attr-defined]
        for name, slot in slots(model).items() if isinstance(slot.form, StructuredWeight)
    }  # fmt: skip


def test_a_tied_weight_stays_tied_and_is_kept_as_factors() -> None:
    model, after, record = on("tied", SVD())
    assert kept_as_factors(after) == {"embed.weight": 2}
    assert slots(after)["embed.weight"].names == ["embed.weight", "head.weight"]
    assert numbers(after) < numbers(model)
    assert "2 places (embed.weight, head.weight)" in record.details["factors"][0]["why"]


def test_what_an_earlier_step_keeps_as_factors_is_left_alone_unless_named() -> None:
    _, after, _ = on("tied", SVD())
    again, record = run(ChannelSVD(), after)
    assert kept_as_factors(again) == kept_as_factors(after)
    assert skipped(record)["embed.weight"] == "an earlier step keeps it as factors"
    with pytest.raises(PhaseError, match="densify"):
        run(SVD(layers=("embed",)), after)


def test_others_by_svd_reach_what_a_module_reads_itself() -> None:
    _, after, _ = on("recurrent", Tucker(others="svd", rank=Ratio()))
    assert sorted(kept_as_factors(after)) == ["lstm.weight_hh_l0", "lstm.weight_ih_l0"]


def test_a_layer_under_two_names_is_kept_as_factors() -> None:
    _, after, _ = on("twice", SVD())
    assert kept_as_factors(after) == {"block.weight": 1}
    assert after.block is after.again


def test_a_bias_of_two_layers_stays_theirs() -> None:
    with seeded():
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].bias = model[0].bias
    after, record = run(SVD(), model)
    assert after[0].bias is after[2].bias  # type: ignore[index]
    assert set(kept_as_factors(after)) == {"0.weight", "2.weight"}
    assert {row["why"] for row in record.details["factors"]} == {"its bias has other owners too"}


@pytest.mark.parametrize(("name", "weights"), [
    ("recurrent", ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
    ("attention", ["attention.in_proj_weight", "attention.out_proj.weight"]), ("hooked", ["0.weight"]),
    ("frozen", ["0.weight"]),
])  # fmt: skip
def test_what_its_module_reads_itself_is_kept_as_factors(name: str, weights: list[str]) -> None:
    model, after, _ = on(name, SVD(rank=Ratio()))
    assert sorted(kept_as_factors(after)) == sorted(weights)
    for weight in weights:
        slot, before = slots(after)[weight], slots(model)[weight]
        assert slot.latent.requires_grad == before.latent.requires_grad
        rank = kept_as_factors(after)[weight]
        assert int(torch.linalg.matrix_rank(slot.value(), rtol=1e-5)) == rank
        u, s, vh = torch.linalg.svd(before.value())
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert torch.allclose(slot.value(), best, atol=1e-4)


def test_factors_train_and_are_stored_as_such() -> None:
    example = BY_NAME["recurrent"]
    after, _ = run(SVD(epochs=1, lr=0.01), example.build(), example.task())
    fresh, _ = run(SVD(), example.build(), example.task())
    name = "lstm.weight_hh_l0"
    assert not torch.equal(slots(after)[name].value(), slots(fresh)[name].value())
    tensors, _ = freeze(after)
    assert tensors[name].bits() == 32 * slots(after)[name].latent.numel()


@pytest.mark.parametrize("method", [ChannelSVD(), SpatialSVD(), Tucker(), BasisFilters(), TensorTrain(), Autoencoder()],
                         ids=lambda m: m.id)  # fmt: skip
def test_methods_that_give_layers_only_skip_by_name(method: Factorization) -> None:
    _, after, record = on("recurrent", method)
    assert not kept_as_factors(after)
    assert skipped(record)["lstm.weight_hh_l0"].startswith("a LSTM reads its weights itself, and factorize.")


def test_the_layers_of_a_transformer_stay_where_they_are_read() -> None:
    with seeded():
        model, x = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval(), torch.randn(2, 5, 16)
    for task in (None, task_of((x,))):
        after, _ = run(SVD(rank=Ratio()), model, task)
        assert set(kept_as_factors(after)) == {
            "0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight", "0.linear1.weight", "0.linear2.weight",
        }  # fmt: skip
        with torch.no_grad():
            assert after.eval()(x).shape == x.shape


class Reader(nn.Module):
    """Reads the weight of one of its layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias))


def test_a_weight_that_other_code_reads_is_found_out() -> None:
    with seeded():
        model, x = Reader(), torch.randn(3, 12)
    after, record = run(SVD(), model, task_of((x,)))
    assert set(kept_as_factors(after)) == {"read.weight"}
    assert isinstance(after.called, nn.Sequential)
    whys = {row["name"]: row.get("why") for row in record.details["factors"]}
    assert whys == {"read.weight": "other code of the model reads the weights of its module", "called.weight": None}
    _, record = run(TensorTrain(cores=2), model, task_of((x,)))
    assert "other code" in skipped(record)["read.weight"]


def test_a_row_that_computes_more_says_so() -> None:
    with seeded():
        model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(2, 64)
    _, record = run(TensorTrain(cores=2, rank=Ratio(keep=0.5)), model, task_of((x,)))
    (row,) = record.details["factors"]
    assert row["parameters"][1] <= 0.5 * row["parameters"][0]
    assert row["macs"][1] > row["macs"][0]
    assert record.notes == [f"0.weight: smaller, but {row['macs'][1]} multiplications where there were 4096."]


def test_what_is_no_layer_is_skipped() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.place, self.bilinear = nn.Parameter(torch.randn(6, 8)), nn.Bilinear(8, 8, 8)
            self.wide, self.sparse = nn.ConvTranspose2d(8, 8, 3), nn.Embedding(20, 8, max_norm=1.0)

    _, record = run(SVD(), Odd())
    reasons = skipped(record)
    assert reasons["place"] == "place of a Odd is no layer that can be split"
    assert "Bilinear" in reasons["bilinear.weight"]
    assert "ConvTranspose2d" in reasons["wide.weight"]
    assert "max_norm" in reasons["sparse.weight"]
    assert len(reasons) == 4


def test_a_model_that_is_one_layer_is_kept_as_factors() -> None:
    after, record = run(SVD(), nn.Linear(20, 20))
    assert list(kept_as_factors(after)) == ["weight"]
    assert record.details["factors"][0]["why"] == "it is the whole model"


def test_other_types_of_numbers() -> None:
    after, _ = run(SVD(), nn.Sequential(nn.Linear(20, 20)).double())
    assert list(kept_as_factors(after)) == ["0.weight"]
    assert after(torch.randn(2, 20, dtype=torch.float64)).dtype == torch.float64
    _, record = run(TensorTrain(cores=2), nn.Sequential(nn.Linear(20, 20)).double())
    assert "float64" in skipped(record)["0.weight"]


@pytest.mark.parametrize("before", [Prune(sparsity=0.5), KMeans(bits=3)], ids=["mask", "codes"])
def test_what_an_earlier_step_fixed_is_respected(before: Any) -> None:
    with seeded():
        model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20))
    fixed = before(model, Context())
    with pytest.raises(PhaseError, match="densify"):
        run(SVD(), fixed)
    after, _ = run(SVD(densify=True), fixed)
    assert isinstance(after[0], nn.Sequential)


def test_the_plan_builds_the_same_layers() -> None:
    with seeded():
        model = nn.Sequential(nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), nn.Flatten(),
                              nn.Linear(8 * 36, 24), nn.Embedding(10, 3))  # fmt: skip
        fresh = nn.Sequential(nn.Conv2d(6, 8, 3, padding="same", padding_mode="reflect"), nn.Flatten(),
                              nn.Linear(8 * 36, 24), nn.Embedding(10, 3))  # fmt: skip
    after, _ = run(SVD(rank=Ratio()), model)
    after, _ = run(Tucker(), after)
    plan = Plan.from_json(applied(after).to_json())
    assert len(plan.edits) == 3
    replayed = plan.apply(fresh)
    replayed.load_state_dict(after.state_dict())
    x = torch.randn(2, 6, 6, 6)
    assert torch.equal(replayed[:3](x), after[:3](x))


def test_the_rows_of_an_earlier_step_are_left_alone_unless_they_are_named() -> None:
    with seeded():
        model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(12 * 49, 16))
    rows, _ = run(Tucker(), model)
    after, record = run(SVD(), rows)
    assert skipped(record)["0.0.weight"] == "it is in the row that an earlier step put in the place of 0"
    assert [row["name"] for row in record.details["factors"]] == ["2.weight"]
    assert isinstance(after[0][0], nn.Conv2d)  # type: ignore[index]
    after, _ = run(SVD(layers=("0.0",), rank=Ratio(keep=0.9)), rows)
    assert isinstance(after[0][0], nn.Sequential)  # type: ignore[index]


def test_patterns_choose_layers() -> None:
    with seeded():
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    after, _ = run(SVD(layers=("#-1",)), model)
    assert isinstance(after[0], nn.Linear)
    assert isinstance(after[1], nn.Sequential)
    with pytest.raises(UnknownNameError, match="nope"):
        run(SVD(layers=("nope",)), model)


def test_data_is_asked_for_where_it_is_needed() -> None:
    for method in (ActivationAwareSVD(), Autoencoder(), LowRankTraining(), SVD(epochs=1)):
        with pytest.raises(NeedError, match="training data"):
            method(nn.Sequential(nn.Linear(9, 9)), Context())
    for method in (SVD(), Autoencoder(of="weight")):
        method(nn.Sequential(nn.Linear(9, 9)), Context())


def test_inputs_that_are_not_numbers_are_refused() -> None:
    x = torch.randn(4, 12)
    x[0, 0] = float("nan")
    for method in (ActivationAwareSVD(), Autoencoder()):
        with pytest.raises(NumericError, match=r"0\.weight hold NaN"):
            run(method, nn.Sequential(nn.Linear(12, 12)), task_of((x,)))


def test_a_layer_that_nothing_reaches_is_said() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Any:
            return self.used(x)

    for method in (ActivationAwareSVD(), Autoencoder(), TensorTrain(cores=2)):
        _, record = run(method, Idle(), task_of((torch.randn(4, 12),)))
        assert "idle.weight" in skipped(record)


def test_activation_awareness_of_a_weight_that_stays() -> None:
    """A convolution with a hook keeps its module; with groups its columns have no one input."""
    with seeded():
        model, x = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, groups=2)), torch.randn(2, 6, 9, 9)
    for layer in model:
        layer.register_forward_hook(lambda *_: None)
    after, record = run(ActivationAwareSVD(), model, task_of((x,)))
    assert list(kept_as_factors(after)) == ["0.weight"]
    assert "its groups read different inputs" in skipped(record)["1.weight"]


def test_sequences_go_through_rows_of_layers_but_not_through_chains() -> None:
    with seeded():
        model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 5, 16)
    for method in (SVD(), ActivationAwareSVD(), Autoencoder()):
        after, _ = run(method, model, task_of((x,)))
        assert after(x).shape == x.shape
    _, record = run(TensorTrain(cores=2), model, task_of((x,)))
    assert "3 dimensions" in skipped(record)["0.weight"]
    _, record = run(TensorTrain(cores=2), model)
    assert "not known" in skipped(record)["0.weight"]


def test_nothing_to_do_is_a_warning() -> None:
    with pytest.warns(NoEffectWarning, match="too small to gain"):
        SVD()(nn.Sequential(nn.Linear(2, 2)), Context())


def test_the_number_of_basis_filters_divides() -> None:
    with seeded():
        model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3))
    after, record = run(BasisFilters(divide=4, rank=Fixed(rank=2)), model)
    assert skipped(record) == {"0.weight": "its 6 inputs do not divide into 4 parts"}
    first, second = after[1]
    assert (first.groups, first.out_channels, second.kernel_size) == (4, 8, (1, 1))


def test_multiplications_are_counted_as_the_layers_do_them() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with seeded():
        model = nn.Sequential(
            nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(8, 12, (3, 5), padding="same", dilation=2), nn.Flatten(),
            nn.Linear(12 * 36, 24),
        )  # fmt: skip
        x = torch.randn(1, 6, 12, 12)
    for method in (ChannelSVD(), SpatialSVD(), Tucker(), TensorTrain(cores=2)):
        after, record = run(method.replace(rank=Ratio(keep=0.4)), model, task_of((x,)))
        changes = sum(row["macs"][1] - row["macs"][0] for row in record.details["factors"])
        counted = []
        for net in (model, after):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(x)
            counted.append(counter.get_total_flops() // 2)
        assert counted[1] - counted[0] == changes, method.id
