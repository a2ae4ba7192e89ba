"""One int8 export, step by step: prepare, choose places, calibrate, write, run what was written, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from torch import nn

from espalier.core.errors import ModelError
from espalier.core.parametrize import freeze, plain
from espalier.deploy import runtimes
from espalier.deploy.check import Call, resized, sqnr
from espalier.deploy.export import OTHER_BATCHES, example_call
from espalier.deploy.int8.calibrate import calibrate, outputs
from espalier.deploy.int8.count import coverage_of
from espalier.deploy.int8.executed import ASK
from espalier.deploy.int8.insert import Written, write_qdq
from espalier.deploy.int8.markers import DOMAIN, marked
from espalier.deploy.int8.observers import ObserverFactory
from espalier.deploy.int8.places import Places, layer_name, places
from espalier.deploy.int8.prepare import prepare
from espalier.deploy.int8.processor import Processor
from espalier.deploy.int8.profile import RuntimeProfile
from espalier.deploy.int8.result import TOLERANCE_DB, Agreement, Coverage
from espalier.deploy.int8.rules import check_rules
from espalier.deploy.int8.weights import Fixed, fixed_codes
from espalier.deploy.onnx_writer import save_onnx, write_onnx, written_out_attention
from espalier.deploy.openvino_writer import write_openvino
from espalier.deploy.signature import Signature


@dataclass(kw_only=True)
class Job:
    """One export under way, in the folder of ``staged``."""

    profile: RuntimeProfile
    processor: Processor
    signature: Signature
    staged: Path
    bare: nn.Module
    keep_fp32: Sequence[str] = ()
    network: ir.Model = field(init=False)
    places: Places = field(init=False)
    coverage: Coverage = field(init=False)
    written: Written = field(init=False)
    fixed: list[Fixed] = field(init=False)
    calls: list[Call] = field(init=False)
    agreement: Agreement = field(init=False)
    free_batch: bool = field(init=False)
    told: list[str] = field(init=False)

    @property
    def qdq(self) -> Path:
        """The QDQ file: what is asked for, or what OpenVINO's files are made of."""
        return self.staged.with_suffix(".onnx")

    def prepare(self, call: Call) -> None:
        """Export in fp32, fold, choose places. Raises ``ModelError`` where nothing can be int8."""
        with written_out_attention(), marked():
            self.free_batch, self.told = write_onnx(self.bare, self.signature, self.signature.bind(*call), self.qdq)
        self.network, self.fixed = prepare(self.qdq, self.profile)
        for file in self.staged.parent.iterdir():
            file.unlink()
        self.places = places(self.network.graph, self.profile, self.keep_fp32)
        self.coverage = coverage_of(self.network, self.places)

    def write(
        self, model: nn.Module, calibration: Iterable[Any], observer: ObserverFactory, tell: Callable[[int], None]
    ) -> None:
        """Calibrate and write the files; ``model`` has the training forms."""
        grids, calls = calibrate(
            self.network, self.places, calibration, lambda batch: example_call(self.bare, batch), self.signature,
            self.staged.parent, self.profile, observer, tell,
        )  # fmt: skip
        self.calls = [*calls, *(resized(calls[0], size) for size in OTHER_BATCHES if self.free_batch)]
        fixed = [*fixed_codes(*freeze(model)), *self.fixed]
        self.written = write_qdq(self.network, self.places, grids, self.profile, fixed)
        passes.RemoveUnusedNodesPass()(self.network)
        passes.TopologicalSortPass()(self.network)
        self.network.graph.opset_imports.pop(DOMAIN, None)
        if self.profile.symmetric:
            check_rules(self.network)
        save_onnx(self.network, self.qdq)
        if self.staged.suffix == ".xml":
            write_openvino(self.qdq, self.signature, self.staged)

    def count(self) -> None:
        """See what the runtime really runs. Raises ``ModelError`` where it runs no product in int8."""
        if not self.profile.runs:
            return
        found = ASK[self.profile.name](self.staged, self.staged.parent)
        low, high = found.split([str(node.name) for node in self.places.products])
        if not low:
            raise ModelError(
                f"{self.profile.name} computes none of {self.coverage.layers} int8 layers in int8 on this machine. No "
                "file was written. Try the other runtime, or export in fp32."
            )
        layers = {str(node.name): layer_name(node) for node in self.places.products}
        self.coverage = replace(
            self.coverage, executed=dict(sorted(found.kinds.items())), in_float=tuple(layers[name] for name in high)
        )

    def compare(self, reference: nn.Module | None, tolerance_db: float) -> None:
        """Run the file and the simulation on the first batches. Raises ``ModelError`` where they disagree."""
        simulated = outputs(runtimes.simulation(self.qdq).module(), self.calls)
        wanted = outputs(self.bare, self.calls)
        got, agreed = simulated, None
        if self.profile.runs:
            got = outputs(runtimes.open(self.staged, self.profile.name).module(), self.calls)
            agreed = sqnr(simulated, got)
            needed = min(tolerance_db, sqnr(wanted, simulated) - 3)
            if not agreed >= needed:
                raise ModelError(
                    f"{self.profile.name} disagrees with the simulation of the same file: {agreed:.1f} dB, "
                    f"{needed:.1f} dB are needed. No file was written. If products saturate on this processor, give "
                    "processor=Processor('unknown') for 7-bit weights; else leave layers out by keep_fp32."
                )
        given = None if reference is None else sqnr(outputs(plain(reference).cpu().eval(), self.calls), got)
        self.agreement = Agreement(self.profile.name, len(self.calls), sqnr(wanted, got), agreed, given)
        if self.staged.suffix == ".xml":
            for leftover in self.staged.parent.glob(f"{self.qdq.name}*"):
                leftover.unlink()

    @property
    def bits(self) -> dict[str, int]:
        """Layer -> bits of its weights."""
        return {layer_name(node): codes.bits for node, codes in self.written.codes.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, in sentences."""
        return (*self.told, *_notes(self.profile, self.written, self.coverage, self.agreement, self.processor))


def _notes(
    profile: RuntimeProfile, written: Written, coverage: Coverage, agreement: Agreement, processor: Processor
) -> list[str]:
    """What a user should know, in sentences."""
    notes = list(dict.fromkeys(written.notes))
    if profile.runs:
        notes.append(str(processor))
    else:
        notes.append(f"{profile.name} was not run: the file was checked against its published rules and simulated")
    narrow = sorted({codes.bits for codes in written.codes.values() if codes.kept and codes.bits < 8})
    if narrow:
        said = " and ".join(map(str, narrow))
        notes.append(
            f"weights of {said} bits stand in 8 bits each: {profile.name} computes with 8-bit kernels, no faster and "
            "in no smaller file than at 8 bits; the .espalier file stores them packed"
        )
    if coverage.in_float:
        shown = ", ".join(coverage.in_float[:3]) + (" and others" if len(coverage.in_float) > 3 else "")
        notes.append(f"{profile.name} computes {len(coverage.in_float)} of the int8 layers in fp32: {shown}")
    if agreement.model < TOLERANCE_DB:
        notes.append(
            f"the outputs are {agreement.model:.1f} dB from the model's; below {TOLERANCE_DB:g} dB accuracy often "
            "suffers: measure the metric of the file"
        )
    return notes
