"""Entropy coders and the .espalier container. Needs NumPy and the standard library, no torch."""

from __future__ import annotations

from espalier.core.registry import register
from espalier.encode.archive import Archive, info, open_file, verify
from espalier.encode.coder import Coder, Hint
from espalier.encode.coders import CODERS
from espalier.encode.huffman import deep_compression_bits
from espalier.encode.info import FileInfo, TensorInfo
from espalier.encode.unpack import unpack
from espalier.encode.writer import encode, write

register("encode", CODERS)

__all__ = [
    "CODERS",
    "Archive",
    "Coder",
    "FileInfo",
    "Hint",
    "TensorInfo",
    "deep_compression_bits",
    "encode",
    "info",
    "open_file",
    "unpack",
    "verify",
    "write",
]
