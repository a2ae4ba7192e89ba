"""Untrusted graphs: whatever the bytes say, a typed error or a graph that validates."""

from __future__ import annotations

import dataclasses
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.networks import LeNet5
from tests.graph.support import specs_of

from espalier.core.errors import Corrupt, FileError, LimitExceeded, ModelError, UnsupportedVersion
from espalier.graph import Graph, Input, Limits, Node, Runner, TensorSpec, Value, Weight, dumps, infer, loads, trace
from espalier.graph.codec import Writer, deflate, inflate
from espalier.graph.graph import Branch, Tree

SPECS = {"w": ((4, 4), "float32"), "k": ((4, 4, 3, 3), "float32"), "v": ((4,), "float32")}


def graph_of(*nodes: Node, output: Tree = None, inputs: tuple[Input, ...] = (Input((None, 4)),)) -> Graph:
    leaves = tuple(Value(k) for k in range(len(inputs)))
    return Graph(
        inputs=inputs,
        call=Branch("tuple", (Branch("tuple", leaves), Branch("dict", ()))),
        names=tuple(f"x{k}" for k in range(len(inputs))),
        nodes=nodes,
        output=Value(len(inputs) + len(nodes) - 1) if output is None else output,
        tensors={name: TensorSpec(shape, dtype) for name, (shape, dtype) in SPECS.items()},
    )


def reread(graph: Graph, **limits: int) -> Graph:
    return loads(dumps(graph), tensors=SPECS, limits=Limits(**limits))


SQUARES = [Node("size_mul", {"a": Value(k), "b": Value(k)}) for k in range(1, 8)]
LINEAR = Node("linear", {"input": Value(0), "weight": Weight("w")})


def test_the_harness_itself_passes():
    assert reread(graph_of(LINEAR)) == graph_of(LINEAR)


@pytest.fixture(scope="module")
def small() -> tuple[bytes, dict]:
    graph = trace(LeNet5(), (torch.randn(1, 1, 28, 28),))
    return dumps(graph), specs_of(graph)


def outcome(data: bytes, specs: dict) -> str:
    try:
        graph = loads(data, tensors=specs)
    except FileError:
        return "refused"
    infer(graph)
    return "valid"


def test_every_truncation_and_trailing_bytes_are_refused(small):
    data, specs = small
    assert all(outcome(data[:n], specs) == "refused" for n in range(len(data)))
    assert outcome(data + b"\0", specs) == "refused"
    plain = inflate(data, 1 << 20)
    assert all(outcome(deflate(plain[:n]), specs) == "refused" for n in range(len(plain)))
    assert outcome(deflate(plain + b"\0"), specs) == "refused"


def test_every_single_bit_flip_is_refused_or_valid(small):
    data, specs = small
    for raw, pack in ((data, bytes), (inflate(data, 1 << 20), deflate)):
        for position in range(8 * len(raw)):
            changed = bytearray(raw)
            changed[position // 8] ^= 1 << position % 8
            assert outcome(pack(bytes(changed)), specs) in ("refused", "valid")


@settings(max_examples=150)
@given(st.binary(max_size=80))
def test_random_bytes_are_refused(data):
    assert outcome(deflate(b"\x01" + data), SPECS) in ("refused", "valid")


@settings(max_examples=100)
@given(st.data())
def test_spliced_bytes_are_refused_or_valid(small, data):
    raw, specs = small
    plain = bytearray(inflate(raw, 1 << 20))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(plain) - 1))
        plain[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=5))
        plain = plain or bytearray(1)
    assert outcome(deflate(bytes(plain)), specs) in ("refused", "valid")


def test_a_bomb_is_refused_before_it_unpacks():
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = packer.compress(bytes(1 << 26)) + packer.flush()
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded, match="unpacks to more"):
            loads(bomb, tensors={})
        assert tracemalloc.get_traced_memory()[1] < 3 * Limits().bytes
    finally:
        tracemalloc.stop()


def test_unknown_version_and_operator():
    writer = Writer()
    writer.number(9)
    with pytest.raises(UnsupportedVersion, match="version 9"):
        loads(deflate(bytes(writer.data)), tensors={})
    plain = bytearray(inflate(dumps(graph_of(LINEAR)), 1 << 20))
    at = len(plain) - 6
    assert plain[at - 1 : at + 1] == bytes([1, 7])
    plain[at] = 127
    with pytest.raises(Corrupt, match="operator 127"):
        loads(deflate(bytes(plain)), tensors=SPECS)


