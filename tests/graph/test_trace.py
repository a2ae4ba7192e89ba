from __future__ import annotations

import copy
import inspect
import logging
import threading

import pytest
import torch
from tests.graph.networks import ZOO, Block, LeNet5, ResNet, TwoInputs
from tests.graph.support import assert_same, runner_of
from torch import nn
from torch.nn import functional as F

from espalier.core.errors import ModelError
from espalier.graph import Graph, infer, trace
from espalier.graph.quiet import place_of


class Function(nn.Module):
    """A module around a function."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("name", ["two-inputs", "recurrent", "resnet8"])
def test_the_model_is_left_bitwise_untouched(name):
    build, call = ZOO[name]
    model = build().train()
    next(model.children()).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    model.extra = ["anything"]
    attributes = {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in model.named_modules()}
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    identities = [id(p) for p in model.parameters()]
    random = torch.get_rng_state()
    args, kwargs = call(2)
    torch.set_rng_state(random)
    trace(model, args, kwargs)
    assert calls == []
    assert len(model._forward_hooks) == 1
    assert {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in model.named_modules()} == attributes
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == identities
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_the_module_path_is_kept_and_the_graph_is_lean():
    graph = trace(ResNet(1), (torch.randn(2, 3, 32, 32),))
    assert [n.path for n in graph.nodes if n.op == "conv2d"][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert set(ops(graph)) == {"conv2d", "batch_norm", "relu", "add", "slice", "pad", "avg_pool2d", "reshape", "linear"}
    assert graph.inputs[0].shape == (None, 3, 32, 32)
    assert all(spec.role == "buffer" for name, spec in graph.tensors.items() if "running" in name)


def test_no_ops_disappear_and_casts_stay():
    def forward(_, x):
        x = x.contiguous().clone().detach().to(torch.float32).float()[:, :]
        return F.dropout(x, 0.0, training=False).to(torch.float64), x.expand(-1, 4)

    assert ops(trace(Function(forward), (torch.randn(2, 4),))) in (["to"], ["dropout", "to"])


def test_sizes_that_follow_from_the_batch():
    def forward(module, x):
        n = x.shape[0]
        token = module.token.expand(n, 1, 4)
        h = torch.cat([token, x.view(n, 2, 4)], 1).reshape(n * 3, 4)
        return h.view(n, 3, 4).transpose(0, 1).reshape(3, n, 2, 2) * n, torch.zeros(n, n), torch.arange(n)

    model = Function(forward, token=nn.Parameter(torch.randn(1, 1, 4)))
    runner = runner_of(model, trace(model, (torch.randn(1, 8),)))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 8)
        assert_same(runner(x), model(x))


def test_writing_in_place_through_views_and_siblings():
    def forward(_, x):
        h = x * 1
        a, b = h.chunk(2, 1)
        a = a + 1
        h[:, 0] = 5
        h[:, :, 1:2].mul_(2)
        F.relu_(b)
        y = h.clone()
        y[:, 1, 0] += 3
        y.fill_(1) if h.shape[1] > 100 else y.zero_()
        z = torch.empty(2, 3)
        z.copy_(y[0, :2, :3])
        return torch.cat([a, h[:, :2]], 1), y, z

    model = Function(forward)
    with torch.no_grad():
        graph = trace(Function(lambda _, x: forward_without_split(x)), (torch.randn(2, 4, 3),))
        with pytest.raises(ModelError, match="in place"):
            trace(model, (torch.randn(2, 4, 3),))
        runner = runner_of(model, graph)
        x = torch.randn(3, 4, 3)
        assert_same(runner(x), forward_without_split(x.clone()))


def forward_without_split(x):
    h = x * 1
    h[:, 0] = 5
    h[:, :, 1:2].mul_(2)
    y = h.clone()
    y[:, 1, 0] += 3
    a, b = (h + 0).chunk(2, 1)
    a.relu_()
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, 1:] + 1
    return torch.cat([a, b], 1), y, z, h


def test_writing_into_a_buffer_is_refused():
    def forward(module, x):
        module.count.add_(1)
        return x * module.count

    model = Function(forward)
    model.register_buffer("count", torch.zeros(()))
    with pytest.raises(ModelError, match="count"):
        trace(model, (torch.randn(2, 4),))


def test_data_dependent_control_flow_says_what_to_do():
    model = Function(lambda _, x: x if x.sum() > 0 else -x)
    with pytest.raises(ModelError, match=r"Function cannot be traced; torch\.export says: .*torch\.where.*into=model"):
        trace(model, (torch.randn(2, 4),))


def _branching(_, x):
    y = x * 2
    if y.sum() > 0:
        return y
    return -y


def test_a_failed_trace_is_one_sentence_with_the_place_and_no_log(capfd, monkeypatch):
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    handlers = [h for name in ("torch.fx", "torch.export") for h in logging.getLogger(name).handlers]
    before = [list(h.filters) for h in handlers]
    with pytest.raises(ModelError) as error:
        trace(nn.Sequential(nn.Linear(4, 4), Function(_branching)), (torch.randn(2, 4),))
    line = inspect.getsourcelines(_branching)[1] + 2
    said = str(error.value)
    assert f"test_trace.py, line {line} (if y.sum() > 0)." in said
    assert "pattern weights, blocks or n-m" in said
    assert "\n" not in said
    assert [list(h.filters) for h in handlers] == before
    assert capfd.readouterr() == ("", "")


def test_whoever_asks_for_torchs_log_gets_it(capfd, monkeypatch):
    monkeypatch.setenv("TORCH_LOGS", "+export")
    with pytest.raises(ModelError):
        trace(Function(_branching), (torch.randn(2, 4),))
    assert "def forward" in capfd.readouterr().err


def test_the_place_comes_from_the_text_where_no_frame_tells():
    mine, torchs = "/home/me/net.py", torch.__file__
    text = f'Bad.\n  File "{mine}", line 3, in f\n  File "{torchs}", line 9, in g\n  File "<string>", line 1, in h'
    assert place_of(RuntimeError(text)) == "me/net.py, line 3"
    assert place_of(RuntimeError("Bad.")) == ""


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(ModelError, match=r"quantized already: 1 \(torch.ao.nn.quantized.*float model"):
        trace(quantized, (torch.randn(2, 4),))


def test_a_model_that_does_not_run_is_told_apart():
    with pytest.raises(ModelError, match="cannot be run on the example"):
        trace(nn.Linear(3, 4), (torch.randn(2, 5),))


def test_unsupported_operators_are_named():
    model = nn.Sequential(nn.Linear(4, 4), Function(lambda _, x: torch.fft.fft(x).real))
    with pytest.raises(ModelError, match=r"uses aten\.fft_fft\.default in 1, which.*closed operator set"):
        trace(model, (torch.randn(2, 4),))


def test_what_an_unsupported_operator_writes_is_not_lost():
    def forward(_, x):
        h = x * 1
        h[:, 0] = torch.fft.fft(h[:, 1]).real
        return h

    with pytest.raises(ModelError, match=r"aten\.fft_fft\.default"):
        trace(Function(forward), (torch.randn(2, 4, 3),))
    with pytest.raises(ModelError, match=r"aten\.erfinv_\.default"):
        trace(Function(lambda _, x: (h := x * 1, h[:, 0].erfinv_())[0]), (torch.rand(2, 4, 3),))


def test_an_unused_unsupported_operator_does_no_harm():
    def forward(_, x):
        torch.fft.fft(x).mul_(2)
        return x + 1

    assert ops(trace(Function(forward), (torch.randn(2, 4),))) == ["add"]


def test_uncopyable_models_say_why():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        trace(model, (torch.randn(2, 2),))


def test_inputs_whose_first_dimension_is_not_the_batch():
    def forward(_, x, table, scale):
        return x @ table * scale

    model = Function(forward)
    graph = trace(model, (torch.randn(1, 3), torch.randn(3, 5), torch.tensor(2.0)))
    assert [item.shape for item in graph.inputs] == [(None, 3), (3, 5), ()]
    same_size = trace(model, (torch.randn(3, 3), torch.randn(3, 5), torch.tensor(2.0)))
    assert same_size.inputs[0].shape[1:] == (3,)
    infer(same_size, batch=7)


def test_a_batch_that_is_baked_in_is_kept_as_it_is():
    model = Function(lambda _, x: x.view(2, 6).view(2, 2, 3))
    graph = trace(model, (torch.randn(2, 6),))
    assert not graph.dynamic
    with pytest.raises(ModelError, match=r"traced for \(2, 6\)"):
        runner_of(model, graph)(torch.randn(3, 6))


def test_another_batch_dimension():
    model = nn.LSTM(4, 3)
    graph = trace(model, (torch.randn(5, 1, 4),), batch_dim=1)
    assert graph.inputs[0].shape == (5, None, 4)
    runner = runner_of(model, graph)
    for batch in (1, 2, 7):
        x = torch.randn(5, batch, 4)
        assert_same(runner(x), model(x))


def test_old_style_weight_norm_is_part_of_the_computation():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 4)))
    with torch.no_grad():
        model[0].weight_g.mul_(2)
    graph = trace(model, (torch.randn(2, 3),))
    x = torch.randn(5, 3)
    assert_same(runner_of(model, graph)(x), model(x))


def test_cumulative_batch_norm_keeps_its_momentum():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None)).eval()
    runner = runner_of(model, trace(model, (torch.randn(2, 3),)))
    assert runner.get_submodule("0").momentum is None


def test_no_gradient_blocks_and_unused_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.spare = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            with torch.no_grad():
                scale = x.mean()
            return self.fc(x) * scale

    model = Net().eval()
    graph = trace(model, (torch.randn(2, 3),))
    assert "spare.weight" in graph.tensors
    runner = runner_of(model, graph)
    assert set(runner.state_dict()) == set(model.state_dict())


def test_constants_are_reported_with_their_values():
    model = TwoInputs().eval()
    graph = trace(model, *ZOO["two-inputs"][1](2))
    assert torch.equal(graph.constants["_constant.0"], model.position)
    assert graph.constants["_constant.1"] == 3


def test_examples_of_one_are_repeated_not_baked_in():
    assert trace(LeNet5(), (torch.randn(1, 1, 28, 28),)) == trace(LeNet5(), (torch.randn(3, 1, 28, 28),))
    assert trace(Block(4, 4, 1), (torch.randn(1, 4, 1, 1),)).inputs[0].shape == (None, 4, 1, 1)
