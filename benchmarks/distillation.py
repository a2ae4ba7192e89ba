"""Distillation: every loss and every teaching beside its baseline, wrong labels, and ResNet-8 taught by ResNet-20.

python benchmarks/distillation.py [--quick] [--part fashion|noise|cifar] [--seeds 3] [--only dkd ...] [--threads 1]
python benchmarks/distillation.py --compare      (needs: pip install --no-deps torchdistill==1.1.5)

``fashion``: Fashion-MNIST, LeNet-5 that saw all images teaches a CNN of a thirteenth of its weights on some of them,
long enough for the student alone to level off; in shorter trainings every teacher only slows it. All rows have the same
images, epochs, optimizer and first weights. Mutual learning and born-again networks stand beside the student alone,
assistant and several teachers beside the one teacher (``soft-targets``). ``noise``: the same with 0, 20 and 40 % of the
training labels wrong; a teacher that saw the right labels of the same images, and one that saw the same wrong ones.
``cifar``: JPEG images; the published ResNet-20, fine-tuned to them, teaches ResNet-8 from scratch. Weights and
temperatures are the papers' defaults, DKD's beta the 2 that its authors take for this family of networks, its warm-up
half of the shorter training; that and the length of the training were chosen on val, nothing by test. Seconds are
processor time without teachers. Rows are kept: a second call goes on where the first stopped. The table at the end
gives the mean of the seeds, and the gain over the baseline seed by seed. ``--compare``: the value of each loss on one
batch beside the formula of torchdistill 1.1.5, where it has that loss.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples.lenet import LeNet5
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, save
from benchmarks.subjects import blind, dense, task_of, training

import espalier as es
from espalier import api
from espalier import distill as d
from espalier.compact import CifarResNet
from espalier.core.context import Context
from espalier.core.errors import EspalierWarning
from espalier.core.method import Technique
from espalier.data import Loader, Normalisation, standard
from espalier.distill.parts import Rows
from espalier.train import Finetune

FILE = "distillation"
SCALE = Normalisation((0.0,), (1.0,))
NOISE = (0, 20, 40)


@dataclass(frozen=True)
class Setting:
    """What a reader needs to repeat a row. ``teaching_images``, ``teaching_epochs``: those of the teacher."""

    part: str
    mode: str
    images: int
    judged: int
    epochs: int
    teaching_images: int
    teaching_epochs: int
    lr: float
    batch: int


SETTINGS = {
    (part, mode == "quick"): Setting(part, mode, *numbers)
    for part, mode, *numbers in (
        ("fashion", "quick", 5_000, 5_000, 30, 55_000, 6, 3e-3, 64),
        ("fashion", "normal", 10_000, 10_000, 40, 55_000, 10, 3e-3, 64),
        ("noise", "quick", 5_000, 5_000, 20, 5_000, 20, 3e-3, 64),
        ("noise", "normal", 10_000, 10_000, 25, 10_000, 25, 3e-3, 64),
        ("cifar", "quick", 10_000, 2_500, 8, 10_000, 2, 0.1, 128),
        ("cifar", "normal", 15_000, 5_000, 16, 15_000, 3, 0.1, 128),
    )
}


def small() -> nn.Module:
    """12 and 24 maps of 5 x 5, 64 units: 32,700 weights, LeNet-5 has 430,500."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 24, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def middle() -> nn.Module:
    """The assistant: 16 and 32 maps, 200 units."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(512, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network whose first weights are those of ``seed``."""
    torch.manual_seed(seed)
    return build()


@dataclass(frozen=True)
class Row:
    """One row: fields of ``distill.distill`` (None: no teacher), and the row it is to be compared with."""

    name: str
    fields: dict[str, Any] | None = field(default_factory=dict)
    beside: str = "alone"
    noise: int = 0