@pytest.mark.parametrize(
    ("node", "match"),
    [
        (Node("warp", {}), "Unknown operator 'warp'"),
        (Node("relu", {}), "lacks its argument self"),
        (Node("relu", {"self": Value(0), "slope": 1}), "an argument 'slope'"),
        (Node("relu", {"self": 3}), "relu.self got 3"),
        (Node("relu", {"self": Value(5)}), "refers to value 5"),
        (Node("relu", {"self": Value(-1)}), "refers to value -1"),
        (Node("relu", {"self": Weight("gone")}), "'gone', which is not there"),
        (Node("conv2d", {"input": Value(0), "weight": Weight("k"), "groups": 0}), "groups got 0"),
        (Node("conv2d", {"input": Value(0), "weight": Weight("k"), "stride": (1, -1)}), "stride got"),
        (Node("conv2d", {"input": Value(0), "weight": Weight("k"), "padding": "odd"}), "padding got"),
        (Node("flatten", {"self": Value(0), "start_dim": 2**40}), "start_dim got"),
        (Node("dropout", {"input": Value(0), "p": 1}), "p got 1"),
        (Node("to", {"self": Value(0), "dtype": "complex64"}), "dtype got"),
        (Node("einsum", {"equation": "__import__", "tensors": (Value(0),)}), "equation got"),
        (Node("pad", {"input": Value(0), "pad": (1, 1), "mode": "evil"}), "mode got"),
        (Node("reshape", {"self": Value(0), "shape": (1,) * 5000}), "lists 5000 entries"),
        (Node("reshape", {"self": Value(0), "shape": (3, 7)}), "cannot take its arguments"),
        (Node("linear", {"input": Value(0), "weight": Weight("k")}), "cannot take its arguments"),
        (Node("item", {"values": Value(0), "index": 0}), "refers to a Tensor"),
        (Node("reshape", {"self": Value(0), "shape": (Value(0), 2)}), "refers to a Tensor"),
    ],
)
def test_wrong_nodes_are_refused(node, match):
    with pytest.raises(ModelError, match=match):
        infer(graph_of(node))


def test_cycles_and_forward_references_are_refused():
    loop = graph_of(Node("relu", {"self": Value(1)}))
    ahead = graph_of(Node("relu", {"self": Value(2)}), Node("relu", {"self": Value(0)}))
    for graph in (loop, ahead):
        with pytest.raises(ModelError, match="computed before it"):
            infer(graph)
    plain = bytearray(inflate(dumps(graph_of(Node("relu", {"self": Value(0)}))), 1 << 20))
    for distance in (0, 3, 100):
        writer = Writer()
        writer.number(2 * distance)
        with pytest.raises(Corrupt):
            loads(deflate(bytes(plain[:-3]) + bytes(writer.data) + bytes(plain[-2:])), tensors=SPECS)


def test_unknown_tensor_is_refused():
    data = dumps(graph_of(Node("linear", {"input": Value(0), "weight": Weight("v")})))
    with pytest.raises(Corrupt, match="refers to tensor"):
        loads(data, tensors={"w": SPECS["w"]})


@pytest.mark.parametrize(
    "nodes",
    [
        [Node("expand", {"self": Weight("v"), "size": (2**20, 2**20, 4)})],
        [Node("zeros", {"size": (2**30, 2**30)})],
        [Node("repeat", {"self": Value(0), "repeats": (2**16, 2**16)})],
        [Node("matmul", {"self": Node, "other": Node})],
        [Node("arange", {"end": 2**33 * 1.0})],
        [Node("eye", {"n": 2**20})],
        [Node("pad", {"input": Value(0), "pad": (2**30, 2**30)})],
        [Node("size", {"self": Value(0), "dim": 1}), *SQUARES],
        [Node("repeat", {"self": Value(0), "repeats": (1, 5000)}), Node("unbind", {"self": Value(1), "dim": 1})],
        [Node("repeat", {"self": Value(0), "repeats": (5000, 1)}), Node("split", {"self": Value(1), "split_size": 1})],
        [Node("chunk", {"self": Value(0), "chunks": 10**6})],
    ],
    ids=lambda nodes: nodes[-1].op,
)  # fmt: skip
def test_huge_values_are_refused(nodes):
    if nodes[-1].op == "matmul":
        column = Node("zeros", {"size": (2**17, 1)})
        nodes = [
            column,
            Node("transpose", {"self": Value(1), "dim0": 0, "dim1": 1}),
            Node("matmul", {"self": Value(1), "other": Value(2)}),
        ]
    pieces = nodes[-1].op in ("unbind", "split", "chunk")
    with pytest.raises(LimitExceeded, match="pieces" if pieces else "elements|size"):
        reread(graph_of(*nodes))


