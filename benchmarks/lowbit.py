"""Few bits in training: every quantizer on LeNet-5 and ResNet-20, beside the published figures.

python benchmarks/lowbit.py [--quick] [--network lenet5|resnet20] [--seeds 3] [--only lsq ...] [--data-dir DIR]

LeNet-5 on MNIST is trained here, once for each seed; ResNet-20 is the published one for CIFAR-10, fine-tuned to the
JPEG images first. Every row starts from that network and trains for the same epochs with the same optimizer; so does
``fp32``, the row that differences are taken to, seed by seed. Rows marked ``untrained`` see calibration data only.
Bytes are the length of ``model.weights.espalier``, loaded again and evaluated: that is what the error is of. First and
last layer have 8 bits where a row says nothing else, and their bytes count. The noise of ``relaxed, straight-through``
was chosen on val, nothing else by val or test. Seconds are processor time. Rows are kept: a second call goes on where
the first stopped. ``published``: test error in percent by the authors, or by the table of Relaxed Quantization (Louizos
et al. 2019, arXiv:1810.01875, table 1) where that is named; they trained from scratch and for far longer.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, arguments, begin, save
from benchmarks.subjects import blind, dense, stored, task_of, training

import espalier as es
from espalier.core.context import Context
from espalier.core.recipe import step_from_data

FILE = "lowbit"
RQ = "Relaxed Quantization, table 1"


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row."""

    network: str
    mode: str
    images: int
    judged: int
    dense_epochs: int
    epochs: int
    batch: int = 128


SETTINGS = {
    ("lenet5", True): Setting("lenet5", "quick", 10_000, 5_000, dense_epochs=6, epochs=3),
    ("lenet5", False): Setting("lenet5", "full", 55_000, 10_000, dense_epochs=8, epochs=6),
    ("resnet20", True): Setting("resnet20", "quick", 5_000, 2_500, dense_epochs=3, epochs=3),
    ("resnet20", False): Setting("resnet20", "full", 45_000, 10_000, dense_epochs=10, epochs=60),
}


@dataclass(frozen=True)
class Row:
    """One configuration: fields of ``quantize.quantize``, and what was published for it on MNIST or CIFAR-10.

    ``longer``: times as many epochs as the others.
    """

    name: str
    bits: str
    fields: dict[str, Any] = field(default_factory=dict)
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""
    trained: bool = True
    lr: float | None = None
    longer: int = 1
    networks: tuple[str, ...] = ("lenet5",)

    @property
    def label(self) -> str:
        """Name and bits: the row of the table."""
        return f"{self.name}{'' if self.trained else ' untrained'}, {self.bits}"


BOTH = ("lenet5", "resnet20")


def weights_only(name: str, bits: int, method: Any = None, **more: Any) -> Row:
    """Weights in ``bits`` bits, activations in floating point."""
    return Row(name, f"{bits}/32", {"weights": method or name, "bits": bits}, **more)


def both(name: str, w: int, a: int, weights: Any, activations: Any, **more: Any) -> Row:
    """Weights and inputs quantized."""
    fields = {"weights": weights, "bits": w, "activations": activations, "activation_bits": a}
    fields |= more.pop("fields", {})
    return Row(name, f"{w}/{a}", fields, **more)


def mnist(error: float) -> dict[str, float]:
    return {"lenet5": error}


def cifar20(error: float) -> dict[str, float]:
    return {"resnet20": error}


SCHEMES = {"two-stage": "two-stage", "progressive": {"progressive": {"bits": [8, 4]}}, "guided": "guided"}
PACT = {"pact": {"alpha": None}}  # the clip starts at what calibration saw: these networks are trained already
THRICE = ", three times the epochs"
DRAWN = {"estimator": "straight-through", "noise": 0.1}  # on the grid from the start: the network is trained already
APOT = "APoT repository, ResNet-20"
TTQ = "TTQ authors' repository, ResNet-20"


