"""Hostile files: one test per known attack, every flipped bit, every truncation, memory under a cap."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.core.errors import Corrupt, FileError, LimitExceeded, NotOurFile, UnsupportedVersion
from espalier.core.representation import Codebook
from espalier.encode import encode, open_file, verify
from espalier.encode.bits import deflate, inflate, varint
from espalier.encode.coders import decode
from espalier.encode.header import DICTIONARY, MAGIC, PREFIX, header_checksum
from espalier.encode.read_header import parse
from espalier.encode.symbols import Alphabet

from .support import codebook, dense, every_kind


def forge(
    rows: object, blobs: bytes = b"", checksums: tuple[int, ...] = (), text: bytes | None = None, **prefix: int
) -> bytes:
    """A file with right checksums and lengths, saying whatever an attacker wants it to say."""
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode() if text is None else text
    stored = deflate(text, DICTIONARY) + b"".join(struct.pack("<I", c) for c in checksums)
    total = prefix.get("total", 32 + len(stored) + len(blobs))
    head = PREFIX.pack(
        MAGIC, prefix.get("major", 1), 0, prefix.get("flags", 0), prefix.get("stored", len(stored)),
        prefix.get("decoded", len(text)), 0, total,
    )  # fmt: skip
    head = head[:20] + struct.pack("<I", header_checksum(head, stored)) + head[24:]
    return head + stored + blobs


def one_tensor(shape: list[int], part: list[object], **more: object) -> list[object]:
    return ["", [["w", "dense", shape, [part], *more.values()]]]


def refused(data: bytes, error: type[FileError] = Corrupt, match: str | None = None) -> None:
    with pytest.raises(error, match=match):
        verify(data)


def test_the_forger_can_write_good_files():
    values = np.arange(3, dtype=np.uint8)
    blob = varint(0) + bytes([2]) + b"\x18"
    crc = zlib.crc32(values.tobytes(), zlib.crc32(blob))
    data = forge(
        ["", [["w", "dense", [3], [["values", "uint8"]], "uint8"]], [["uint8", "values", "packed", 3]]], blob, (crc,)
    )
    with open_file(data) as archive:
        assert archive.get("w").tolist() == [0, 1, 2]


# ---- every bit, every length

SMALL = encode(every_kind(), aliases={"tied": "fc1.weight"}, graph=b"graph" * 9, plans=[{"a": 1}], model="m")


def test_every_single_bit_flip_is_noticed():
    verify(SMALL)
    for bit in range(8 * len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FileError):
            verify(bytes(damaged))


def test_every_truncation_is_noticed():
    for length in range(len(SMALL)):
        with pytest.raises(FileError):
            verify(SMALL[:length])


def test_anything_appended_is_noticed():
    for extra in (b"\0", b"PK\3\4", SMALL):
        refused(SMALL + extra, Corrupt, "appended")


@settings(max_examples=100)
@given(st.data())
def test_rewritten_blobs_with_right_lengths_are_noticed(data):
    start = data.draw(st.integers(32, len(SMALL) - 8))
    junk = data.draw(st.binary(min_size=1, max_size=8))
    damaged = SMALL[:start] + junk + SMALL[start + len(junk) :]
    if damaged != SMALL:
        refused(damaged, FileError)


def test_text_mode_transfer_is_noticed():
    refused(SMALL.replace(b"\r\n", b"\n"), NotOurFile)


# ---- other formats


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x89ES", b"PK\x03\x04" + bytes(60), pickle.dumps({"a": 1}), b"{}" * 40, struct.pack("<Q", 2) + b"{}",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
    ],
    ids=["empty", "short", "zip", "pickle", "json", "safetensors", "png"],
)  # fmt: skip
def test_other_files_are_not_ours(data):
    refused(data, NotOurFile, "starts with")


def test_newer_versions_and_unknown_flags_are_refused():
    refused(forge(["", []], major=2), UnsupportedVersion, "Update")
    refused(forge(["", []], flags=4), UnsupportedVersion, "flags")


# ---- the header


def test_lengths_that_lie():
    refused(forge(["", []], stored=1 << 31), LimitExceeded)
    refused(forge(["", []], decoded=(1 << 20) + 1), LimitExceeded)
    refused(forge(["", []], stored=1000), Corrupt, "does not fit")
    refused(forge(["", []], total=1 << 40), Corrupt, "truncated")
    refused(forge(["", []], decoded=5), Corrupt, "inflate")
    refused(forge(["", []], decoded=5000), Corrupt, "inflate")


def test_a_header_bomb_is_not_inflated():
    data = forge(None, text=b"[" + b" " * (1 << 20) + b"]", decoded=1 << 20)
    tracemalloc.start()
    refused(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[", b"nul", b"\xff", b'["",[],[],{"a":"b","a":"c"}]', b'["",[[NaN]]]',
        b'["",[["w","dense",[1e999],[]]]]',
        b'["",[["w","dense",[1.0],[]]]]', b"[" * 100_000, b'["",' + b"9" * 5000 + b"]", b'["", []]', b'["\\u0061",[]]',
        b'["",[],[],{"\\ud800":"w"}]', b'"abc"', b"7", b"[1]", b'{"model":""}', b'["",[],[],{},[],[],[]]',
        b'["",[["w","dense",[],[],"float32",' + b'{"inner":' * 30 + b"1" + b"}" * 30 + b"]]]",
    ],
    ids=lambda text: text[:24].decode("latin-1"),
)  # fmt: skip
def test_odd_json_is_refused(text):
    with pytest.raises(Corrupt):
        parse(text)
    refused(forge(None, text=text))


@pytest.mark.parametrize(
    "tensor",
    [
        7, [], ["w"], ["w", "dense", 3, []], ["w", "dense", [-1], []], ["w", "dense", [1 << 31], []],
        ["w", "dense", [1] * 9, []], ["w", "dense", [True], []], ["w", "dense", ["1"], []], ["w", 1, [1], []],
        ["w", "dense", [1], [["values"]]], ["w", "dense", [1], [["values", "float32", "planes", -1]]],
        ["w", "dense", [1], [["values", "float32", "planes", 1 << 63]]], ["w", "dense", [1], [], "float32", []],
        ["w", "dense", [1], [["values", "float32", [1]]]], ["w", "dense", [1], {}], ["", "dense", [0], []],
        ["a\0b", "dense", [0], []], ["n" * 513, "dense", [0], []],
        ["w", "dense", [0], [["values", "float32"], ["values", "float32"]]],
    ],
    ids=lambda row: str(row)[:60],
)  # fmt: skip
def test_odd_tensors_are_refused(tensor):
    refused(forge(["", [tensor]]))


@pytest.mark.parametrize(
    "tensor",
    [
        ["w", "circus", [0], [["values", "float32"]]], ["w", "dense", [0], [["values", "float32"]], "float8"],
        ["w", "dense", [0], [["values", "object"]]], ["w", "dense", [0], [["values", "int64"]]],
        ["w", "dense", [0], []],
        ["w", "masked", [0], [["mask", "bool"]], "float32", {"inner": 3}],
        ["w", "masked", [0], [["mask", "bool"]], "float32", {"inner": {"kind": "masked", "inner": {"kind": "dense"}}}],
        ["w", "affine", [0], [["codes", "int8"]], "float32", {"bits": "8"}],
        ["w", "affine", [0], [["codes", "int8"]], "float32", {"bits": 99}],
    ],
    ids=lambda row: str(row)[:60],
)  # fmt: skip
def test_representations_that_do_not_fit_are_refused(tensor):
    refused(forge(["", [tensor]]))


def test_duplicate_names_aliases_and_pools():
    empty = ["w", "dense", [0], [["values", "float32"]]]
    refused(forge(["", [empty, empty]]), Corrupt, "one name")
    refused(forge(["", [empty], [], {"w": "w"}]), Corrupt, "alias")
    refused(forge(["", [empty], [], {"v": "nowhere"}]), Corrupt, "alias")
    refused(forge(["", [empty], [], {"v": ["w"]}]), Corrupt, "alias")
    refused(forge(["", [empty], [], {"v": "u", "u": "w"}]), Corrupt, "alias")
    refused(forge(["", [empty], [["float32", "values", "planes", 0]]]), Corrupt, "pools")
    refused(forge(one_tensor([3], ["values", "float32"])), Corrupt, "pools")


# ---- places


def test_blobs_cover_the_file_exactly():
    for size, blobs in ((4, b""), (0, b"1234"), (3, b"1234"), (5, b"1234"), (1 << 61, b"1234")):
        refused(forge(one_tensor([5000], ["values", "float32", "planes", size]), blobs, (0,)), Corrupt, "cover")


def test_the_number_of_checksums_must_fit():
    for checksums in ((), (1, 2)):
        refused(forge(one_tensor([5], ["values", "uint8", "packed", 2]), b"\0\0", checksums), Corrupt, "checksums")


# ---- sizes


@pytest.mark.parametrize("shape", [[1 << 30, 4], [4194305, 4194305, 524288], [(1 << 31) - 1] * 8])
def test_huge_shapes_are_refused_before_anything_is_allocated(shape):
    tracemalloc.start()
    refused(forge(one_tensor(shape, ["values", "float32", "planes", 2]), b"\0\0", (0,)), LimitExceeded, "max_")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(("coder", "blob"), [("packed", b"\0\0"), ("planes", b"\0\1\7"), ("huffman", b"\0\0\0\1\0")])
def test_decompression_bombs_are_refused_by_their_ratio(coder, blob):
    """A constant costs three bytes for any shape."""
    data = forge(one_tensor([1 << 28], ["values", "uint8", coder, len(blob)], dtype="uint8"), blob, (0,))
    refused(data, LimitExceeded, "max_ratio")


def test_many_tensors_add_up_against_the_limits():
    rows = [[f"w{i}", "dense", [1 << 20], [["values", "uint8", "packed", 2]], "uint8"] for i in range(100)]
    data = forge(["", rows], b"\0\0" * 100, (0,) * 100)
    refused(data, LimitExceeded, "max_ratio")
    with pytest.raises(LimitExceeded, match="max_elements"):
        open_file(data, max_elements=1 << 26)
    with pytest.raises(LimitExceeded, match="max_bytes"):
        open_file(data, max_bytes=1 << 20)


def test_limits_can_be_raised_by_who_trusts_a_file():
    zeros = Codebook(
        shape=(1 << 12, 1 << 12), indices=np.zeros((1 << 12, 1 << 12), np.uint8), centroids=np.zeros(1, np.float32)
    )
    data = encode({"w": zeros}, coders=())
    with pytest.raises(LimitExceeded, match="max_ratio"):
        open_file(data)
    with open_file(data, max_ratio=1 << 40) as archive:
        assert archive.shape("w") == (1 << 12, 1 << 12)


def test_an_inflated_part_stops_at_its_claimed_size():
    bomb = deflate(bytes(1 << 24))
    tracemalloc.start()
    with pytest.raises(Corrupt, match="inflate"):
        inflate(bomb, 100)
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()


def test_a_forged_graph_or_plans():
    for data, size, error in ((deflate(bytes(1 << 20)), 100, Corrupt), (b"xx", 1, Corrupt), (b"xx", 5, Corrupt)):
        refused(forge(["", [], [], {}, [size, len(data)]], data, (0,)), error)
    for text in (b"{}", b"nope", b"[" * 5000, b"\xff\xff"):
        refused(
            forge(["", [], [], {}, [], [len(text), len(text)]], text, (zlib.crc32(text, zlib.crc32(text)),)),
            Corrupt,
            "plans",
        )
    refused(forge(["", [], [], {}, [1 << 50, 2]], b"xx", (0,)), LimitExceeded)


# ---- streams


def test_bad_frequency_tables():
    head = Alphabet(0, 1, 0).write() + varint(1)
    byte = np.dtype(np.uint8)
    for table, words in (
        (varint(8192) + varint(8191), "add up"),
        (varint(0) + varint(0), "add up"),
        (varint(16384) + varint(16384), "add up"),
        (varint(16385) + varint(0), "at most"),
    ):
        with pytest.raises(Corrupt, match=words):
            decode("rans", head + table + bytes(4), byte, (3,))
    with pytest.raises(Corrupt, match="lanes"):
        decode("rans", Alphabet(0, 1, 0).write() + varint(0), byte, (3,))
    with pytest.raises(Corrupt, match="starting"):
        decode("rans", head + varint(16384) + varint(0) + b"\0\0\2\0", byte, (3,))


def test_codes_outside_their_type():
    for name in ("rans", "adaptive", "huffman"):
        with pytest.raises(Corrupt, match="fit"):
            decode(name, Alphabet(250, 9, 0).write() + bytes(20), np.dtype(np.uint8), (3,))
    with pytest.raises(Corrupt, match="fit"):
        decode("packed", varint(2 * 254) + bytes([2, 0b11000000]), np.dtype(np.uint8), (1,))
    with pytest.raises(Corrupt, match="boolean"):
        decode("planes", b"\0\1\2", np.dtype(np.bool_), (3,))
    with pytest.raises(Corrupt, match="shortest"):
        decode("packed", b"\x80\0\0", np.dtype(np.uint8), (1,))


def test_an_index_out_of_the_codebook():
    good = codebook((70, 70))
    bad = Codebook(shape=good.shape, indices=good.indices + np.uint8(1), centroids=good.centroids)
    refused(encode({"w": bad}), Corrupt, "codebook")


def test_a_mask_that_keeps_another_number():
    mask = np.ones(5000, dtype=np.bool_)
    blob = varint(2) + b"\0"
    parts = [["mask", "bool", "packed", 2], ["inner.values", "float32", "planes", 9, [4000]]]
    rows = ["", [["w", "masked", [5000], parts, "float32", {"inner": {"kind": "dense"}}]]]
    values = b"\0" + b"\1\0" * 4
    decoded = np.zeros(4000, np.float32).tobytes()
    crc = zlib.crc32(decoded, zlib.crc32(values, zlib.crc32(mask.tobytes(), zlib.crc32(blob))))
    refused(forge(rows, blob + values, (crc,)), Corrupt, "fit together")


def test_no_name_becomes_a_path():
    """Names are only ever keys."""
    with open_file(encode({"../../etc/passwd": dense(np.ones(2, np.float32))})) as archive:
        assert archive.get("../../etc/passwd").tolist() == [1, 1]


@pytest.mark.slow
def test_every_flip_with_a_repaired_header_checksum_is_typed():
    """An attacker repairs checksums: nothing but a typed error or a well-formed archive may come out."""
    stored = struct.unpack_from("<I", SMALL, 12)[0]
    for bit in range(8 * 32, 8 * (32 + stored)):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        damaged[20:24] = struct.pack("<I", header_checksum(bytes(damaged[:32]), bytes(damaged[32 : 32 + stored])))
        with contextlib.suppress(FileError):
            verify(bytes(damaged))