def losses(epochs: int) -> dict[str, d.DistillLoss]:
    """Every loss in every form."""
    return {
        "soft-targets": d.SoftTargets(), "logits": d.Logits(), "logits, predictions": d.Logits(space="predictions"),
        "hints, two-stage": d.Hints(epochs=max(1, epochs // 3)), "hints, joint": d.Hints(mode="joint"),
        "features": d.Features(), "attention, code": d.Attention(), "attention, paper": d.Attention(mode="paper"),
        "relational": d.Relational(), "dkd": d.DKD(beta=2.0, warmup=max(1, epochs // 2)),
    }  # fmt: skip


def rows(setting: Setting) -> tuple[Row, ...]:
    """What is measured in this part."""
    alone = Row("alone", None)
    every = losses(setting.epochs)
    if setting.part == "cifar":
        return (alone, *(Row(name, {"losses": (every[name],)}) for name in ("soft-targets", "dkd")))
    if setting.part == "noise":
        found = []
        for noise in NOISE:
            name = f"alone, {noise} % wrong"
            found.append(Row(name, None, noise=noise))
            found.append(Row(f"taught by who saw right labels, {noise} % wrong", beside=name, noise=noise))
            if noise:
                misled = {"teacher": "misled"}
                found.append(Row(f"taught by who saw the same, {noise} % wrong", misled, beside=name, noise=noise))
        return tuple(found)
    return (
        alone,
        *(Row(name, {"losses": (part,)}) for name, part in every.items()),
        Row("mutual", {"teaching": d.Mutual()}),
        Row("self-distillation", {"teaching": d.SelfDistillation(), "teacher": "alone"}),
        Row("assistant", {"teaching": d.Assistant(between=("middle",))}, beside="soft-targets"),
        *(
            Row(f"multi-teacher, {w}", {"teaching": d.MultiTeacher(beside=("second", "third"), weights=w)},
                beside="soft-targets")
            for w in ("uniform", "entropy")
        ),
    )  # fmt: skip


class Classroom:
    """The data and the networks of one part, each made when it is first asked for."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        self.tasks: dict[Any, es.Task] = {}
        self.networks: dict[Any, nn.Module] = {}

    def task(self, noise: int = 0, seed: int = 0, images: int | None = None) -> es.Task:
        """``noise`` percent of the training labels are another class, drawn by ``seed``."""
        key = (noise, seed if noise else 0, images or self.setting.images)
        if key not in self.tasks:
            self.tasks[key] = self._task(*key)
        return self.tasks[key]

    def _task(self, noise: int, seed: int, images: int) -> es.Task:
        setting = self.setting
        if setting.part == "cifar":
            return task_of("resnet20", images, setting.judged, self.folder, 0, setting.batch)
        data = standard("fashion-mnist", self.folder, normalisation=SCALE)
        chosen = torch.randperm(len(data.train.x), generator=torch.Generator().manual_seed(0))[:images]
        x, y = data.train.x[chosen], data.train.y[chosen]
        train = Loader(x, mislabelled(y, noise, seed), batch_size=setting.batch, shuffle=True, normalisation=SCALE)
        held = (
            Loader(part.x[: setting.judged], part.y[: setting.judged], batch_size=1000, normalisation=SCALE)
            for part in (data.val, data.test)
        )
        return es.tasks.classification(train, *held)

    def fields(self, epochs: int) -> dict[str, Any]:
        """The training of every student."""
        if self.setting.part == "cifar":
            return training("resnet20", epochs, lr=self.setting.lr)
        return training("lenet5", epochs, lr=self.setting.lr)

    def teacher(self, seed: int, noise: int = 0) -> nn.Module:
        """LeNet-5 of that seed; ResNet-20, the same for all seeds."""
        key = ("teacher", seed if self.setting.part != "cifar" else 0, noise)
        if key not in self.networks:
            setting, task = self.setting, blind(self.task(noise, seed, self.setting.teaching_images))
            if setting.part == "cifar":
                self.networks[key] = dense("resnet20", setting.teaching_epochs, task, self.folder, 0)
            else:
                step = Finetune(**training("lenet5", setting.teaching_epochs))
                self.networks[key] = step(seeded(LeNet5, 100 + seed), Context(task=task, seed=100 + seed)).eval()
        return self.networks[key]

    def alone(self, seed: int) -> nn.Module:
        """The student without a teacher, who then is one."""
        key = ("alone", seed)
        if key not in self.networks:
            step = self.step(Row("alone", None), seed)
            self.networks[key] = step(self.student(seed), Context(task=blind(self.task()), seed=seed))
        return self.networks[key]

    def student(self, seed: int) -> nn.Module:
        """Fresh; the same in every row of a seed."""
        return seeded((lambda: CifarResNet(8)) if self.setting.part == "cifar" else small, seed)

    def step(self, row: Row, seed: int) -> Technique:
        """The training of a row; the first stage of hints comes out of the same epochs."""
        if row.fields is None:
            return Finetune(**self.fields(self.setting.epochs))
        first = sum(part.ahead for part in row.fields.get("losses", ()))
        fields = self.fields(self.setting.epochs - first)
        teacher = {} if isinstance(row.fields.get("teaching"), d.Mutual) else {"teacher": "teacher"}
        return d.Distill(**{**teacher, **fields, **row.fields})

    def models(self, row: Row, seed: int) -> dict[str, nn.Module]:
        """The networks that the row's step names."""
        needs = self.step(row, seed).needs
        makers: dict[str, Callable[[], nn.Module]] = {
            "teacher": lambda: self.teacher(seed), "misled": lambda: self.teacher(seed, row.noise),
            "second": lambda: self.teacher((seed + 1) % 3), "third": lambda: self.teacher((seed + 2) % 3),
            "middle": lambda: seeded(middle, 200 + seed), "alone": lambda: self.alone(seed),
        }  # fmt: skip
        return {name: make() for name, make in makers.items() if f"model:{name}" in needs}

    def measured(self, row: Row, seed: int) -> dict[str, Any]:
        """One row."""
        task, judge = self.task(row.noise, seed), self.task()
        models = self.models(row, seed)
        started = time.process_time()
        model = self.step(row, seed)(self.student(seed), Context(task=blind(task), seed=seed, models=dict(models)))
        seconds = time.process_time() - started
        val, test = judge.measure(model, "val"), judge.measure(model, "test")
        teachers = {name: judge.measure(network, "test").value for name, network in models.items() if name != "middle"}
        return {
            "val": val.value, "test": test.value, "test_stderr": test.stderr, "teachers_test": teachers,
            "cpu_seconds": round(seconds, 1),
        }  # fmt: skip


def mislabelled(y: Tensor, noise: int, seed: int) -> Tensor:
    """``noise`` percent of the labels replaced by one of the other nine classes."""
    g = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(y), generator=g) < noise / 100
    return torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=g)) % 10, y)


