r"""Sensitivity analysis: the metric with one layer alone quantized, and with all layers but that one.

Paper    Krishnamoorthi. Quantizing deep convolutional networks for efficient inference. arXiv:1806.08342 (which layers
         cost accuracy); Dong et al. HAWQ. ICCV 2019. arXiv:1905.03696 (that layers differ)
Formula  on(l) = metric of the network with layer l in b bits and all others in floating point;
         off(l) = metric of the network with all layers in b bits and layer l in floating point
Departs  Nothing is trained in between. With activations, a layer's input goes with its weight.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from espalier.core.context import Context, EpochStore
from espalier.core.errors import UsageError
from espalier.core.inputs import QuantizedInput, quantized_input, quantized_inputs
from espalier.core.metric import Score
from espalier.core.model import copy_model, digest
from espalier.core.parametrize import Slot
from espalier.core.recipe import step_to_data
from espalier.core.record import Record
from espalier.core.task import Split
from espalier.quantize.parts import Stage
from espalier.quantize.quantize import Quantize
from espalier.quantize.trials import Trial, exchanged, tried


@dataclass(frozen=True)
class Switch:
    """One layer that can be quantized for a while: its weight, and the inputs that go with it."""

    slot: Slot
    trial: Trial | None
    inputs: tuple[QuantizedInput, ...]


class Switches:
    """A copy of a model with a switch for every layer that ``step`` would quantize; all are off."""

    def __init__(self, model: nn.Module, step: Quantize, context: Context) -> None:
        self.context = replace(context, record=Record(context.path, step.name))  # what is left alone is told elsewhere
        twin = copy_model(model)
        with self.context.forked("sensitivity"):
            places = step.places(twin, self.context, step.name)
            observed = step.observed(twin, places, self.context)
            self.model = step._inputs(twin, observed, places, Stage("sensitivity"), self.context)
            self.switches: dict[str, Switch] = {}
            for place in places:
                found = step.weight_bits(place)
                trial = None
                if found is not None and found[0].refuses(place.slot) is None:
                    trial = tried(place.slot, *found)
                layers = [layer for layer, owner, _ in observed.values() if owner.slot is place.slot]
                inputs = tuple(q for q in map(quantized_input, layers) if q is not None)
                if trial is not None or inputs:
                    self.switches[place.slot.name] = Switch(place.slot, trial, inputs)
        if not self.switches:
            raise UsageError(f"{step.name} would quantize nothing here: choose other layers, or ends=same.")

    def measure(self, names: Collection[str], split: Split) -> Score:
        """The metric with the layers ``names`` quantized."""
        on = [switch for name, switch in self.switches.items() if name in names]
        for quantizer in quantized_inputs(self.model).values():
            quantizer.active = any(quantizer is one for switch in on for one in switch.inputs)
        with ExitStack() as stack:
            for switch in on:
                if switch.trial is not None:
                    stack.enter_context(exchanged(switch.slot, switch.trial.value))
            return self.context.measure(self.model, split)


def analyse(
    model: nn.Module, context: Context, step: Quantize, *, split: Split = "val", store: EpochStore | None = None
) -> dict[str, Any]:
    """What there was (``full``, its ``stderr``), with all layers quantized (``all``), and ``layers``, as plain data.

    A layer's row: name, parameters, bits (None where its weight stays), input_bits, and the metric with it alone
    (``on``) and with all but it (``off``). ``store``: where finished layers are kept after each; a second call goes on
    where the first was stopped, if model and step are the same. ``model`` stays as it is.
    """
    context.check(step.replace(epochs=0, gradients=None, errors=None, schemes=(), reestimate=False))
    switches, metric = Switches(model, step, context), context.data.scorer()
    names = list(switches.switches)
    full, everything = (switches.measure(some, split) for some in ((), names))
    head: dict[str, Any] = {
        "metric": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better, "split": split,
        "full": full.value, "stderr": full.stderr, "all": everything.value, "names": names, "model": digest(model),
        "method": json.loads(json.dumps(step_to_data(step))),
    }  # fmt: skip
    kept = store.load() if store is not None else None
    rows: list[dict[str, Any]] = kept[2]["rows"] if kept is not None and kept[2]["head"] == head else []
    done = {row["name"] for row in rows}
    for number, (name, switch) in enumerate(switches.switches.items(), 1):
        if name not in done:
            on = switches.measure((name,), split).value
            off = switches.measure([other for other in names if other != name], split).value
            rows.append({
                "name": name, "parameters": switch.slot.shape.numel(),
                "bits": switch.trial.bits if switch.trial is not None else None,
                "input_bits": switch.inputs[0].bits if switch.inputs else None, "on": on, "off": off,
            })  # fmt: skip
            if store is not None:
                store.save(number, {}, {"head": head, "rows": rows})
        context.progress("sensitivity", number, len(names))
    return {**head, "layers": rows}
