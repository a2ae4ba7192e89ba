"""The graph in a file: a few bytes per node, then raw deflate.

    version, names of positional arguments, inputs, call tree
    roles of tensors that are not the usual ones, tied names
    per node: operator code, which optional arguments are given, each by the kind its signature declares
    output tree

References count backwards (1 = the value just before) and tensors forwards from the last one named (0 = the
next), so the repeated blocks of a network become repeated bytes, which deflate stores once. Tensor names,
shapes and dtypes are not stored: the file around the graph lists them, and both sides count in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from espalier.core.errors import Corrupt, FileError, ModelError, UsageError
from espalier.graph.check import DEFAULT_LIMITS, Limits, infer
from espalier.graph.codec import deflate, inflate
from espalier.graph.graph import Graph
from espalier.graph.read import GraphReader
from espalier.graph.write import GraphWriter


def dumps(graph: Graph, *, names: Sequence[str] | None = None) -> bytes:
    """``graph`` as bytes; ``names`` are the tensor names in the order the reader will know them.

    The order defaults to that of ``graph.tensors``, then ``graph.aliases``. Raises UsageError when ``names``
    lacks a tensor of the graph or lists one twice.
    """
    order = list(names) if names is not None else [*graph.tensors, *graph.aliases]
    missing = [name for name in (*graph.tensors, *graph.aliases) if name not in set(order)]
    if missing or len(set(order)) != len(order):
        raise UsageError(f"names must list every tensor of the graph once; missing: {missing[:5]}.")
    return deflate(GraphWriter(graph, order).write())


def loads(data: bytes, *, tensors: Mapping[str, tuple[tuple[int, ...], str]], limits: Limits = DEFAULT_LIMITS) -> Graph:
    """The graph in ``data``; ``tensors`` are name -> (shape, dtype) in the order ``dumps`` was given.

    The whole graph is checked and every shape inferred before it is returned. Raises UnsupportedVersion,
    Corrupt or LimitExceeded; nothing else, whatever the bytes.
    """
    plain = inflate(data, limits.bytes)
    try:
        graph = GraphReader(plain, tensors, limits).read()
        infer(graph, limits=limits)
    except FileError:
        raise
    except ModelError as error:
        raise Corrupt(f"The graph is not well formed: {error}") from error
    return graph