def rows() -> tuple[Row, ...]:
    """Every method of the room, in the bits it is known for."""
    return (
        Row("fp32", "32/32", published={"lenet5": 0.64, "resnet20": 8.23}, source=RQ, networks=BOTH),
        Row(f"fp32{THRICE}", "32/32", longer=3),
        # --- after training --------------------------------------------------------------------------------------
        *(weights_only("affine", b, trained=False, networks=BOTH) for b in (8, 6, 4, 3, 2)),
        *(weights_only("affine, mse", b, {"affine": {"observer": "mse"}}, trained=False) for b in (4, 3, 2)),
        both("affine", 8, 8, "affine", "affine-input", trained=False, networks=BOTH),
        *(weights_only("gptq", b, trained=False, networks=BOTH) for b in (4, 3)),
        *(
            weights_only("adaround", b, {"adaround": {"iterations": 1000}}, trained=False, networks=BOTH)
            for b in (4, 3)
        ),
        *(weights_only(f"half, {f}", 16, {"half": {"format": f}}, trained=False) for f in ("fp16", "bf16")),
        weights_only("half, fp8", 8, {"half": {"format": "e4m3"}}, trained=False),
        weights_only("fixed-point", 8, trained=False),
        *(weights_only("power-of-two", b, trained=False) for b in (5, 4)),
        weights_only("log", 4, trained=False),
        *(weights_only("quantile", b, trained=False) for b in (4, 3)),
        *(weights_only("levels", b, trained=False) for b in (4, 3, 2)),
        weights_only("value-aware", 3, trained=False),
        # --- uniform, trained ------------------------------------------------------------------------------------
        both("fixed-point", 8, 8, "fixed-point", "fixed-point-input", published=mnist(0.58), source=RQ),
        *(both("qat", b, b, "qat", "qat-input", networks=BOTH) for b in (8, 4)),
        *(both("lsq", b, b, "lsq", "lsq-input", networks=BOTH) for b in (4, 3, 2)),
        *(
            both("pact", b, b, "sawb", PACT, networks=BOTH, published=cifar20(error), source="PACT, quoted by APoT")
            for b, error in ((4, 8.3), (2, 10.3))
        ),
        both("dorefa", 4, 4, "dorefa", "dorefa-input", networks=BOTH, published=cifar20(9.5), source="quoted by APoT"),
        both("dorefa", 3, 3, "dorefa", "dorefa-input", networks=BOTH, published=cifar20(10.1), source="quoted by APoT"),
        both("dorefa", 2, 2, "dorefa", "dorefa-input", networks=BOTH, published=cifar20(11.8), source="quoted by APoT"),
        *(
            both("relaxed", b, b, "relaxed", "relaxed-input", published=mnist(e), source=RQ)
            for b, e in ((8, 0.55), (4, 0.58), (2, 0.76))
        ),
        both(
            f"relaxed, straight-through{THRICE}", 2, 2, {"relaxed": DRAWN}, {"relaxed-input": DRAWN},
            published=mnist(0.63), source=RQ, longer=3,
        ),
        # --- not uniform -----------------------------------------------------------------------------------------
        both("apot", 4, 4, "apot", "apot-input", networks=BOTH, published=cifar20(7.55), source=APOT),
        both("apot", 3, 3, "apot", "apot-input", networks=BOTH, published=cifar20(7.51), source=APOT),
        both("apot", 2, 2, "apot", "apot-input", networks=BOTH, published=cifar20(9.04), source=APOT),
        both("lq-net", 3, 3, "lq-net", "lq-net-input", networks=BOTH, published=cifar20(8.4), source="quoted by APoT"),
        both("lq-net", 2, 2, "lq-net", "lq-net-input", networks=BOTH, published=cifar20(9.8), source="quoted by APoT"),
        weights_only("log", 4),
        both("log", 4, 4, "log", "log-input"),
        weights_only("quantile", 3),
        weights_only("levels", 3),
        weights_only("levels, overwritten", 3, {"levels": {"mode": "overwrite"}}),
        *(weights_only("inq", b, networks=BOTH if b < 4 else ("lenet5",)) for b in (5, 4, 3, 2)),
        weights_only("value-aware", 3),
        both("value-aware", 4, 4, "value-aware", "value-aware-input"),
        # --- one bit ---------------------------------------------------------------------------------------------
        weights_only("binary", 1, networks=BOTH, published=mnist(1.29), source="BinaryConnect, an MLP"),
        weights_only("binary-stochastic", 1, published=mnist(1.18), source="BinaryConnect, an MLP"),
        weights_only("bwn", 1, networks=BOTH),
        both("xnor", 1, 1, "bwn", "xnor-input", networks=BOTH),
        both("hwgq", 1, 2, "bwn", "hwgq", networks=BOTH),
        weights_only("bs-fixed", 1, networks=BOTH),
        weights_only("lab", 1, published=mnist(1.18), source="LAB, an MLP"),
        weights_only("lr-net, binary", 1, "lr-net", published=mnist(0.53), source=RQ),
        weights_only("admm, binary", 1, {"admm": {"levels": "binary"}}),
        weights_only("elq, binary", 1, "elq"),
        # --- three values ----------------------------------------------------------------------------------------
        weights_only("ternary", 2, networks=BOTH),
        weights_only("ternary-bernoulli", 2, published=mnist(1.15), source="TernaryConnect, an MLP"),
        weights_only("twn", 2, networks=BOTH, published=mnist(0.65), source=RQ),
        weights_only("twn, exact", 2, {"twn": {"solution": "exact"}}, networks=BOTH),
        weights_only("ttq", 2, networks=BOTH, published=cifar20(8.87), source=TTQ),
        weights_only("lat", 2),
        weights_only("laq", 3),
        weights_only("lr-net, ternary", 2, "lr-net", published=mnist(0.50), source=RQ),
        weights_only("admm, ternary", 2, {"admm": {"levels": "ternary"}}, networks=BOTH),
        weights_only("elq, ternary", 2, "elq", networks=BOTH),
        # --- how the training is divided -------------------------------------------------------------------------
        *(
            both(f"dorefa, {name}", 2, 2, "dorefa", "dorefa-input", fields={"schemes": [scheme]}, networks=BOTH)
            for name, scheme in SCHEMES.items()
        ),
        # --- what flows back -------------------------------------------------------------------------------------
        *(
            Row(f"gradients and errors, {b} bits", "32/32", {
                "weights": None, "gradients": "gradient-quantization", "gradient_bits": b,
                "errors": "error-quantization", "error_bits": b,
            })
            for b in (8, 6, 4, 2)
        ),
    )  # fmt: skip


