from __future__ import annotations

import copy

import pytest
import torch
from tests.graph.networks import ZOO, Attention, Dicts, LeNet5, Recurrent, ResNet, SqueezeNet, TwoInputs
from tests.graph.support import assert_same, reloaded, runner_of, specs_of, tensors_of
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree

from espalier.core.errors import ModelError, UsageError
from espalier.graph import Runner, dumps, loads, trace


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ZOO)
def test_runner_equals_model_at_every_batch(name):
    check_round_trip(*ZOO[name], traced_at=1)


def test_the_traced_batch_does_not_matter():
    check_round_trip(*ZOO["two-inputs"], traced_at=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build", [lambda: ResNet(3), lambda: ResNet(9), SqueezeNet], ids=["resnet20", "resnet56", "squeezenet"]
)
def test_benchmark_networks_round_trip(build):
    side = 64 if build is SqueezeNet else 32
    check_round_trip(build, lambda batch: ((torch.randn(batch, 3, side, side),), {}), traced_at=1)


def check_round_trip(build, call, traced_at):
    model = build().eval()
    args, kwargs = call(traced_at)
    graph = trace(model, args, kwargs)
    assert reloaded(graph) == graph
    runner = runner_of(model, graph)
    assert set(runner.state_dict()) == set(model.state_dict())
    for batch in (1, 2, 7):
        args, kwargs = call(batch)
        with torch.no_grad():
            expected = model(*copy.deepcopy(args), **kwargs)
            assert_same(runner(*args, **kwargs), expected)
            assert_same(copy.deepcopy(runner)(*args, **kwargs), expected)


@pytest.mark.parametrize("name", ZOO)
def test_runner_trains_a_step(name):
    build, call = ZOO[name]
    model = build().eval()
    graph = trace(model, *call(2))
    runner = runner_of(model, graph).train()
    before = {key: p.detach().clone() for key, p in runner.named_parameters()}
    optimizer = torch.optim.SGD(runner.parameters(), 0.1)
    args, kwargs = call(4)
    results = _pytree.tree_leaves(runner(*args, **kwargs))
    tensors = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
    sum((t * torch.randn_like(t)).sum() for t in tensors).backward()
    optimizer.step()
    changed = [key for key, p in runner.named_parameters() if not torch.equal(p, before[key])]
    assert changed
    original = dict(model.named_parameters())
    assert all(torch.equal(original[key], before[key]) for key in before)


def test_train_step_equals_the_original_bit_for_bit():
    """Real batch norm, real dropout mask order: the same step from the same seed."""
    model = ResNet(1)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    graph = trace(model, (x,))
    runner = Runner(graph, tensors_of(model, graph))
    for network in (model, runner):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    expected = model.state_dict()
    for name, tensor in runner.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert int(runner.state_dict()["bn1.num_batches_tracked"]) == 2


def test_dropout_follows_the_mode_and_functional_dropout_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(50, 50), nn.Dropout(0.5)

        def forward(self, x):
            return F.dropout(self.drop(self.fc(x)), 0.5, self.training)

    model = Net().eval()
    runner = runner_of(model, trace(model, (torch.randn(2, 50),)))
    assert sum(isinstance(m, nn.Dropout) for m in runner.modules()) == 2
    x = torch.randn(4, 50)
    assert torch.equal(runner(x), runner(x))
    runner.train()
    assert 0.6 < (runner(x) == 0).float().mean() < 0.9


def test_attention_and_recurrence_keep_their_dropout_in_train_mode():
    for model, x in (
        (Recurrent(), torch.randn(3, 5, 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, 0.3), torch.randn(3, 5, 8)),
    ):
        model.eval()
        runner = runner_of(model, trace(model, (x,)))
        assert torch.equal(runner(x), runner(x))
        runner.train()
        assert not torch.equal(runner(x), runner(x))


def test_fused_attention_keeps_its_dropout_also_when_traced_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, 0.5, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Net().eval(), torch.randn(3, 5, 8)
    runner = runner_of(model, trace(model, (x,)))
    for network in (runner, runner_of(runner, trace(runner, (x,)))):
        assert_same(network.eval()(x), model(x))
        assert not torch.equal(network.train()(x), network(x))


def test_batch_norm_without_a_module_of_its_own_still_follows_the_mode():
    model = nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    runner = Runner(trace(model, (x,)), model.state_dict())
    assert torch.equal(runner(x), model(x))
    assert torch.equal(runner.running_var, model.running_var)
    assert torch.equal(runner.eval()(x), model.eval()(x))


def test_layers_are_real_torch_modules():
    model = ResNet(1).eval()
    runner = runner_of(model, trace(model, (torch.randn(2, 3, 32, 32),)))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            assert type(runner.get_submodule(name)) is type(module), name


def test_tied_weights_stay_one_parameter_and_both_layers_are_real():
    model = Dicts().eval()
    graph = trace(model, *ZOO["dicts"][1](2))
    assert graph.aliases == {"head.weight": "embed.weight"}
    runner = runner_of(model, graph)
    assert runner.embed.weight is runner.head.weight
    assert isinstance(runner.embed, nn.Embedding)
    assert isinstance(runner.head, nn.Linear)
    assert len(list(runner.parameters())) == 1


