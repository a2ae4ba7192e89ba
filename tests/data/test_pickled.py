from __future__ import annotations

import os
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.data.pickled import parse_pickle

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
UINT8 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def sample(rows: int = 4, width: int = 6) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(2)
    return random.integers(0, 256, (rows, width), dtype=np.uint8), random.integers(0, 10, rows).tolist()


def test_the_official_layout_is_read_as_data(official):
    images, labels = sample()
    batch = parse_pickle(official(images, labels))
    assert set(batch) == {b"batch_label", b"labels", b"data", b"filenames"}
    assert batch[b"labels"] == labels
    assert batch[b"filenames"][3] == b"image_3.png"
    assert np.array_equal(batch[b"data"], images)


def test_the_official_layout_means_the_same_to_pickle(official):
    images, labels = sample()
    ours, theirs = official(images, labels), pickle.loads(official(images, labels), encoding="bytes")  # noqa: S301
    assert np.array_equal(parse_pickle(ours)[b"data"], theirs[b"data"])
    assert parse_pickle(ours)[b"labels"] == theirs[b"labels"]


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_written_by_python_3_are_read(protocol, order):
    images, labels = sample()
    images = np.asarray(images, order=order)
    batch = parse_pickle(pickle.dumps({"data": images, "labels": labels}, protocol=protocol))
    assert np.array_equal(batch["data"], images)
    assert batch["labels"] == labels


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.text() | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.binary(), inner)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100)
@given(plain, st.sampled_from([3, 4]))
def test_plain_data_comes_back(value, protocol):
    assert parse_pickle(pickle.dumps(value, protocol=protocol)) == value


class Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_pickle_is_executed(tmp_path, protocol):
    mark = tmp_path / "executed"
    with pytest.raises(ValueError, match=r"more than plain data|nothing is imported"):
        parse_pickle(pickle.dumps({"data": Hostile(f"touch {mark}")}, protocol=protocol))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends at byte 0"),
        (b".", "stack"),
        (b"NN.", "goes on"),
        (b"N.N", "goes on"),
        (b"(.", "stack"),
        (b"t.", "lacks a mark"),
        (b"Ne.", "lacks a mark"),
        (b"N(e.", "list should be"),
        (b"](s.", "stack is too short"),
        (b"}(Nu.", "keys"),
        (b"}(]Nu.", "keys"),
        (b"}(K\x01Nu.", "keys"),
        (b"h\x00.", "did not store"),
        (b"q\x00.", "not there"),
        (b"(q\x00.", "not there"),
        (b"T\xff\xff\xff\xff.", "inside a value"),
        (b"X\xff\xff\xff\xff.", "inside a value"),
        (b"B\xff\xff\xff\x7fabc.", "inside a value"),
        (b"X\x01\x00\x00\x00\xff.", "decode"),
        (b"cnumpy", "no end"),
        (b"cbuiltins\neval\n.", "builtins eval"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "os system"),
        (b"NN\x93.", "no text"),
        (b"NNR.", "nothing is called"),
        (b"cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.", "nothing is called"),
        (b"cnumpy\nndarray\n)R.", "nothing is called"),
        (RECONSTRUCT + b".", "no values"),
        (RECONSTRUCT + b"(K\x01K\x05\x85" + UINT8 + b"\x89U\x04abcdtb.", r"shape \(5,\) and 4 bytes"),
        (RECONSTRUCT + b"(K\x01J\xff\xff\xff\xff\x85" + UINT8 + b"\x89U\x04abcdtb.", "other than a uint8"),
        (RECONSTRUCT + b"(K\x01K\x04\x85N\x89U\x04abcdtb.", "other than a uint8"),
        (b"}Nb.", "other than a uint8"),
        (b"\x81.", "more than plain data"),
        (b"P0\n.", "more than plain data"),
    ],
)
def test_what_is_no_plain_data_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        parse_pickle(data)


def test_every_truncation_is_refused(official):
    whole = official(*sample())
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"\S"):
            parse_pickle(whole[:length])


def survives(data: bytes) -> None:
    try:
        parse_pickle(data)
    except ValueError:
        return


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_random_bytes_end_in_a_value_or_a_value_error(data):
    survives(data)


OPCODES = b"N\x88\x89]}()KMJUTCBX\x8cchj\x80\x95qr\x94\x93\x85\x86\x87taesuRb."


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([bytes([code]) for code in OPCODES] + [b"\x00", b"\x01", RECONSTRUCT, UINT8])))
def test_random_programs_end_in_a_value_or_a_value_error(parts):
    survives(b"".join(parts) + b".")


def test_every_single_bit_flip_ends_in_a_value_or_a_value_error(official):
    whole = official(*sample())
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        survives(bytes(flipped))


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 200_000,
        b"]" + b"\x85" * 200_000 + b".",
        b"](" * 50_000 + b"e" * 50_000 + b".",
        b"]q\x00" + b"h\x00a" * 70_000 + b".",
        b"N" + b"q\x00" * 100_000 + b".",
    ],
    ids=["marks", "deep tuple", "deep list", "list in itself", "memo"],
)
def test_hostile_shapes_cost_linear_time(data):
    began = time.process_time()
    survives(data)
    assert time.process_time() - began < 10
