"""Operators outside the table: a boundary of the channel analysis, and nothing that a file could hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.graph.channels.toys import TOYS, conv, image
from tests.graph.support import assert_same
from torch import Tensor, nn

from espalier.core.errors import ModelError
from espalier.graph import Graph, Node, Runner, Value, dumps, infer, macs, trace
from espalier.graph.channels import channel_groups
from espalier.graph.channels.surgery import groups_of, remove
from espalier.graph.edit import AsGraph

NAMES = ("spectrum_between_layers", "convolution_by_spectra", "operator_of_the_users_own")
FOREIGN = [toy for toy in TOYS if toy.name in NAMES]
SPECTRUM = FOREIGN[0]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("toy", FOREIGN, ids=lambda toy: toy.name)
def test_the_default_trace_and_every_file_refuse_it(toy):
    with pytest.raises(ModelError, match=r"closed operator set|dtype complex64") as refused:
        trace(toy.build(), toy.call)
    graph = trace(toy.build(), toy.call, foreign=True)
    for write in (dumps, AsGraph.of):
        with pytest.raises(ModelError) as error:
            write(graph)
        if toy is SPECTRUM:
            assert str(error.value) == str(refused.value)


def test_no_bytes_name_one():
    """A row without a code: the reader knows codes of the table only, and a name alone is no operator."""
    graph = trace(SPECTRUM.build(), SPECTRUM.call, foreign=True)
    assert all(node.op.startswith("foreign::aten.") for node in graph.foreign)
    bare = replace(graph, nodes=tuple(replace(node, overload=None) for node in graph.nodes))
    with pytest.raises(ModelError, match="Unknown operator"):
        infer(bare)


@pytest.mark.parametrize("toy", FOREIGN, ids=lambda toy: toy.name)
def test_it_can_be_run_and_counted_here(toy):
    model = toy.build()
    graph = trace(model, toy.call, foreign=True)
    runner = Runner(graph, {**model.state_dict(), **graph.constants}).eval()
    for size in (1, 2, 5):
        x = torch.randn(size, *toy.call[0].shape[1:])
        assert_same(runner(x), model(x))
    assert macs(graph).total > 0


@pytest.mark.parametrize("toy", FOREIGN, ids=lambda toy: toy.name)
def test_what_is_left_can_be_analysed_again(toy):
    model = toy.build()
    found = groups_of(model, toy.call)
    first = found.groups[0]
    done = remove(model, found, {first.name: np.arange(first.size) < 2}, toy.call)
    assert done.kind == "module"
    again = channel_groups(done.graph)
    assert [group.size for group in again.groups] == [first.size - 2, *[group.size for group in found.groups[1:]]]
    assert again.boundaries == found.boundaries
    assert groups_of(done.model, toy.call).groups[0].size == first.size - 2


def test_the_boundary_is_named_with_its_place():
    model = nn.Sequential(conv(3, 4), Function(lambda x: torch.fft.fft2(x).abs()), conv(4, 2))
    assert groups_of(model, (image(),)).boundaries == ("aten.fft_fft2.default in 1",)
    with pytest.raises(ModelError, match=r"uses aten\.fft_fft2\.default in 1, which"):
        trace(model, (image(),))


def test_a_model_that_draws_random_numbers_is_compared_under_one_seed():
    model = nn.Sequential(
        conv(3, 6), conv(6, 5), Function(lambda x: x + torch.randn_like(x)), conv(5, 4), nn.ReLU(), conv(4, 2)
    )
    state = torch.get_rng_state()
    found = groups_of(model, (image(),))
    assert found.boundaries == ("aten.randn_like.default in 2",)
    done = remove(model, found, {"0": np.arange(6) < 3, "3": np.arange(4) < 2}, (image(),))
    assert done.kind == "module"
    assert done.difference < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_code_that_cannot_follow_is_a_sentence():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 6), conv(6, 4), conv(4, 2)

        def forward(self, x):
            y = self.a(x).view(-1, 6, 36).relu().view(-1, 6, 6, 6)
            return self.c(torch.fft.fft2(self.b(y)).abs())

    model = Fixed()
    found = groups_of(model, (image(),))
    with pytest.raises(ModelError, match=r"Fixed does not follow .*it would need aten\.fft_fft2\.default, which"):
        remove(model, found, {"a": np.arange(6) < 2}, (image(),))


def test_writing_in_place_around_it():
    def alone(x):
        h = x * 0.5
        h[:, 0].erfinv_()
        return h

    def through_a_foreign_view(x):
        z = torch.fft.fft2(x)
        torch.view_as_real(z).mul_(2)
        return z.abs()

    def of_a_foreign_value(x):
        h = x * 1
        h[:, 0] = torch.fft.fft2(h[:, 1]).real
        return h

    x = torch.rand(3, 4, 4)
    for function in (alone, of_a_foreign_value):
        model = Function(function)
        with pytest.raises(ModelError, match="closed operator set"):
            trace(model, (x,))
        assert_same(Runner(trace(model, (x,), foreign=True), {})(x), model(x))
    with pytest.raises(ModelError, match="in place"):
        trace(Function(through_a_foreign_view), (x,), foreign=True)


def test_shapes_that_depend_on_values_are_refused():
    with pytest.raises(ModelError, match=r"uses aten\.nonzero\.default, whose results have no shape .*register_fake"):
        trace(Function(lambda x: torch.nonzero(x).sum()), (torch.randn(2, 3),), foreign=True)


def test_a_foreign_node_differs_from_another_of_the_same_arguments():
    nodes = [Node("foreign::x", {"self": Value(0)}, overload=o) for o in (torch.ops.aten.real, torch.ops.aten.imag)]
    assert nodes[0] != nodes[1]
    assert isinstance(trace(Function(torch.erfinv), (torch.rand(2, 3),), foreign=True), Graph)
