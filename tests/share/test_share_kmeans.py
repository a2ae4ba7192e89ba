"""Weight sharing: zero is a symbol of its own, groups share one table, only the table's values are fine-tuned."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from espalier.core.cluster import Floats, exact, squared_error
from espalier.core.context import Context
from espalier.core.errors import NumericError, PhaseError, UnknownNameError, UsageError
from espalier.core.forms import Shared
from espalier.core.method import Technique
from espalier.core.parametrize import freeze, slots
from espalier.core.record import Record
from espalier.core.representation import Codebook
from espalier.core.task import Task, classification
from espalier.prune import Prune
from espalier.share import KMeans
from espalier.share.kmeans import assign, cluster
from espalier.testing import EXAMPLES, bits, effective, outputs
from espalier.train import SGD, Constant, Finetune

BY_NAME = {example.name: example for example in EXAMPLES}


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Conv2d(1, 6, 3)
        return nn.Sequential(body, nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.ReLU(), nn.Linear(12, 3))


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 1, 6, 6, generator=generator), torch.arange(4) % 3) for _ in range(5)]
    return classification(data, data[:1])


def shared(model: nn.Module) -> dict[str, tuple[Shared, Tensor]]:
    found = {}
    for name, slot in slots(model).items():
        if isinstance(slot.form, Shared):
            found[name] = slot.form, slot.latent
    return found


def records(method: Technique, model: nn.Module) -> Record:
    kept: list[Record] = []

    class Watching(Context):
        def perform(self, technique: Technique, model: nn.Module) -> nn.Module:
            kept.append(self.record)
            return super().perform(technique, model)

    method(model, Watching())
    return kept[0]


@given(width=st.integers(1, 6), sparsity=st.sampled_from([0.0, 0.3, 0.9]), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("algorithm", ["lloyd", "exact"])
def test_symbols_and_zeros(algorithm: str, width: int, sparsity: float, seed: int) -> None:
    pruned = Prune(sparsity=sparsity)(net(seed))
    result = KMeans(bits=width, algorithm=algorithm)(pruned)  # type: ignore[arg-type]
    frozen = freeze(result)[0]
    for name, (form, latent) in shared(result).items():
        before, after = effective(pruned)[name], effective(result)[name]
        assert form.zero == bool((before == 0).any())
        assert latent.numel() + int(form.zero) <= 2**width
        assert torch.equal(before == 0, form.index == 0) or not form.zero
        assert not after[before == 0].any()
        stored = frozen[name]
        assert isinstance(stored, Codebook)
        assert stored.centroids.size <= 2**width
        assert stored.has_zero == form.zero
        centroids = latent.detach().double().numpy()
        kept = before[before != 0].double()
        nearest = (kept.unsqueeze(1) - torch.from_numpy(centroids)).abs().min(dim=1).values
        found = (kept - after[before != 0].double()).abs()
        assert torch.allclose(found, nearest, atol=1e-6)


def test_every_weight_goes_to_its_nearest_centroid_and_the_optimum_is_found() -> None:
    model = net()
    result = KMeans(bits=3, algorithm="exact")(model)
    weight = effective(model)["3.weight"].double().flatten().sort().values.numpy()
    best = squared_error(weight, exact(weight, 8))
    got = float((effective(result)["3.weight"].double() - effective(model)["3.weight"].double()).square().sum())
    assert got == pytest.approx(best, rel=1e-5)
    lloyd = KMeans(bits=3)(model)
    assert float((effective(lloyd)["3.weight"] - effective(model)["3.weight"]).square().sum()) >= got * (1 - 1e-5)


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_every_init_shares(init: str) -> None:
    one, again = (KMeans(bits=3, init=init)(net()) for _ in range(2))  # type: ignore[arg-type]
    assert bits(effective(one)) == bits(effective(again))
    assert effective(one)["3.weight"].unique().numel() <= 8


def test_random_init_belongs_to_the_seed() -> None:
    method = KMeans(bits=4, init="random")
    one, other = (effective(method(net(), Context(seed=seed)))["3.weight"] for seed in (0, 1))
    assert not torch.equal(one, other)


def test_without_keep_zero_zeros_are_values_like_any_other() -> None:
    pruned = Prune(sparsity=0.5)(net())
    result = KMeans(bits=2, keep_zero=False)(pruned)
    assert all(not form.zero for form, _ in shared(result).values())
    assert all(latent.numel() <= 4 for _, latent in shared(result).values())


def test_bits_by_pattern() -> None:
    result = KMeans(bits={"type:Conv2d": 4, "type:Linear": 2, "#-1": 1})(net())
    assert {name: latent.numel() for name, (_, latent) in shared(result).items()} == {
        "0.weight": 16, "3.weight": 4, "5.weight": 2,
    }  # fmt: skip
    with pytest.raises(UnknownNameError, match=r"share.kmeans: no weight answers to 'type:Conv3d'"):
        KMeans(bits={"type:Conv3d": 4})(net())
    with pytest.raises(UsageError, match="bits="):
        KMeans(bits={"0": 17})


@pytest.mark.parametrize(
    ("group", "tables"),
    [
        ("layer", [{"0.weight"}, {"3.weight"}, {"5.weight"}]),
        ("type", [{"0.weight"}, {"3.weight", "5.weight"}]),
        ("all", [{"0.weight", "3.weight", "5.weight"}]),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_group_shares_one_latent_parameter(group: str, tables: list[set[str]], sparsity: float) -> None:
    result = KMeans(bits=3, group=group)(Prune(sparsity=sparsity)(net()))  # type: ignore[arg-type]
    found: dict[int, set[str]] = {}
    for name, (form, latent) in shared(result).items():
        found.setdefault(id(latent), set()).add(name)
        assert form.zero == (sparsity > 0)
    assert list(found.values()) == tables
    assert len([p for p in result.parameters() if p.ndim == 1]) == 3 + len(tables)
    for names in tables:
        values = {value for name in names for value in effective(result)[name].unique().tolist()}
        assert len(values) <= 8
    tuned = Finetune(epochs=1, lr=0.1)(result, Context(task=task()))
    again: dict[int, set[str]] = {}
    for name, (_, latent) in shared(tuned).items():
        again.setdefault(id(latent), set()).add(name)
    assert list(again.values()) == tables


def test_groups_of_different_bits_stay_apart() -> None:
    result = KMeans(bits={"*": 3, "5": 2}, group="all")(net())
    found = shared(result)
    assert found["0.weight"][1] is found["3.weight"][1]
    assert found["5.weight"][1] is not found["3.weight"][1]
    assert found["5.weight"][1].numel() == 4


def test_only_values_of_the_table_are_fine_tuned() -> None:
    before = KMeans(bits=3)(Prune(sparsity=0.5)(net()))
    after = Finetune(epochs=2, lr=0.05)(before, Context(task=task()))
    for name, (form, latent) in shared(before).items():
        form_after, latent_after = shared(after)[name]
        assert torch.equal(form.index, form_after.index)
        assert latent.shape == latent_after.shape
        assert not torch.equal(latent, latent_after)
        assert torch.equal(effective(after)[name] == 0, effective(before)[name] == 0)


def test_epochs_fine_tune_the_centroids_by_summed_gradients() -> None:
    """One step of plain gradient descent, by brute force."""
    data = task()
    one = Task(train=list(data.data("train"))[:1], loss=data.loss)
    options = {"lr": 0.1, "optimizer": SGD(momentum=0.0), "lr_schedule": Constant()}
    start = KMeans(bits=2)(net())
    tuned = KMeans(bits=2, epochs=1, **options)(net(), Context(task=one))  # type: ignore[arg-type]
    weights = {name: w.clone().requires_grad_() for name, w in effective(start).items()}
    batch = next(iter(one.data("train")))
    one.training_loss(torch.func.functional_call(net(), weights, batch[0]), batch).backward()
    for name, (form, latent) in shared(start).items():
        gradient = weights[name].grad
        assert gradient is not None
        summed = torch.stack([gradient[form.index == symbol].sum() for symbol in range(latent.numel())])
        assert torch.allclose(shared(tuned)[name][1], latent - 0.1 * summed, atol=1e-5)


def test_sharing_again_is_refused_unless_given_up() -> None:
    first = KMeans(bits=3)(net())
    with pytest.raises(PhaseError, match=r"share.kmeans would change 0.weight.*densify"):
        KMeans(bits=2)(first)
    again = KMeans(bits=2, densify=True)(first)
    assert all(latent.numel() == 4 for _, latent in shared(again).values())
    only = KMeans(bits=2, layers=("5",))(KMeans(bits=3, layers=("0", "3"))(net()))
    assert {name: latent.numel() for name, (_, latent) in shared(only).items()} == {
        "0.weight": 8, "3.weight": 8, "5.weight": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tied", "twice", "recurrent", "attention"])
def test_awkward_owners(name: str) -> None:
    example = BY_NAME[name]
    model, data = example.build(), example.task()
    result = KMeans(bits=2)(model, Context(task=data))
    expected = {n for n, w in effective(model).items() if w.ndim >= 2}
    assert set(shared(result)) == expected
    assert all(effective(result)[n].unique().numel() <= 4 for n in expected)
    assert outputs(result, data)[0].shape == outputs(model, data)[0].shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    result = KMeans(bits=3)(Prune(sparsity=0.5)(net().to(dtype)))
    for name, (form, latent) in shared(result).items():
        assert latent.dtype == dtype
        weight = effective(result)[name]
        assert weight.dtype == dtype
        assert weight.unique().numel() <= 8
        assert torch.equal(weight == 0, form.index == 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_clustered_is_refused(bad: float) -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = bad
    with pytest.raises(NumericError, match=r"3.weight holds NaN or infinity"):
        KMeans()(model)


@pytest.mark.parametrize("value", [0.25, 0.0])
def test_constant_and_empty_layers(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, value)
    result = KMeans(bits=1)(model)
    assert effective(result)["0.weight"].unique().tolist() == [value]
    frozen = freeze(result)[0]["0.weight"]
    assert np.array_equal(frozen.dense(), effective(result)["0.weight"].numpy())


def test_one_bit_on_a_pruned_layer_leaves_one_value() -> None:
    result = KMeans(bits=1)(Prune(sparsity=0.5)(net()))
    for form, latent in shared(result).values():
        assert form.zero
        assert latent.numel() == 1


def test_the_record_tells_what_it_cost() -> None:
    model = net()
    record = records(KMeans(bits=3, group="type"), model)
    books = record.details["codebooks"]
    assert set(books) == {"Conv2d", "Linear"}
    linear = books["Linear"]
    assert linear["layers"] == ["3.weight", "5.weight"]
    assert (linear["bits"], linear["symbols"], linear["bin_error"]) == (3, 8, 0.0)
    result = KMeans(bits=3, group="type")(model)
    errors = [effective(result)[n].double() - effective(model)[n].double() for n in linear["layers"]]
    rms = torch.cat([e.flatten() for e in errors]).square().mean().sqrt().item()
    assert linear["rms_error"] == pytest.approx(rms, rel=1e-4)


# --- the kernels -------------------------------------------------------------------------------------------------

values = st.lists(st.floats(-4, 4).filter(lambda x: x != 0), min_size=1, max_size=40).map(
    lambda v: np.sort(np.array(v, dtype=np.float32)).astype(np.float64)
)


@given(data=values, width=st.integers(1, 4), zero=st.booleans(), algorithm=st.sampled_from(["lloyd", "exact"]))
@settings(max_examples=60, deadline=None)
def test_cluster(data: Floats, width: int, zero: bool, algorithm: str) -> None:
    found = cluster(
        data, width, algorithm=algorithm, init="linear", bins=2**14, zero=zero, rng=np.random.default_rng(0)
    )
    assert 1 <= len(found.centroids) <= max(1, 2**width - int(zero))
    assert found.zero == zero
    assert found.bin_error == 0
    distance = np.abs(data[:, None] - found.centroids[None, :]).min(axis=1)
    assert found.squared_error == pytest.approx(float((distance**2).sum()), rel=1e-6, abs=1e-9)


def test_more_values_than_bins_state_the_bin_error() -> None:
    data = np.sort(np.random.default_rng(0).normal(size=5000))
    options = {"algorithm": "exact", "init": "linear", "zero": False, "rng": np.random.default_rng(0)}
    coarse, fine = (cluster(data, 3, bins=bins, **options) for bins in (64, 10_000))  # type: ignore[arg-type]
    width = (data[-1] - data[0]) / 64
    assert 0 < coarse.bin_error <= width
    assert fine.bin_error == 0
    assert (
        fine.squared_error
        <= coarse.squared_error
        <= (math.sqrt(fine.squared_error) + 2 * math.sqrt(5000) * coarse.bin_error) ** 2
    )


@given(data=values, seed=st.integers(0, 99), zero=st.booleans())
@settings(max_examples=60, deadline=None)
def test_assign(data: Floats, seed: int, zero: bool) -> None:
    rng = np.random.default_rng(seed)
    centroids = np.unique(rng.normal(size=5))
    weight = torch.from_numpy(np.concatenate([data, [0.0, -0.0]])).float()
    index = assign(weight, centroids, zero=zero)
    assert index.dtype == torch.int32
    if zero:
        assert torch.equal(index == 0, weight == 0)
        weight, index = weight[weight != 0], index[weight != 0] - 1
    chosen = torch.from_numpy(centroids)[index.long()]
    nearest = (weight.double().unsqueeze(1) - torch.from_numpy(centroids)).abs().min(dim=1).values
    assert torch.allclose((weight.double() - chosen).abs(), nearest, atol=1e-12)


def test_assign_without_centroids() -> None:
    assert assign(torch.zeros(2, 3), np.zeros(0), zero=True).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_frozen_weights_and_other_dtypes_share_no_table_with_the_rest() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).double())
    model[1].requires_grad_(requires_grad=False)
    before = effective(model)
    result = KMeans(bits=2, group="all")(model)
    found = shared(result)
    assert found["0.weight"][1] is found["2.weight"][1]
    assert len({id(latent) for _, latent in found.values()}) == 3
    for name, (_, latent) in found.items():
        assert latent.requires_grad == (name != "1.weight")
        assert latent.dtype == before[name].dtype
    books = records(KMeans(bits=2, group="all"), model).details["codebooks"]
    assert [book["layers"] for book in books.values()] == [["0.weight", "2.weight"], ["1.weight"], ["3.weight"]]


def test_a_table_with_max_norm_is_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 4))
    record = records(KMeans(bits=2), model)
    assert "max_norm" in record.skipped[0]["reason"]
    KMeans(bits=2)(model)(torch.arange(8)).sum().backward()
