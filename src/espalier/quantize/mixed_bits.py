r"""Mixed bits: sensitive layers get more bits than others, under a budget.

Paper    Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer. HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural
         Networks. NeurIPS 2020. arXiv:1911.03852; by=loss: measured layer by layer, as practical tools do;
         measure=ms: Yao et al. HAWQ-V3. ICML 2021. arXiv:2011.10680 (section 3.4)
Formula  min sum_l O_l(b_l) with sum_l cost_l(b_l) <= budget;
         hessian: O_l(b) = mean trace(H_l) ||Q_b(w_l) - w_l||^2, trace(H_l) = E[v' H_l v], v_i = +-1 (Hutchinson),
         and with activation_widths the same of the layer's input a_l is added;
         loss: O_l(b) = L(Q_b(w_l), and Q_b(a_l), alone) - L
Departs  The choice is by dynamic programming over the Pareto front; the paper lists it and picks. A negative mean
         trace, which is noise or a sign that the loss is not at a minimum, counts by its absolute value. Activations
         keep the bits of the step unless activation_widths are given; then each layer's input has its own, also where
         several layers read one tensor, and its trace and its error are averaged over the batches apart. A method that
         solves for its weights is tried as rounding to the nearest. Bytes are predicted from the weights as they came;
         what the step, its training above all, has made of them is measured afterwards. Under a budget in ms a layer
         has an int8 kernel or stays in fp32, as x86 has no kernels below 8 bits; it is timed alone, with the rounding
         of its input and result but without what any call takes, and what fusion saves in the whole is measured
         afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from espalier.core.context import Context
from espalier.core.errors import EspalierError, UsageError
from espalier.core.fields import Batches, Bits, Positive, Probes, Threads
from espalier.core.method import Technique
from espalier.core.metric import first_tensor
from espalier.core.model import copy_model
from espalier.core.parametrize import freeze, plain
from espalier.core.record import Record
from espalier.core.task import capture_call
from espalier.graph import macs, trace
from espalier.quantize.analysis import analyse
from espalier.quantize.hutchinson import mean_traces
from espalier.quantize.input_trials import InputTrial, input_sensitivities, input_trials, quantizing
from espalier.quantize.layer_options import FLOAT_BITS, KERNEL_BITS, Budget, Layer, Option
from espalier.quantize.places import Place
from espalier.quantize.quantize import Quantize
from espalier.quantize.trials import Trial, coded_bytes, exchanged, free_values, tried
from espalier.train.looking import batches, looking, needs

if TYPE_CHECKING:
    from espalier.quantize.layer_times import LayerTime, Timer


@dataclass(frozen=True, kw_only=True)
class MixedBits(Technique):
    """Choose the bits of every layer, then run ``step`` with them.

    ``by``: what says how sensitive a layer is; ``against``: the task's loss, or the outputs, which need no labels.
    ``measure``: what ``budget`` counts: bits per weight on average, bytes of the coded weights, or bit operations
    (multiply-adds x bits of the weight x bits of the input) per sample, or milliseconds of a sample in ``runtime`` with
    ``threads`` threads, where a layer may also stay in fp32 and all widths take the time of 8 bits. ``widths``: the
    bits there are to choose from; ``activation_widths``: the same for the inputs of layers, under a budget of bit
    operations; without any they have the step's. ``analyse``: first measure on val what each layer alone does at the
    bits chosen.
    """

    id: ClassVar[str] = "mixed-bits"
    by: Literal["hessian", "loss"] = "hessian"
    against: Literal["loss", "output"] = "loss"
    measure: Literal["bits", "bytes", "bops", "ms"] = "bits"
    budget: Positive = 4.0
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime"
    threads: Threads = 1
    widths: tuple[Bits, ...] = (2, 3, 4, 6, 8)
    activation_widths: tuple[Bits, ...] = ()
    batches: Batches = 4
    probes: Probes = 4
    analyse: bool = False
    step: Quantize = field(default_factory=lambda: Quantize(ends="same"))

    @property
    def needs(self) -> frozenset[str]:
        """Training batches to look at, val for the analysis, and what the step needs."""
        return super().needs | needs(self.against) | ({"val"} if self.analyse else frozenset())

    def conflicts(self) -> list[str]:
        found = [*self._kernel_conflicts(), *self._input_conflicts()]
        if self.step.bits is not None:
            found.append("step.bits is what this step chooses: leave it out, or use quantize.quantize alone")
        if self.step.weights is None:
            found.append("the step quantizes no weights, so there are no bits to choose")
        elif not self.allowed:
            can = ", ".join(map(str, self.step.weights.widths))
            found.append(f"widths={self.widths}: {self.step.weights.id} can do {can}")
        return found

    def _kernel_conflicts(self) -> Iterator[str]:
        if self.measure != "ms":
            return
        if self.step.activations is None:
            yield "measure=ms: int8 kernels take inputs in 8 bits: give the step activations=affine-input"
        if self.allowed and KERNEL_BITS not in self.allowed:
            yield (
                f"measure=ms: the kernels have {KERNEL_BITS} bits, and fewer take the same time: put {KERNEL_BITS} "
                "among the widths, and take a method that can do it, such as affine"
            )
        if max(self.allowed, default=0) > KERNEL_BITS:
            yield f"measure=ms: no kernel has more than {KERNEL_BITS} bits; leave such widths out"

    def _input_conflicts(self) -> Iterator[str]:
        if not self.activation_widths:
            return
        if self.measure != "bops":
            yield f"activation_widths: a budget in {self.measure} does not count the bits of inputs; use measure=bops"
        if self.step.activation_bits is not None:
            yield "step.activation_bits is what activation_widths choose: leave one of them out"
        if self.step.activations is None:
            yield "the step quantizes no inputs: give it activations=affine-input, or leave activation_widths out"
        elif not self.allowed_inputs:
            can = ", ".join(map(str, self.step.activations.widths))
            yield f"activation_widths={self.activation_widths}: {self.step.activations.id} can do {can}"

    @property
    def allowed(self) -> tuple[int, ...]:
        """The widths that the step's method can do, rising."""
        can = self.step.weights.widths if self.step.weights is not None else ()
        return tuple(sorted({bits for bits in self.widths if bits in can}))

    @property
    def allowed_inputs(self) -> tuple[int, ...]:
        """The same of the inputs."""
        can = self.step.activations.widths if self.step.activations is not None else ()
        return tuple(sorted({bits for bits in self.activation_widths if bits in can}))

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Look, choose, note, and run the step."""
        quiet = replace(context, record=Record(context.path, self.name))  # the step itself tells what it leaves alone
        with context.forked("trials"):
            places = self.step.places(model, quiet, self.name)
            layers = [layer for layer in map(self._layer, places) if layer.options]
            if self.activation_widths:
                trials = input_trials(model, places, self.step, self.allowed_inputs, quiet)
                layers = [layer.with_inputs(trials.get(layer.slot.name, ())) for layer in layers]
        if not layers:
            raise UsageError(f"{self.name}: the step would quantize no weight; choose other layers, or ends=same.")
        if self.measure == "ms":
            return self._in_time(model, layers, context)
        step, _ = self._choose(model, layers, self._costs(model, layers, quiet), context)
        model = context.run(step, model)
        if self.measure == "bytes":
            self._weigh(model, [layer.slot.name for layer in layers], context)
        return model

    def _weigh(self, model: nn.Module, names: Sequence[str], context: Context) -> None:
        """Measure the coded weights as they are after the step, and say where they are over the budget."""
        tensors, found = freeze(model)[0], context.record.details["mixed bits"]
        found["measured"] = {"bytes": sum(coded_bytes(tensors[name]) for name in names)}
        length, predicted = found["measured"]["bytes"], found["used"]
        if length > self.budget:
            context.warn(
                f"{self.name}: the coded weights take {length:,} bytes after the step, above the budget of "
                f"{self.budget:g}; {predicted:,.0f} were predicted. Give a budget of "
                f"{predicted * self.budget / length:.0f}."
            )

    def _choose(
        self, model: nn.Module, layers: Sequence[Layer], budget: Budget, context: Context
    ) -> tuple[Quantize, float]:
        """The step with the bits of the best choice, which goes into the record, and what that takes."""
        if budget.pick(budget.costs) is None:  # before the work of measuring sensitivities
            what, help_ = "fewest bits", "allow fewer bits in widths, or set ends=same in the step"
            if self.measure == "ms":
                what, help_ = "fastest kernels and all that is not in them", "choose more layers, or take more threads"
            raise UsageError(
                f"{self.name}: a budget of {self.budget:g} {self.measure} cannot be met; the {what} take "
                f"{budget.least:.6g}. Raise the budget, {help_}."
            )
        values, traces = self._sensitivities(model, layers, context)
        picked = budget.pick(values)
        assert picked is not None  # noqa: S101 - the cheapest fit
        taken = {layer.slot.name: layer.options[i] for layer, i in zip(layers, picked, strict=True)}
        used = budget.used(picked)
        context.record.details["mixed bits"] = {
            "by": self.by, "measure": self.measure, "budget": self.budget, "used": used,
            "layers": [
                _row(layer, i, value, traces.get(layer.slot.name, {}))
                for layer, i, value in zip(layers, picked, values, strict=True)
            ],
        }  # fmt: skip
        bits = {name: option.asked for name, option in taken.items() if option.asked is not None}
        changes: dict[str, Any] = {"bits": bits}
        if self.measure == "ms":
            changes["layers"] = tuple(bits)
        if self.activation_widths:
            changes["activation_bits"] = {n: o.inputs.asked for n, o in taken.items() if o.inputs is not None} or None
        step = self.step.replace(**changes)
        if self.analyse:
            found = analyse(model, context, step, store=context.epochs("sensitivity"))
            context.record.details["quantization sensitivity"] = found
        return step, used

    # --- milliseconds --------------------------------------------------------------------------------------------

    def _in_time(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> nn.Module:
        """Choose between the int8 kernel and fp32 for each layer by what both take, and measure the result."""
        from espalier.quantize.layer_times import Timer

        timer = Timer(self.runtime, self.threads)
        whole = timer.whole(model, context)
        if whole <= self.budget:
            context.record.details["mixed bits"] = {
                "by": self.by, "measure": "ms", "budget": self.budget, "used": whole, "layers": [],
                "measured": {"runtime": self.runtime, "threads": self.threads, "fp32 ms": whole},
            }  # fmt: skip
            context.warn(
                f"{self.name}: the network takes {whole:.3g} ms in fp32, which is fast enough for {self.budget:g} ms; "
                "nothing was quantized. Give a smaller budget."
            )
            return model
        layers, times = self._timed(timer, model, layers, context)
        costs = [[times[layer.slot.name].of(option.bits) for option in layer.options] for layer in layers]
        rest = max(0.0, whole - sum(time.fp32 for time in times.values()))
        step, predicted = self._choose(model, layers, Budget(costs, self.budget, rest=rest), context)
        details = context.record.details["mixed bits"]
        for row in details["layers"]:
            row |= {"fp32 ms": times[row["layer"]].fp32, "int8 ms": times[row["layer"]].int8}
        details["predicted"] = {"fp32 ms": whole, "int8 ms": predicted, "rest ms": rest, "call ms": timer.call}
        if min(self.allowed) < KERNEL_BITS:
            context.note(
                f"{self.runtime} has kernels of {KERNEL_BITS} bits: weights of fewer bits take the time of "
                f"{KERNEL_BITS}. They make the .espalier file smaller and nothing faster."
            )
        original = copy_model(model)
        model = context.run(step, model)
        paths = {path for layer in layers if layer.slot.name in step.layers for path, _, _ in layer.slot.owners}
        self._measure(timer, original, model, paths, context)
        return model

    def _timed(
        self, timer: Timer, model: nn.Module, layers: Sequence[Layer], context: Context
    ) -> tuple[list[Layer], dict[str, LayerTime]]:
        """The layers that have an int8 kernel, with fp32 among their options, and their times by weight."""
        from espalier.quantize.layer_times import LayerTime

        paths = {path: None for layer in layers for path, _, _ in layer.slot.owners if path}
        times = timer.layers(model, paths, context)
        kept, table = [], {}
        for layer in layers:
            found = [times[path] for path, _, _ in layer.slot.owners if path in times]
            why = next((time.why for time in found if time.why), "" if found else "it is not called with one tensor")
            if why:
                context.skip(layer.slot.name, f"it stays in fp32: {why}")
                continue
            table[layer.slot.name] = LayerTime(sum(time.fp32 for time in found), sum(time.int8 for time in found))
            kept.append(replace(layer, options=(*layer.options, Option(None, None))))
        if not kept:
            raise UsageError(f"{self.name}: {self.runtime} has an int8 kernel for none of the chosen layers.")
        return kept, table

    def _measure(self, timer: Timer, original: nn.Module, model: nn.Module, paths: set[str], context: Context) -> None:
        """Time the whole network as an int8 file, and say where that is over the budget."""
        try:
            found = timer.finished(original, model, paths, context, self.batches)
        except EspalierError as error:
            context.warn(f"{self.name}: the time of the whole network could not be measured: {error}")
            return
        details = context.record.details["mixed bits"]
        details["measured"] = {
            "runtime": self.runtime, "threads": self.threads, "fp32 ms": found.fp32, "int8 ms": found.int8,
            "keep_fp32": list(found.keep_fp32),
        }  # fmt: skip
        predicted = details["predicted"]["int8 ms"]
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        options = ["--to int8", f"--runtime {self.runtime}", *(f"--keep-fp32 {name}" for name in found.keep_fp32)]
        context.note(
            f"As an int8 file the network takes {found.int8:.3g} ms in {self.runtime} with {threads}, beside "
            f"{found.fp32:.3g} ms in fp32; {predicted:.3g} ms were predicted from its layers alone. espalier export "
            f"writes that file with {' '.join(options)}."
        )
        if found.int8 > self.budget:
            context.warn(
                f"{self.name}: the int8 file takes {found.int8:.3g} ms in {self.runtime}, above the budget of "
                f"{self.budget:g}; {predicted:.3g} ms were predicted from its layers alone. Give a smaller budget."
            )

    # --- widths, sensitivities and costs -------------------------------------------------------------------------

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
    ) -> tuple[list[list[float]], dict[str, dict[str, float]]]:
        """O_l(b) of every option, and the traces where they are what it is made of."""
        if self.by == "loss":
            return self._losses(model, layers, context), {}
        look: dict[str, Any] = {"count": self.batches, "probes": self.probes, "against": self.against}
        means = mean_traces(model, [layer.slot for layer in layers], context, **look)
        trials: dict[str, list[InputTrial]] = {}
        for layer in layers:
            there = {option.inputs.bits: option.inputs for option in layer.options if option.inputs is not None}
            if there:
                trials[layer.slot.name] = list(there.values())
        inputs = input_sensitivities(model, trials, context, **look) if trials else {}
        values = []
        for layer in layers:
            weight, trace_ = layer.slot.value(), abs(means[layer.slot.name])
            of_inputs = inputs[layer.slot.name].values if layer.slot.name in inputs else {}
            values.append([
                trace_ * distance(weight, option.trial)
                + (of_inputs[option.inputs.bits] if option.inputs is not None else 0.0)
                for option in layer.options
            ])  # fmt: skip
        return values, {
            name: {"trace": mean, **({"input trace": inputs[name].trace} if name in inputs else {})}
            for name, mean in means.items()
        }

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
                with exchanged(layer.slot, option.trial.value), quantizing(model, option.inputs):
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

    def _costs(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> Budget:
        """What every option costs, and the budget in the same unit."""
        if self.measure == "bytes":
            return Budget([[float(layer.coded_bytes(o)) for o in layer.options] for layer in layers], self.budget)
        if self.measure == "bops":
            work, widths = self._work(model, context), self._input_widths(model, layers, context)
            return Budget(
                [
                    [
                        float(work.get(layer.slot.name, 0) * o.bits)
                        * (o.inputs.bits if o.inputs is not None else widths.get(layer.slot.name, FLOAT_BITS))
                        for o in layer.options
                    ]
                    for layer in layers
                ],
                self.budget,
            )
        counts = [free_values(layer.slot) for layer in layers]
        costs = [[float(count * o.bits) for o in layer.options] for layer, count in zip(layers, counts, strict=True)]
        weigh = float(max(1, sum(counts)))
        return Budget(costs, self.budget * weigh, weigh)

    def _work(self, model: nn.Module, context: Context) -> Mapping[str, int]:
        """Multiply-adds per sample of every weight."""
        bare = plain(model)
        args, kwargs = capture_call(context.data, bare, context.data.example())
        return macs(trace(bare, args, kwargs)).tensors

    def _input_widths(self, model: nn.Module, layers: Sequence[Layer], context: Context) -> dict[str, int]:
        """The bits the step gives the inputs of every weight, where it quantizes them and they are not to be chosen."""
        if self.step.activations is None or self.activation_widths:
            return {}
        observed = self.step.observed(model, [layer.place for layer in layers], context)
        return {place.slot.name: self.step.input_bits(place)[1] for _, place, _ in observed.values()}


def distance(weight: Tensor, trial: Trial | None) -> float:
    """||Q(w) - w||^2; 0 without a trial, in fp32."""
    return 0.0 if trial is None else float((trial.value.double() - weight.double()).square().sum())


def _row(layer: Layer, picked: int, values: Sequence[float], traces: Mapping[str, float]) -> dict[str, Any]:
    option = layer.options[picked]
    return {
        "layer": layer.slot.name, "parameters": layer.slot.shape.numel(), "sensitivity": values[picked],
        "bits": option.bits, **({} if option.inputs is None else {"input_bits": option.inputs.bits}),
        "bytes": layer.coded_bytes(option),
        "tried": {o.said: value for o, value in zip(layer.options, values, strict=True)}, **traces,
    }  # fmt: skip