def step_of(row: Row, setting: Setting) -> Any:
    """The recipe's only step."""
    fields = training(setting.network, setting.epochs * row.longer, row.lr) if row.trained else {}
    fields = {name: value for name, value in fields.items() if name != "precision"}  # bf16 would round once more
    if not row.fields:
        return step_from_data({"train.finetune": fields})
    return step_from_data({"quantize.quantize": {**fields, **row.fields}})


def measured(row: Row, setting: Setting, model: nn.Module, task: es.Task, seed: int) -> dict[str, Any]:
    """One row: errors and bytes are those of the re-loaded file of weights, remaining floats as fp16."""
    started = time.process_time()
    result = step_of(row, setting)(model, Context(task=blind(task), seed=seed))
    seconds = time.process_time() - started
    return {**stored(result, model, task), "cpu_seconds": round(seconds, 1)}


def there(setting: Setting) -> list[tuple[str, int, Any]]:
    """What is measured already in this setting: label, seed and fields."""
    path = RESULTS / f"{FILE}.json"
    found = json.loads(path.read_text()) if path.exists() else []
    same = [r for r in found if r["setting"].items() >= vars(setting).items()]
    return [(row["id"], row["seed"], row["setting"]["fields"]) for row in same]


def main() -> None:
    """Parse and run; what fails is said, and the others go on."""
    parser = arguments(__doc__)
    parser.add_argument("--network", choices=("lenet5", "resnet20"), default="lenet5")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name begins so")
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args()
    folder = begin(given)
    setting = SETTINGS[given.network, given.quick]
    done = [] if given.again else there(setting)
    failed: list[str] = []
    for seed in range(given.seeds):
        model, task = None, task_of(setting.network, setting.images, setting.judged, folder, seed, setting.batch)
        for row in rows():
            asked = given.only is None or any(row.name.startswith(name) for name in given.only)
            if given.network not in row.networks or not asked or (row.label, seed, row.fields) in done:
                continue
            model = model or dense(setting.network, setting.dense_epochs, blind(task), folder, seed)
            try:
                found = measured(row, setting, model, task, seed)
            except Exception:
                failed.append(row.label)
                print(f"{row.label} failed:\n{traceback.format_exc()}", flush=True)
                continue
            print(f"{seed} {row.label:40} {found}", flush=True)
            described = {**vars(setting), "threads": given.threads, "trained": row.trained, "fields": row.fields,
                         "longer": row.longer}  # fmt: skip
            published = (
                {"test_error": row.published[given.network], "source": row.source}
                if (given.network in row.published)
                else {}
            )
            save(FILE, [{
                "id": row.label, "row": f"{given.network}, {setting.mode}, seed {seed}", "claimed": published,
                "measured": found, "setting": described, "seed": seed,
            }])  # fmt: skip
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    main()