def test_many_large_values_are_refused_in_sum():
    nodes = [Node("relu", {"self": Value(k)}) for k in range(50)]
    with pytest.raises(LimitExceeded, match="in all"):
        reread(graph_of(*nodes), total_elements=300)
    assert len(reread(graph_of(*nodes), total_elements=500).nodes) == 50


def test_huge_inputs_and_tensors_are_refused():
    with pytest.raises(LimitExceeded):
        reread(graph_of(LINEAR, inputs=(Input((None, 2**40, 2**40)),)))
    with pytest.raises(LimitExceeded):
        loads(dumps(graph_of(LINEAR)), tensors={**SPECS, "w": ((2**31, 2**31), "float32")})
    with pytest.raises(FileError):
        loads(dumps(graph_of(LINEAR)), tensors={**SPECS, "w": ((-1, 4), "float32")})


def test_node_count_is_capped():
    nodes = [Node("relu", {"self": Value(k)}) for k in range(101)]
    with pytest.raises(FileError, match=r"at most 100|more than 100"):
        reread(graph_of(*nodes), nodes=100)
    assert len(reread(graph_of(*nodes)).nodes) == 101


def test_recurrence_over_a_long_sequence_is_inferred_at_once():
    specs = {"ih": ((8, 4), "float32"), "hh": ((8, 2), "float32")}
    graph = dataclasses.replace(
        graph_of(
            Node("zeros", {"size": (1, 2, 2)}),
            Node("lstm", {"input": Value(0), "hx": (Value(1), Value(1)), "params": (Weight("ih"), Weight("hh")),
                          "has_biases": False, "num_layers": 1}),
            Node("item", {"values": Value(2), "index": 0}),
            inputs=(Input((2**24, None, 4)),),
        ),
        tensors={name: TensorSpec(*spec) for name, spec in specs.items()},
    )  # fmt: skip
    assert infer(loads(dumps(graph), tensors=specs))[-1].shape == (2**24, 2, 2)


def nested(depth: int) -> Tree:
    tree: Tree = Value(0)
    for _ in range(depth):
        tree = Branch("list", (tree,))
    return tree


def test_deep_trees_are_refused():
    assert reread(graph_of(output=nested(20))).output == nested(20)
    for tree in (nested(40), nested(400)):
        with pytest.raises(FileError, match="too deeply"):
            reread(graph_of(output=tree))
    plain = inflate(dumps(graph_of(output=nested(1))), 1 << 20)
    deep = plain[:-2] + plain[-3:-2] * 200_000
    with pytest.raises(FileError):
        loads(deflate(deep), tensors=SPECS)


@pytest.mark.parametrize(
    "output",
    [
        Branch("dict", (Value(0), Value(0)), ("a", "a")),
        Branch("dict", (Value(0),), ()),
        Branch("namedtuple", (Value(0),), ("__class__",)),
        Branch("namedtuple", (Value(0),), ("a b",)),
        Value(7),
        Weight("gone"),
    ],
)
def test_wrong_trees_are_refused(output):
    with pytest.raises(ModelError):
        infer(graph_of(output=output))


@pytest.mark.parametrize(
    "name", ["forward.weight", "training", "_graph", "a..b", "", "__class__.x", "_parameters.w", "w.w"]
)
def test_names_that_fit_no_module_are_refused(name):
    specs = {name: TensorSpec((4, 4)), "w": TensorSpec((4, 4))}
    graph = dataclasses.replace(graph_of(LINEAR), tensors=specs)
    with pytest.raises(ModelError):
        Runner(graph, {key: torch.zeros(4, 4) for key in specs})


def test_integers_have_one_form_and_end():
    for raw in (b"\x80\x00", b"\xff" * 12, b"\x80"):
        with pytest.raises(Corrupt):
            loads(deflate(raw), tensors={})
