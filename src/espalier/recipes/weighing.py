"""The length of the file a model would be written to now: what a recipe may decide on while it runs."""

from __future__ import annotations

from torch import nn

from espalier.core.context import Context
from espalier.core.model import copy_model
from espalier.core.norms import Normalise
from espalier.core.parametrize import freeze
from espalier.core.plan import Plan, applied
from espalier.encode import encode

CODERS = ("adaptive",)
"""The coder that is smallest for nearly every tensor; trying all of them after every step takes their time."""


def file_length(model: nn.Module, context: Context) -> int:
    """Bytes of the weights-only file of ``model``, batch norms as a scale and a shift, remaining floats as fp32."""
    model = copy_model(model).cpu().eval()
    normalise = Normalise()
    needless = normalise.statistics(model)
    if needless:
        Plan((normalise,)).apply(model)
    tensors, aliases = freeze(model)
    return len(
        encode(
            {name: tensor for name, tensor in tensors.items() if name not in needless},
            aliases={name: target for name, target in aliases.items() if name not in needless},
            plans=applied(model).to_json(), coders=CODERS,
            progress=lambda done, total: context.progress("weighing", done, total),
        )
    )  # fmt: skip
