"""The same index planes through other coders. Each peer is optional: ``pip install -r benchmarks/requirements.txt``."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from espalier.core.representation import Codebook
from espalier.encode.adaptive import Adaptive
from espalier.encode.coder import Hint
from espalier.encode.huffman import Huffman
from espalier.encode.rans import Rans
from espalier.encode.writer import hint_of

Plane = "np.ndarray | Codebook"


def levels(plane: Any) -> tuple[np.ndarray, np.ndarray, Hint]:
    """``(codes, signed levels with 0 for a pruned weight, hint)`` of a ``Codebook`` or an index array whose code 0
    is the pruned weight."""
    if not isinstance(plane, Codebook):
        return plane, plane.astype(np.int32), Hint(0)
    ranks = np.argsort(np.argsort(plane.centroids, kind="stable"))
    zero = int(np.abs(plane.centroids).argmin())
    return plane.indices, (ranks[plane.indices] - ranks[zero]).astype(np.int32), hint_of(plane, "indices") or Hint(zero)


def order_0(codes: np.ndarray) -> float:
    """Bytes at the empirical order-0 entropy, no table."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def zstd_19(codes: np.ndarray, _levels: np.ndarray, _hint: Hint) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=19).compress(codes.astype(np.uint8).tobytes()))


def lzma_9(codes: np.ndarray, _levels: np.ndarray, _hint: Hint) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(codes.astype(np.uint8).tobytes(), format=lzma.FORMAT_RAW, filters=filters))


def constriction_rans(codes: np.ndarray, _levels: np.ndarray, _hint: Hint) -> int:
    """Static rANS with the exact frequencies, which are not counted."""
    import constriction

    counts = np.bincount(codes.ravel())
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(codes.ravel().astype(np.int32), model)
    return coder.get_compressed().nbytes


def deep_cabac(_codes: np.ndarray, signed: np.ndarray, _hint: Hint) -> int:
    """DeepCABAC's entropy coder alone (nncodec's extension), the better of both scans; decoded again as a check."""
    module = _extension()
    matrix = signed.reshape(signed.shape[0], -1) if signed.ndim > 1 else signed.reshape(1, -1)
    none = np.zeros(0, dtype=np.int32)
    sizes = []
    for plane in (np.ascontiguousarray(matrix), np.ascontiguousarray(matrix.T)):
        options = (0, 0, 0, 0), (module.HdspMode(0), np.zeros(0, dtype=np.int8), 0, 0)
        encoder = module.Encoder()
        encoder.initCtxModels(10, 1)
        encoder.encodeLayer(plane, *options[0], 0, none, *options[1])
        stream = encoder.finish()
        decoder = module.Decoder()
        decoder.setStream(stream)
        decoder.initCtxModels(10)
        back = np.zeros_like(plane)
        decoder.decodeLayer(back, *options[0], *options[1])
        if not np.array_equal(back, plane):
            raise ValueError("DeepCABAC did not give the plane back")
        sizes.append(len(stream))
    return min(sizes)


def _extension() -> Any:
    """nncodec's compiled coder, without importing the package (which needs torchvision and numpy<2)."""
    spec = importlib.util.find_spec("nncodec")
    folder = Path(str(spec.origin)).parent / "extensions" if spec else Path()
    found = sorted(
        path for path in folder.glob("deepCABAC*") if path.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))
    )
    if not found:
        raise ImportError("nncodec is not installed")
    loader = importlib.util.spec_from_file_location("deepCABAC", found[0])
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


def ours(coder: Any) -> Callable[[np.ndarray, np.ndarray, Hint], int]:
    return lambda codes, _levels, hint: len(coder.encode(codes, hint))


CODERS: dict[str, Callable[[np.ndarray, np.ndarray, Hint], int]] = {
    "espalier adaptive": ours(Adaptive()),
    "espalier adaptive, no mixing": ours(Adaptive(mixing="off")),
    "espalier rans": ours(Rans()),
    "espalier huffman (relative index)": ours(Huffman()),
    "espalier huffman, 5-bit index": ours(Huffman(index_bits=5)),
    "zstd -19": zstd_19,
    "lzma -9e": lzma_9,
    "constriction static rANS": constriction_rans,
    "nncodec DeepCABAC": deep_cabac,
}


def method_id(coder: str) -> str:
    """Our method's id for one of our coders, ``peer`` for everything else."""
    return f"encode.{coder.split()[1].rstrip(',')}" if coder.startswith("espalier") else "peer"


def compare(planes: Mapping[str, Any]) -> dict[str, float | str]:
    """Coder -> bytes of all ``planes`` (``Codebook``, or index arrays with 0 = pruned), or why it could not run."""
    prepared = [levels(plane) for plane in planes.values()]
    found: dict[str, float | str] = {"order-0 entropy": sum(order_0(codes) for codes, _, _ in prepared)}
    for name, size in CODERS.items():
        try:
            found[name] = sum(size(*plane) for plane in prepared)
        except ImportError as error:
            found[name] = f"not installed here: {error}"
    return found
