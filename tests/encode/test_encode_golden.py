"""Golden bitstreams: files written by an earlier version must read the same for ever.

``ESPALIER_GOLDEN=write`` writes them anew: only when the format changes on purpose, with a new major version.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from espalier.encode import encode, open_file
from espalier.encode.adaptive import Adaptive
from espalier.encode.bits import deflate
from espalier.encode.huffman import Huffman
from espalier.encode.packed import Packed
from espalier.encode.planes import Planes
from espalier.encode.rans import Rans

from .support import codebook, first_kinds, quantized_kinds, same

FOLDER = Path(__file__).resolve().parents[1] / "golden"
CASES = {
    "adaptive-mixed": (Adaptive(),),
    "adaptive-direct": (Adaptive(mixing="off"),),
    "rans": (Rans(),),
    "huffman": (Huffman(),),
    "huffman-5-bits": (Huffman(index_bits=5),),
    "planes-packed": (Planes(), Packed()),
    "quantized": (Adaptive(), Rans(), Huffman()),
}


def golden(name: str):
    coders = CASES[name]
    tensors = first_kinds(seed=7) | {"conv.weight": codebook((6, 5, 3, 3), 0.4, levels=40, seed=8)}
    if name == "quantized":
        tensors |= quantized_kinds(seed=7)
    return tensors, encode(
        tensors, coders=coders, aliases={"tied": "half"}, graph=b"graph", plans=[{"edit": "none"}], model=name
    )


@pytest.mark.parametrize("name", CASES)
def test_golden_files_read_as_they_were_written(name):
    path = FOLDER / f"{name}.espalier"
    tensors, data = golden(name)
    if os.environ.get("ESPALIER_GOLDEN") == "write":
        path.write_bytes(data)
    with open_file(path) as archive:
        assert archive.keys() == tuple(tensors)
        assert (archive.model, archive.graph, archive.plans) == (name, b"graph", [{"edit": "none"}])
        assert all(same(archive.representation(key), tensors[key]) for key in tensors)


SAME_ZLIB = zlib.crc32(deflate(bytes(range(256)) * 9 + b"espalier" * 40)) == 226539207


@pytest.mark.skipif(not SAME_ZLIB, reason="another zlib deflates the header differently")
@pytest.mark.parametrize("name", CASES)
def test_the_encoder_still_writes_the_golden_bytes(name):
    assert golden(name)[1] == (FOLDER / f"{name}.espalier").read_bytes()
