"""The file: round trips, determinism, random access, the account of its bytes, writing."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import espalier.encode as encode_room
from espalier.core.errors import Corrupt, RunError, UnknownNameError, UsageError
from espalier.core.representation import Codebook, Dense
from espalier.encode import encode, info, open_file, unpack, verify, write
from espalier.encode.info import apportion

from .support import codebook, dense, every_kind, same

GRAPH = bytes(range(40)) * 3
PLANS = [{"edit": "drop", "path": "fc1", "index": [1, 2]}]


@pytest.mark.parametrize("coders", [("adaptive", "rans", "huffman"), ("adaptive",), ("rans",), ("huffman",), ()])
def test_every_kind_comes_back_bit_for_bit(coders):
    tensors = every_kind()
    with open_file(encode(tensors, coders=coders)) as archive:
        assert archive.keys() == tuple(tensors)
        for name, representation in tensors.items():
            assert same(archive.representation(name), representation), name
            assert archive.get(name).tobytes() == representation.dense().tobytes()


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.permutations(list(every_kind())))
def test_any_values_in_any_order_come_back(seed, order):
    tensors = every_kind(seed)
    tensors = {name: tensors[name] for name in order}
    data = encode(tensors)
    assert data == encode(tensors)
    with open_file(data) as archive:
        assert all(same(archive.representation(name), tensors[name]) for name in order)


def test_everything_beside_the_tensors_comes_back():
    data = encode(
        {"a": codebook((5, 4)), "b": dense(np.ones(3, np.float32))},
        aliases={"tied": "a"},
        graph=GRAPH,
        plans=PLANS,
        model="LeNet300",
    )
    with open_file(data) as archive:
        assert (archive.aliases, archive.graph, archive.plans) == ({"tied": "a"}, GRAPH, PLANS)
        assert archive.model == "LeNet300"
        assert (archive.get("tied") == archive.get("a")).all()
        assert archive.shape("tied") == (5, 4)
        assert archive.dtype("b") == "float32"
        assert list(archive) == ["a", "b"]
        assert len(archive) == 2
        with pytest.raises(UnknownNameError, match="tied"):
            archive.get("tide")


def test_a_file_without_tensors_is_a_file():
    with open_file(encode({})) as archive:
        assert (archive.keys(), archive.graph, archive.plans, archive.model) == ((), None, [], "")
        archive.verify()


def test_the_same_input_gives_the_same_bytes_in_a_file_too(tmp_path):
    first = write(tmp_path / "a.espalier", every_kind(), model="m", graph=GRAPH)
    second = write(tmp_path / "b.espalier", every_kind(), model="m", graph=GRAPH)
    assert first == second == info(tmp_path / "a.espalier")
    data = (tmp_path / "a.espalier").read_bytes()
    assert data == (tmp_path / "b.espalier").read_bytes() == encode(every_kind(), model="m", graph=GRAPH)
    assert data.startswith(b"\x89ESP\r\n\x1a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.espalier", "b.espalier"]


@pytest.mark.parametrize("floats", ["fp32", "fp16"])
@pytest.mark.parametrize("tensors", [every_kind(), {"w": codebook((100, 50))}, {}], ids=["all", "one", "none"])
def test_the_account_adds_up_to_the_length_of_the_file(tmp_path, tensors, floats):
    path = tmp_path / "m.espalier"
    found = write(path, tensors, graph=GRAPH, plans=PLANS, floats=floats)
    rows = sum(t.values + t.positions + t.codebooks + t.floats for t in found.tensors)
    assert found.prefix + found.header + found.graph + found.plans + rows == found.bytes == path.stat().st_size
    assert all(t.bytes == t.values + t.positions + t.codebooks + t.floats for t in found.tensors)
    assert min([0, *(min(t.values, t.positions, t.codebooks, t.floats) for t in found.tensors)]) == 0
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert info(path) == found


def test_bytes_are_told_apart():
    rows = {t.name: t for t in info(encode({"w": codebook((200, 100)), "b": dense(np.ones(9, np.float32))})).tensors}
    w, b = rows["w"], rows["b"]
    assert w.positions > w.values > w.codebooks > w.floats == 0
    assert b.floats == b.bytes > 0
    assert w.coders == {"indices": "adaptive", "centroids": "planes"}


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_apportion_splits_exactly_and_fairly(total, weights):
    found = apportion(total, weights)
    assert sum(found) == total
    if sum(weights) > 0:
        assert all(
            abs(share - total * w / sum(weights)) <= 1 + 1e-6 * total for share, w in zip(found, weights, strict=True)
        )


def test_fp16_halves_floats_only_where_they_stay_finite():
    small, large = np.array([0.1, -2.0], np.float32), np.array([1e30, 1.0], np.float32)
    tensors = {"small": dense(small), "large": dense(large), "w": codebook((9, 9))}
    with open_file(encode(tensors, floats="fp16")) as archive:
        assert (archive.get("small") == small.astype(np.float16).astype(np.float32)).all()
        assert (archive.get("large") == large).all()
        assert archive.get("w").dtype == np.float32
        assert archive.representation("w").centroids.dtype == np.float16
    with open_file(encode(tensors)) as archive:
        assert (archive.get("small") == small).all()


def test_one_tensor_is_read_without_the_others(tmp_path):
    """Damage elsewhere does not matter to ``get``, and is found by ``verify``."""
    path = tmp_path / "m.espalier"
    found = write(path, {"a": codebook((40, 30), seed=1), "b": codebook((40, 30), seed=2)})
    data = bytearray(path.read_bytes())
    data[32 + found.header + 20] ^= 1
    path.write_bytes(data)
    with open_file(path) as archive:
        assert same(archive.representation("b"), codebook((40, 30), seed=2))
        with pytest.raises(Corrupt):
            archive.get("a")
    with pytest.raises(Corrupt):
        verify(path)


def test_small_headers():
    """The fixed costs the literature leaves out: prefix, header and checksums."""
    rng = np.random.default_rng(0)

    def net(names):
        return {n: codebook((12, 12), seed=i) if n.endswith("weight") else dense(rng.normal(size=12).astype(np.float32))
                for i, n in enumerate(names)}  # fmt: skip

    lenet = net([f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")])
    blocks = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    resnet = net([f"{block}.{part}" for block in [*blocks, "conv1", "linear"] for part in ("weight", "bias")])
    assert 32 + info(encode(lenet)).header <= 150
    assert (32 + info(encode(resnet)).header) / len(resnet) <= 11


def test_unpack_gives_safetensors(tmp_path):
    tensors = every_kind()
    unpack(encode(tensors, aliases={"tied": "fc1.weight"}), tmp_path / "m.safetensors")
    found = {}
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found[name] = file.get_tensor(name)
    assert set(found) == {*tensors, "tied"}
    assert found["brain"].dtype == torch.bfloat16
    assert found["steps"].item() == 12345
    for name, representation in tensors.items():
        values = found[name].float().numpy() if name == "brain" else found[name].numpy()
        assert values.tobytes() == representation.dense().tobytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aliases": {"a": "a"}}, "alias"),
        ({"aliases": {"b": "nowhere"}}, "nowhere"),
        ({"plans": [float("nan")]}, "plans"),
        ({"plans": [object()]}, "plans"),
        ({"floats": "fp8"}, "fp16"),
        ({"coders": ("zip",)}, "zip"),
        ({"model": "m" * 600}, "600"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_in_words(options, words):
    with pytest.raises(UsageError, match=words):
        encode({"a": codebook((3, 3))}, **options)


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 513, "\ud800"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(UsageError, match=r"name|written"):
        encode({name: codebook((3, 3))})


def test_a_full_disk_names_the_path_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.espalier"
    write(path, {"a": codebook((3, 3))})
    before = path.read_bytes()

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"m\.espalier.*No space left"):
        write(path, {"a": codebook((9, 9))})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m.espalier"]


def test_folders_and_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        write(tmp_path / "nowhere" / "m.espalier", {})
    with pytest.raises(RunError, match="absent"):
        open_file(tmp_path / "absent.espalier")


def test_unsorted_and_odd_codebooks_come_back():
    rng = np.random.default_rng(3)
    for centroids in ([3.0, 0.0, -1.0], [0.0, 2.0, -2.0], [np.nan, 0.0, 1.0], [1.0], [-0.0, 0.0, np.inf]):
        indices = rng.integers(0, len(centroids), (8, 9)).astype(np.uint16)
        original = Codebook(shape=(8, 9), indices=indices, centroids=np.array(centroids, np.float32))
        with open_file(encode({"w": original})) as archive:
            assert same(archive.representation("w"), original)


def test_non_contiguous_and_big_endian_arrays_are_taken_as_their_values():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    with open_file(encode({"v": Dense(shape=(4, 3), values=values)})) as archive:
        assert (archive.get("v") == values).all()


def test_the_room_offers_what_it_says():
    assert {cls.id for cls in encode_room.CODERS} == {"adaptive", "rans", "huffman", "planes", "packed"}
    for cls in encode_room.CODERS:
        assert cls.card().paper
        assert cls.kind == "coder"
