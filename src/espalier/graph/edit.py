"""A plan's edit that turns a model into the runner of a graph: for surgery the model's own code cannot follow."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from espalier.core.edits import Edit
from espalier.core.errors import Corrupt, LimitExceeded, PhaseError
from espalier.core.forms import Mask
from espalier.core.parametrize import attach, slots
from espalier.core.plan import register_edit
from espalier.graph.graph import Graph
from espalier.graph.runner import Runner
from espalier.graph.serialise import dumps, loads

MAX_BYTES = 2**28
"""Bytes the packed constants of one graph may unfold to."""


@register_edit
@dataclass(frozen=True, kw_only=True)
class AsGraph(Edit):
    """Put a :class:`Runner` of a graph in the place of the whole model, with the model's tensors by name.

    ``graph``: base64 of its serialisation; ``tensors``: JSON of name -> [shape, dtype]; ``constants``: base64 of
    deflated safetensors.
    """

    kind: ClassVar[str] = "graph"
    graph: str
    tensors: str
    constants: str

    @classmethod
    def of(cls, graph: Graph) -> AsGraph:
        """The edit for a graph, its constants packed in."""
        names = [*graph.tensors, *graph.aliases]
        specs = {name: [list(spec.shape), spec.dtype] for name, spec in graph.tensors.items()}
        constants = {name: tensor.contiguous() for name, tensor in graph.constants.items()}
        return cls(
            graph=base64.b64encode(dumps(graph, names=names)).decode(),
            tensors=json.dumps([specs, dict(graph.aliases)]),
            constants=base64.b64encode(zlib.compress(save(constants))).decode(),
        )

    def summary(self) -> str:
        return "the graph of the model in the place of its code"

    def unpacked(self) -> tuple[Graph, dict[str, Tensor]]:
        """The graph and its constants. Raises ``Corrupt`` for anything that is none."""
        try:
            specs, aliases = json.loads(self.tensors)
            shapes = {str(name): (tuple(shape), str(dtype)) for name, (shape, dtype) in specs.items()}
            shapes |= {str(alias): shapes[name] for alias, name in aliases.items()}
            engine = zlib.decompressobj()
            packed = engine.decompress(base64.b64decode(self.constants), MAX_BYTES)
            if engine.unconsumed_tail:
                raise LimitExceeded(f"a plan's graph has constants of more than {MAX_BYTES} bytes.")
            constants = load(packed)
            blob = base64.b64decode(self.graph)
        except (ValueError, TypeError, KeyError, zlib.error, SafetensorError, AttributeError) as error:
            raise Corrupt(f"a plan holds a graph that cannot be read: {error}") from error
        return loads(blob, tensors=shapes), constants

    def apply(self, model: nn.Module) -> nn.Module:
        """The runner, with what the model's tensors are now; masks are kept."""
        graph, constants = self.unpacked()
        if isinstance(model, Runner):
            model.rewrite(graph, constants)
            return model
        found = slots(model)
        forms = {name: slot.form for name, slot in found.items() if slot.form is not None}
        codes = [name for name, form in forms.items() if not isinstance(form, Mask)]
        if codes:
            raise PhaseError(
                f"{codes[0]} holds codes; the model's code cannot follow this change, and its graph takes dense or "
                "masked weights only. Put the structural step before the one that fixed the codes."
            )
        tensors: dict[str, Tensor] = {**state_of(model), **constants}
        frozen = {name for name, slot in found.items() if not slot.latent.requires_grad}
        runner = Runner(graph, tensors, frozen=frozen).train(model.training)
        for name, form in forms.items():
            attach(slots(runner)[name], form)
        return runner


def state_of(model: nn.Module) -> Mapping[str, Any]:
    """Every parameter's effective value and every buffer of a model, by its plain name."""
    values: dict[str, Any] = dict(model.named_buffers(remove_duplicate=False))
    for slot in slots(model).values():
        value = slot.value()
        values |= dict.fromkeys(slot.names, value)
    return values