def there() -> list[dict[str, Any]]:
    """The rows that are kept."""
    path = RESULTS / f"{FILE}.json"
    return json.loads(path.read_text()) if path.exists() else []


def described(setting: Setting, row: Row, threads: int) -> dict[str, Any]:
    """The setting of a row, its fields as text."""
    shown = None if row.fields is None else {name: repr(value) for name, value in row.fields.items()}
    return {**dataclasses.asdict(setting), "threads": threads, "beside": row.beside, "noise": row.noise,
            "fields": shown}  # fmt: skip


def run(setting: Setting, folder: Path, seeds: int, only: list[str], threads: int) -> list[str]:
    """All rows of a part that are not there yet; the names of those that failed."""
    room, failed = Classroom(setting, folder), []
    kept = {(row["id"], row["row"]): row["setting"] for row in there()}
    for seed in range(seeds):
        for row in rows(setting):
            label, told = f"{setting.part}, {setting.mode}, seed {seed}", described(setting, row, threads)
            if kept.get((row.name, label)) == told or (only and not any(row.name.startswith(name) for name in only)):
                continue
            try:
                found = room.measured(row, seed)
            except Exception:
                failed.append(f"{row.name} ({label})")
                print(f"{row.name} failed:\n{traceback.format_exc()}", flush=True)
                continue
            save(FILE, [{"id": row.name, "row": label, "claimed": {}, "measured": found, "setting": told,
                         "seed": seed}])  # fmt: skip
            print(label, f"{row.name:45} {found}", flush=True)
    return failed


