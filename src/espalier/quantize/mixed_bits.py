r"""Mixed bits: sensitive layers get more bits than others, under a budget.

Paper    Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer. HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural
         Networks. NeurIPS 2020. arXiv:1911.03852; by=loss: measured layer by layer, as practical tools do;
         measure=ms: Yao et al. HAWQ-V3. ICML 2021. arXiv:2011.10680 (section 3.4)
Formula  min sum_l O_l(b_l) with sum_l cost_l(b_l) <= budget;
         hessian: O_l(b) = mean trace(H_l) ||Q_b(w_l) - w_l||^2, trace(H_l) = E[v' H_l v], v_i = +-1 (Hutchinson);
         loss: O_l(b) = L(Q_b(w_l) alone) - L
Departs  The choice is by dynamic programming over the Pareto front; the paper lists it and picks. A negative mean
         trace, which is noise or a sign that the loss is not at a minimum, counts by its absolute value. Activations
         keep the bits of the step. A method that solves for its weights is tried as rounding to the nearest. Under a
         budget in ms a layer has an int8 kernel or stays in fp32, as x86 has no kernels below 8 bits; it is timed
         alone, with the rounding of its input and result, and what fusion saves in the whole is measured afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import ModelError, UsageError
from espalier.core.fields import Batches, Bits, Positive, Probes, Threads
from espalier.core.method import Technique
from espalier.core.metric import first_tensor
from espalier.core.model import copy_model
from espalier.core.parametrize import Slot, plain
from espalier.core.record import Record
from espalier.core.task import capture_call
from espalier.graph import macs, trace
from espalier.quantize.allocation import allocate
from espalier.quantize.analysis import analyse
from espalier.quantize.hutchinson import mean_traces
from espalier.quantize.places import Place, chosen, input_layers
from espalier.quantize.quantize import Quantize
from espalier.quantize.trials import Trial, exchanged, free_values, tried
from espalier.train.looking import batches, looking, needs

if TYPE_CHECKING:
    from espalier.quantize.layer_times import LayerTime

FLOAT_BITS = 32
KERNEL_BITS = 8
"""Of the integer kernels: fewer bits of a weight take the same time."""


@dataclass(frozen=True)
class Option:
    """One width a layer can have: as ``asked`` of the step, and tried with what the step's ends make of it.

    Neither for a layer that stays in fp32.
    """

    asked: int | None
    trial: Trial | None

    @property
    def bits(self) -> int:
        """Of the weight."""
        return FLOAT_BITS if self.trial is None else self.trial.bits

    @property
    def coded_bytes(self) -> int | None:
        """Length of the coded weight; None in fp32."""
        return None if self.trial is None else self.trial.coded_bytes()


@dataclass(frozen=True)
class Layer:
    """A weight whose bits are to be chosen, and the widths there are."""

    place: Place
    options: tuple[Option, ...]

    @property
    def slot(self) -> Slot:
        """The weight."""
        return self.place.slot


@dataclass(frozen=True, kw_only=True)
class MixedBits(Technique):
    """Choose the bits of every layer, then run ``step`` with them.

    ``by``: what says how sensitive a layer is; ``against``: the task's loss, or the outputs, which need no labels.
    ``measure``: what ``budget`` counts: bits per weight on average, bytes of the coded weights, or bit operations
    (multiply-adds x bits of the weight x bits of the input) per sample, or milliseconds of a sample in ``runtime`` with
    ``threads`` threads, where a layer may also stay in fp32. ``widths``: the bits there are to choose from.
    ``analyse``: first measure on val what each layer alone does at the bits chosen.
    """

    id: ClassVar[str] = "mixed-bits"
    by: Literal["hessian", "loss"] = "hessian"
    against: Literal["loss", "output"] = "loss"
    measure: Literal["bits", "bytes", "bops", "ms"] = "bits"
    budget: Positive = 4.0
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    threads: Threads = 1
    widths: tuple[Bits, ...] = (2, 3, 4, 6, 8)
    batches: Batches = 4
    probes: Probes = 4
    analyse: bool = False
    step: Quantize = field(default_factory=lambda: Quantize(ends="same"))

    @property
    def needs(self) -> frozenset[str]:
        """Training batches to look at, val for the analysis, and what the step needs."""
        return super().needs | needs(self.against) | ({"val"} if self.analyse else frozenset())

    def conflicts(self) -> list[str]:
        found = []
        if self.measure == "ms" and self.step.activations is None:
            found.append("measure=ms: int8 kernels take inputs in 8 bits: give the step activations=affine-input")
        if self.measure == "ms" and max(self.allowed, default=0) > KERNEL_BITS:
            found.append(f"measure=ms: no kernel has more than {KERNEL_BITS} bits; leave such widths out")
        if self.step.bits is not None:
            found.append("step.bits is what this step chooses: leave it out, or use quantize.quantize alone")
        if self.step.weights is None:
            found.append("the step quantizes no weights, so there are no bits to choose")
        elif not self.allowed:
            can = ", ".join(map(str, self.step.weights.widths))
            found.append(f"widths={self.widths}: {self.step.weights.id} can do {can}")
        return found

    @property
    def allowed(self) -> tuple[int, ...]:
        """The widths that the step's method can do, rising."""
        can = self.step.weights.widths if self.step.weights is not None else ()
        return tuple(sorted({bits for bits in self.widths if bits in can}))

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Look, choose, note, and run the step."""
        quiet = replace(context, record=Record(context.path, self.name))  # the step itself tells what it leaves alone
        with context.forked("trials"):
            places = chosen(model, self.step.layers, None, quiet, self.name, densify=self.step.densify)
            layers = [layer for layer in map(self._layer, places) if layer.options]
        if not layers:
            raise UsageError(f"{self.name}: the step would quantize no weight; choose other layers, or ends=same.")
        times: dict[str, LayerTime] = {}
        rest = 0.0
        if self.measure == "ms":
            layers, times, rest = self._timed(model, layers, context)
        values, traces = self._sensitivities(model, layers, context)
        if self.measure == "ms":
            costs = [[times[layer.slot.name].of(o.bits) for o in layer.options] for layer in layers]
            budget, weigh = self.budget - rest, 1.0
        else:
            costs, budget, weigh = self._costs(model, layers, quiet)
        picked = allocate(values, costs, budget)
        if picked is None:
            least = rest + sum(map(min, costs)) / weigh
            what, help_ = ("fewest bits", ", allow fewer bits in widths, or set ends=same in the step")
            if times:
                what, help_ = "int8 kernels and all that is not in them", " or take more threads"
            raise UsageError(
                f"{self.name}: a budget of {self.budget:g} {self.measure} cannot be met; the {what} take {least:.6g}. "
                f"Raise the budget{help_}."
            )
        bits = {
            layer.slot.name: asked for layer, i in zip(layers, picked, strict=True)
            if (asked := layer.options[i].asked) is not None
        }  # fmt: skip
        used = rest + sum(cost[i] for cost, i in zip(costs, picked, strict=True)) / weigh
        context.record.details["mixed bits"] = {
            "by": self.by, "measure": self.measure, "budget": self.budget, "used": used,
            "layers": [
                _row(layer, i, value, traces.get(layer.slot.name))
                for layer, i, value in zip(layers, picked, values, strict=True)
            ],
        }  # fmt: skip
        if not bits:
            context.warn(
                f"{self.name}: the network is fast enough in fp32 for {self.budget:g} ms; nothing was quantized."
            )
            return model
        step = self.step.replace(bits=bits, **({"layers": tuple(bits)} if times else {}))
        if self.analyse:
            found = analyse(model, context, step, store=context.epochs("sensitivity"))
            context.record.details["quantization sensitivity"] = found
        if self.measure != "ms":
            return context.run(step, model)
        original = copy_model(model)
        model = context.run(step, model)
        self._check(original, model, [layer for layer in layers if layer.slot.name not in bits], used, context)
        return model

    def _timed(
        self, model: nn.Module, layers: Sequence[Layer], context: Context
    ) -> tuple[list[Layer], dict[str, LayerTime], float]:
        """The layers that have an int8 kernel, with fp32 among their options; their times, and that of all the rest."""
        from espalier.quantize.layer_times import LayerTime, Timer

        owners = {path: module for layer in layers for path, module, _ in layer.slot.owners if path}
        times = Timer(self.runtime, self.threads)(model, owners, context)
        kept, table = [], {}
        for layer in layers:
            found = [times.layers[path] for path, _, _ in layer.slot.owners if path in times.layers]
            why = next((time.why for time in found if time.why), "" if found else "it is not called with one tensor")
            if why:
                context.skip(layer.slot.name, f"it stays in fp32: {why}")
                continue
            table[layer.slot.name] = LayerTime(sum(time.fp32 for time in found), sum(time.int8 for time in found))
            kept.append(replace(layer, options=(*layer.options, Option(None, None))))
        if not kept:
            raise UsageError(f"{self.name}: {self.runtime} has an int8 kernel for none of the chosen layers.")
        return kept, table, max(0.0, times.whole - sum(time.fp32 for time in table.values()))

    def _check(
        self, original: nn.Module, model: nn.Module, left: Sequence[Layer], predicted: float, context: Context
    ) -> None:
        """Measure the whole network as an int8 file, and say where that is over the budget."""
        from espalier.quantize.layer_times import Timer

        paths = tuple(path for layer in left for path, _, _ in layer.slot.owners)
        timer = Timer(self.runtime, self.threads)
        try:
            measured = timer.both(original, model, paths, context, self.batches)
        except ModelError as error:
            context.warn(f"{self.name}: the time of the whole network could not be measured: {error}")
            return
        context.record.details["mixed bits"]["measured"] = {
            "runtime": self.runtime, "threads": self.threads, **{f"{name} ms": ms for name, ms in measured.items()},
        }  # fmt: skip
        if measured["int8"] > self.budget:
            context.warn(
                f"{self.name}: the int8 file takes {measured['int8']:.3g} ms in {self.runtime}, above the budget of "
                f"{self.budget:g}; its layers alone promised {predicted:.3g} ms (fp32: {measured['fp32']:.3g} ms). "
                "Give a smaller budget."
            )

    def _layer(self, place: Place) -> Layer:
        """The widths of one weight that differ once the ends' policy is applied."""
        options: dict[int, Option] = {}
        for asked in self.allowed:
            found = self.step.weight_bits(replace(place, bits=asked))
            if found is not None and found[0].refuses(place.slot) is None and found[1] not in options:
                options[found[1]] = Option(asked, tried(place.slot, *found))
        return Layer(place, tuple(options.values()))

    def _sensitivities(
        self, model: nn.Module, layers: Sequence[Layer], context: Context
    ) -> tuple[list[list[float]], dict[str, float]]:
        """O_l(b) of every option, and the mean traces where they are what it is made of."""
        if self.by == "loss":
            return self._losses(model, layers, context), {}
        traces = mean_traces(
            model, [layer.slot for layer in layers], context, count=self.batches, probes=self.probes,
            against=self.against,
        )  # fmt: skip
        return [
            [abs(traces[layer.slot.name]) * distance(layer.slot.value(), option.trial) for option in layer.options]
            for layer in layers
        ], traces  # fmt: skip

    def _losses(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> list[list[float]]:
        answers: list[Tensor] = []
        base = self._loss(model, context, answers)
        found = []
        for number, layer in enumerate(layers):
            context.progress("layers tried", number, len(layers))
            row = []
            for option in layer.options:
                if option.trial is None:
                    row.append(0.0)
                    continue
                with exchanged(layer.slot, option.trial.value):
                    row.append(self._loss(model, context, answers) - base)
            found.append(row)
        return found

    def _loss(self, model: nn.Module, context: Context, answers: list[Tensor]) -> float:
        """The mean loss, or half the mean squared distance to ``answers``, which the first call fills."""
        total, count = 0.0, 0
        first = not answers
        with looking(model, context, grad=False):
            for count, batch in enumerate(batches(model, context, self.batches, "calibration"), 1):
                output = context.data.predict(model, batch)
                if self.against == "loss":
                    total += float(context.data.training_loss(output, batch))
                    continue
                answer = first_tensor(output).double()
                if first:
                    answers.append(answer)
                apart = (answer - answers[count - 1]).reshape(len(answer) if answer.ndim else 1, -1)
                total += float(apart.square().sum(1).mean() / 2)
        return total / count

    def _costs(
        self, model: nn.Module, layers: Sequence[Layer], context: Context
    ) -> tuple[list[list[float]], float, float]:
        """The cost of every option, the budget in the same unit, and what divides it to give the user's unit."""
        if self.measure == "bytes":
            return [[float(o.coded_bytes or 0) for o in layer.options] for layer in layers], self.budget, 1.0
        if self.measure == "bops":
            work = self._work(model, layers, context)
            costs = [[work[layer.slot.name] * o.bits for o in layer.options] for layer in layers]
            return costs, self.budget, 1.0
        counts = [free_values(layer.slot) for layer in layers]
        costs = [[float(count * o.bits) for o in layer.options] for layer, count in zip(layers, counts, strict=True)]
        weigh = float(max(1, sum(counts)))
        return costs, self.budget * weigh, weigh

    def _work(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> dict[str, float]:
        """Multiply-adds per sample x bits of the input, of every weight."""
        bare = plain(model)
        args, kwargs = capture_call(context.data, bare, context.data.example())
        counted = macs(trace(bare, args, kwargs)).tensors
        widths: dict[str, int] = {}
        if self.step.activations is not None:
            for path, (_, place) in input_layers([layer.place for layer in layers], context).items():
                widths[place.slot.name] = self.step.input_bits(path, place)[1]
        return {
            layer.slot.name: float(counted.get(layer.slot.name, 0) * widths.get(layer.slot.name, FLOAT_BITS))
            for layer in layers
        }


def distance(weight: Tensor, trial: Trial | None) -> float:
    """||Q(w) - w||^2; 0 without a trial, in fp32."""
    return 0.0 if trial is None else float((trial.value.double() - weight.double()).square().sum())


def _row(layer: Layer, picked: int, values: Sequence[float], trace_: float | None) -> dict[str, Any]:
    option = layer.options[picked]
    row: Mapping[str, Any] = {
        "layer": layer.slot.name, "parameters": layer.slot.shape.numel(), "sensitivity": values[picked],
        "bits": option.bits, "bytes": option.coded_bytes,
        "tried": {str(o.bits): value for o, value in zip(layer.options, values, strict=True)},
    }  # fmt: skip
    return {**row, **({} if trace_ is None else {"trace": trace_})}
