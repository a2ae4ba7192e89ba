"""Where every byte of a file goes, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from espalier.core.representation import Affine, Codebook, Masked, Outliers, Representation
from espalier.encode.header import PREFIX, Header

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: what it is and its bytes by what they say.

    ``values`` + ``positions`` + ``codebooks`` + ``floats`` = ``bytes``. Positions (which weights are zero) and
    values share one stream, so their bytes are apportioned by their order-0 entropies; bytes of a pool (small parts of
    several tensors coded together) by the number of elements.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    coders: dict[str, str]
    bytes: int
    values: int
    positions: int
    codebooks: int
    floats: int


@dataclass(frozen=True)
class FileInfo:
    """The whole file: ``bytes`` = ``prefix`` + ``header`` + ``graph`` + ``plans`` + all tensors, exactly."""

    bytes: int
    prefix: int
    header: int
    graph: int
    plans: int
    model: str
    tensors: tuple[TensorInfo, ...]
    aliases: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``total``, ``prefix``, ``header``, ``graph``, ``plans`` and a row per tensor whose ``bytes`` are
        split into ``values``, ``positions``, ``codebooks`` and ``floats``.
        """
        found = dataclasses.asdict(self)
        found["total"], found["tensors"] = found.pop("bytes"), list(found["tensors"])
        for row in found["tensors"]:
            row["shape"] = list(row["shape"])
            row["coder"] = ", ".join(dict.fromkeys(row.pop("coders").values()))
            row["bytes"] = {name: row.pop(name) for name in ("values", "positions", "codebooks", "floats")}
        return found


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` split into whole numbers in proportion to ``weights``; they add up to ``total``."""
    scale = math.fsum(weights)
    if scale <= 0:
        return [total, *[0] * (len(weights) - 1)] if weights else []
    exact = [total * weight / scale for weight in weights]
    found = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: found[i] - exact[i])
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


def _entropy(counts: Array) -> float:
    """Bits of a message with these symbol ``counts`` at its order-0 entropy."""
    found = counts[counts > 0].astype(np.float64)
    return float((found * (math.log2(found.sum()) - np.log2(found))).sum()) if found.size else 0.0


def position_share(representation: Representation, part: str) -> float:
    """The share 0..1 of integer part ``part`` that says where the zeros are: by order-0 entropies."""
    while isinstance(representation, Masked) and part.startswith("inner."):
        representation, part = representation.inner, part.removeprefix("inner.")
    if part == "mask":
        return 1.0
    if isinstance(representation, Outliers):
        return 0.0
    table = isinstance(representation, Codebook) and representation.axis is None
    if isinstance(representation, Codebook) and table and part == "indices" and (representation.centroids == 0).any():
        codes, zero = representation.indices, int((representation.centroids == 0).argmax())
    elif isinstance(representation, Affine) and part == "codes" and representation.zero is not None:
        codes, zero = representation.codes, representation.zero
    else:
        return 0.0
    kept = codes[codes != zero]
    flags = _entropy(np.array([kept.size, codes.size - kept.size]))
    values = _entropy(np.unique(kept, return_counts=True)[1])
    return flags / (flags + values) if flags + values > 0 else 0.0


def _column(part: str, dtype: str) -> str:
    leaf = part.rpartition(".")[2]
    if leaf in ("mask", "indices", "codes"):
        return "codes"
    if leaf == "centroids":
        return "codebooks"
    return "floats" if dtype.startswith("float") or leaf in ("scale", "zero_point") else "values"


def describe(header: Header, stored_header: int, tensors: Mapping[str, Representation]) -> FileInfo:
    """The account of a file with this ``header`` (``stored_header`` bytes, checksums included) and these tensors."""
    shares: dict[tuple[str, str], list[int]] = {}
    for pool in header.pools:
        members = [
            math.prod(part.shape)
            for tensor in header.tensors
            for part in tensor.parts
            if not part.coder and part.pool == (pool.dtype, pool.name)
        ]
        shares[pool.dtype, pool.name] = apportion(pool.size, members)[::-1]
    pool_coder = {(pool.dtype, pool.name): pool.coder for pool in header.pools}
    rows = []
    for tensor in header.tensors:
        columns = {"values": 0, "positions": 0, "codebooks": 0, "floats": 0}
        coders = {}
        for part in tensor.parts:
            size = part.size if part.coder else shares[part.pool].pop() if part.pool in shares else 0
            coders[part.name] = part.coder or pool_coder.get(part.pool, "none")
            column = _column(part.name, part.dtype)
            if column == "codes":
                positions = round(size * position_share(tensors[tensor.name], part.name))
                columns["positions"] += positions
                columns["values"] += size - positions
            else:
                columns[column] += size
        rows.append(
            TensorInfo(tensor.name, tensor.shape, tensor.dtype, tensor.kind, coders, sum(columns.values()), **columns)
        )
    graph, plans = (blob[1] if blob else 0 for blob in (header.graph, header.plans))
    total = PREFIX.size + stored_header + graph + plans + sum(row.bytes for row in rows)
    return FileInfo(
        bytes=total, prefix=PREFIX.size, header=stored_header, graph=graph, plans=plans, model=header.model,
        tensors=tuple(rows), aliases=dict(header.aliases),
    )  # fmt: skip