def table(setting: Setting) -> None:
    """Mean test accuracy, and the gain over the row beside it: mean and range over the seeds."""
    found: dict[str, dict[int, float]] = {}
    for row in there():
        if row["row"].startswith(f"{setting.part}, {setting.mode}, seed"):
            found.setdefault(row["id"], {})[row["seed"]] = row["measured"]["test"]
    for row in rows(setting):
        scores, base = found.get(row.name, {}), found.get(row.beside, {})
        gains = [scores[seed] - base[seed] for seed in scores if seed in base]
        if scores:
            gain = f"{statistics.mean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f})" if gains else ""
            print(f"{row.name:45} {statistics.mean(scores.values()):6.2f} %   against {row.beside:20} {gain}")


# --- beside torchdistill ---------------------------------------------------------------------------------------------


def compare() -> None:
    """Each loss on one seeded batch, beside torchdistill's value times the factor between the two definitions."""
    from torchdistill.losses.mid_level import ATLoss, KDLoss, RKDLoss

    g = torch.Generator().manual_seed(0)
    z_s, z_t = 3 * torch.randn(2, 64, 10, generator=g)
    maps = torch.randn(2, 64, 16, 8, 8, generator=g)
    labels = torch.randint(10, (64,), generator=g)
    inside = [{"m": {"output": side}} for side in (z_s, z_t)]
    flat = [{"m": {"output": side.flatten(1)}} for side in maps]
    pairs = {"p": {side: {"io": "output", "path": "m"} for side in ("student", "teacher")}}
    rows_, pair = Rows(z_s, z_t, labels), [(maps[0], maps[1])]
    soft, at, paper, rkd = d.SoftTargets(), d.Attention(), d.Attention(mode="paper"), d.Relational()
    hard = soft.leaves * torch.nn.functional.cross_entropy(z_s, labels)
    kd = KDLoss("m", "output", "m", "output", temperature=4.0, alpha=1 - soft.alpha)
    at_theirs = {
        mode: ATLoss(pairs, mode=mode)({"m": {"output": maps[0]}}, {"m": {"output": maps[1]}})
        for mode in ("code", "paper")
    }
    relational = RKDLoss("m", "m", rkd.distance, rkd.angle, "mean")(*flat)
    mse = nn.MSELoss()
    values: dict[str, tuple[Tensor, Any]] = {
        "soft-targets": (hard + soft.value(rows_), kd(*inside, labels)),
        "attention, code": (at.value(pair), at.weight * at_theirs["code"]),
        "attention, paper": (paper.value(pair), paper.weight * at_theirs["paper"] / (2 * 64)),
        "relational": (rkd.value(pair), relational),
        "hints, joint": (d.Hints(mode="joint").value(pair), 100 * mse(*maps)),
        "features": (d.Features().value(pair), mse(*maps)),
        "logits": (d.Logits().value(rows_), mse(z_s, z_t) * 10 / 2),
        "dkd": (d.DKD(warmup=0).value(rows_), None),
    }
    for name, (ours, theirs) in values.items():
        mine, other = float(ours), None if theirs is None else float(theirs)
        measured = {"ours": mine, "torchdistill": other}
        if other is not None:
            measured["relative_difference"] = abs(mine - other) / abs(other)
        print(f"{name:20} {measured}")
        setting = {"part": "compare", "batch": 64, "torchdistill": "1.1.5"}
        save(FILE, [{"id": name, "row": "compare", "claimed": {}, "measured": measured, "setting": setting, "seed": 0}])


def main() -> None:
    """Parse and run; what fails is said, and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=("fashion", "noise", "cifar"))
    parser.add_argument("--seeds", type=int, help="3; with --quick 1")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="rows whose name begins so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--compare", action="store_true", help="each loss beside torchdistill's, then end")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore", EspalierWarning)
    api.fill_registry()
    if given.compare:
        compare()
        return
    folder = Path(given.data_dir or os.environ["ESPALIER_DATA"])
    failed: list[str] = []
    parts = [given.part] if given.part else ["fashion", "noise", "cifar"]
    for part in parts:
        failed += run(
            SETTINGS[part, given.quick], folder, given.seeds or (1 if given.quick else 3), given.only, given.threads
        )
    for part in parts:
        print(f"\n{part}")
        table(SETTINGS[part, given.quick])
    if failed:
        sys.exit(f"{len(failed)} rows failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
