r"""Scale: the channels whose batch norm multiplies them by least go.

Paper    Liu, Li, Shen, Huang, Yan, Zhang. Learning Efficient Convolutional Networks through Network Slimming. ICCV
         2017. arXiv:1708.06519
Formula  s_c = |gamma_c|, gamma the scale of the batch norm that follows the layer
Departs  Only layers whose output goes into one batch norm and nowhere else have scores. The penalty that makes gammas
         small is ``slimming``, a part of prune.regularize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from espalier.core.context import Context
from espalier.core.parametrize import Slot, slots
from espalier.core.selection import Selection
from espalier.prune.parts import Criterion, Scores
from espalier.prune.responses import unit_layers
from espalier.train.looking import batches, looking


class _Consumers(TorchFunctionMode):
    """Counts, for one run, what reads the output of every watched layer, and notes the batch norms among them."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers
        self.made: dict[int, tuple[str, Tensor]] = {}  # the tensors are held, so that no id is given twice
        self.calls: dict[str, int] = {}
        self.reads: dict[str, int] = {}
        self.norms: dict[str, list[_BatchNorm]] = {}

    def leave(self, module: nn.Module, _: Any, output: Any) -> None:
        """Forward hook of a watched layer."""
        if isinstance(output, Tensor):
            name = self.layers[id(module)]
            self.calls[name] = self.calls.get(name, 0) + 1
            if isinstance(module, _ConvNd) or output.ndim == 2:  # else its units do not lie where a batch norm has them
                self.made[id(output)] = name, output

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a batch norm."""
        if args and id(args[0]) in self.made and isinstance(module, _BatchNorm):
            self.norms.setdefault(self.made[id(args[0])][0], []).append(module)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [x for x in _pytree.tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and id(x) in self.made]
        result = func(*args, **(kwargs or {}))
        if _holds_tensor(result):  # shapes and numbers read from it are no use of its values
            for tensor in given:
                name = self.made[id(tensor)][0]
                self.reads[name] = self.reads.get(name, 0) + 1
        return result


def _holds_tensor(result: Any) -> bool:
    return any(isinstance(item, Tensor) for item in _pytree.tree_leaves(result))


def batch_norms(model: nn.Module, selection: Selection, context: Context) -> dict[str, Slot]:
    """Weight name -> gamma (shape (output channels,)) of the batch norm that alone reads the layer's output.

    Runs the model on one training batch. Layers without one are recorded as skipped.
    """
    layers = {id(module): slot.name for slot in selection for module in unit_layers(slot)}
    seen = _Consumers(layers)
    handles = [module.register_forward_hook(seen.leave) for module in model.modules() if id(module) in layers]
    handles += [m.register_forward_pre_hook(seen.enter) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        with looking(model, context, grad=False), seen:
            for batch in batches(model, context, 1, "following the channels"):
                context.data.predict(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    scales = {id(module): slot for slot in slots(model).values() for _, module, name in slot.owners if name == "weight"}
    found = {}
    for slot in selection:
        norms = seen.norms.get(slot.name, [])
        calls, same = seen.calls.get(slot.name, 0), len({id(norm) for norm in norms}) == 1
        if not (calls and same and len(norms) == calls == seen.reads.get(slot.name, 0)):
            context.skip(slot.name, "no batch norm is the only reader of its output")
        elif id(norms[0]) not in scales:
            context.skip(slot.name, "the batch norm that follows has no scale (affine=False)")
        else:
            found[slot.name] = scales[id(norms[0])]
    return found


@dataclass(frozen=True, kw_only=True)
class Scale(Criterion):
    """Score of an output channel = how much the batch norm that follows multiplies it by."""

    id: ClassVar[str] = "scale"
    of = "units"

    @property
    def needs(self) -> frozenset[str]:
        """One batch, to see which batch norm follows which layer."""
        return super().needs | {"train"}

    def scores(self, model: nn.Module, selection: Selection, context: Context) -> Scores:
        return {name: gamma.value().abs() for name, gamma in batch_norms(model, selection, context).items()}