def test_roles_survive_frozen_parameters_buffers_and_constants():
    model = TwoInputs().eval()
    model.fc.weight.requires_grad_(False)
    graph = reloaded(trace(model, *ZOO["two-inputs"][1](2)))
    assert graph.tensors["fc.weight"].role == "frozen"
    assert graph.tensors["bn.running_var"].role == "buffer"
    assert sorted(n for n, s in graph.tensors.items() if s.role == "constant") == ["_constant.0", "_constant.1"]
    traced = trace(model, *ZOO["two-inputs"][1](2))
    runner = Runner(graph, tensors_of(model, traced), frozen=("fc.bias",))
    assert not runner.fc.weight.requires_grad
    assert not runner.fc.bias.requires_grad
    assert runner.token.requires_grad
    assert set(runner.tensors()) == set(graph.tensors)


def test_a_replaced_layer_is_the_one_that_runs():
    model = LeNet5().eval()
    x = torch.randn(2, 1, 28, 28)
    runner = runner_of(model, trace(model, (x,)))
    runner.fc1 = nn.Sequential(nn.Linear(800, 3), nn.Linear(3, 500))
    model.fc1 = runner.fc1
    assert_same(runner(x), model(x))


def test_batch_norm_as_scale_and_shift():
    model = ResNet(1).eval()
    x = torch.randn(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
    graph = trace(model, (x,))
    statistics = {
        n for n in graph.tensors if n.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }
    smaller = graph.without_statistics(statistics)
    assert set(graph.tensors) - set(smaller.tensors) == statistics
    runner = runner_of(model, smaller)
    torch.testing.assert_close(runner(x), model(x), rtol=0, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in runner.modules())
    assert set(graph.without_statistics(set()).tensors) == set(graph.tensors)


@pytest.mark.parametrize(
    ("build", "shape", "most"),
    [
        (LeNet5, (1, 28, 28), 100),
        (lambda: ResNet(3), (3, 32, 32), 150),
        pytest.param(lambda: ResNet(9), (3, 32, 32), 200, marks=pytest.mark.slow),
        (SqueezeNet, (3, 64, 64), 150),
    ],
    ids=["lenet5", "resnet20", "resnet56", "squeezenet"],
)
def test_graphs_are_small(build, shape, most):
    graph = trace(build(), (torch.randn(1, *shape),))
    assert len(dumps(graph)) <= most
    assert reloaded(graph) == graph


def test_serialisation_is_deterministic_and_takes_any_order_of_names():
    model = LeNet5()
    graph = trace(model, (torch.randn(1, 1, 28, 28),))
    assert dumps(graph) == dumps(trace(model, (torch.randn(4, 1, 28, 28),)))
    specs = specs_of(graph)
    names = sorted(specs, reverse=True)
    again = loads(dumps(graph, names=names), tensors={name: specs[name] for name in names})
    assert again.nodes == graph.nodes
    with pytest.raises(UsageError, match=r"fc2\.bias"):
        dumps(graph, names=[n for n in specs if n != "fc2.bias"])


def test_calls_by_name_by_position_and_wrong_ones():
    model = TwoInputs().eval()
    graph = trace(model, *ZOO["two-inputs"][1](2))
    runner = runner_of(model, graph)
    x, y = torch.randn(3, 4, 8), torch.randn(3, 1, 1)
    expected = model(x, y=y)
    assert_same(runner(x, y=y), expected)
    assert_same(runner(y=y, x=x, flag=True), expected)
    assert_same(runner(x, True, y), expected)
    for match, args, kwargs in (
        ("needs its argument 'y'", (x,), {}),
        ("traced with True", (x, False), {"y": y}),
        ("does not take", (x,), {"y": y, "z": 1}),
        ("twice", (x,), {"x": x, "y": y}),
        (r"\(batch, 4, 8\)", (torch.randn(3, 4, 9),), {"y": y}),
        ("got a int", (3,), {"y": y}),
    ):
        with pytest.raises(ModelError, match=match):
            runner(*args, **kwargs)


def test_runner_names_the_tensors_that_do_not_fit():
    model = LeNet5()
    graph = trace(model, (torch.randn(1, 1, 28, 28),))
    tensors = tensors_of(model, graph)
    del tensors["fc2.bias"]
    tensors["fc1.weight"] = torch.zeros(3)
    with pytest.raises(UsageError, match=r"fc1\.weight has shape \(3,\).*fc2\.bias is missing"):
        Runner(graph, tensors)


def test_the_runner_can_be_traced_again():
    model = Attention().eval()
    x = torch.randn(2, 5, 8)
    graph = trace(model, (x,))
    again = trace(runner_of(model, graph), (x,))
    assert [node.op for node in again.nodes] == [node.op for node in graph.nodes]
    assert dumps(again) == dumps(graph)


GOLDEN = {
    "lenet5": "636464ac60646160929515e06160e06260e060626462647ccec8c0c4c68ac49ccec8c8c4cc0ee267318129064600",
    "resnet8": "9d8bbd0d8040148201ef9d3f39a326d6c6dbc4799cc0d2291cc1251cc9257c89b58d1410be00c98d0121e73e010d9015c4588c"
    "9de85ae5d5beea042547d1d1e7e6629dccdc55da49a8856b9e2754fa755d96f77a3b88c3419976951e041f",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_files_of_version_1_stay_readable(name):
    """Bytes written once; a change here breaks every file in the world: add a version instead."""
    build, call = ZOO[name]
    graph = trace(build(), *call(1))
    assert loads(bytes.fromhex(GOLDEN[name]), tensors=specs_of(graph)) == graph
