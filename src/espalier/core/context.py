"""Context: what a technique may use besides the model. Task, seed, named models, progress, and ``run``.

Every composite runs a child only through :meth:`Context.run`; ``runs/`` supplies the version that restores
finished steps, verifies, records and checkpoints.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from espalier.core.errors import EspalierWarning, NeedError, NoEffectWarning, did_you_mean
from espalier.core.method import Method, Technique
from espalier.core.metric import Score
from espalier.core.model import digest, modes, set_modes
from espalier.core.record import Record
from espalier.core.task import Split, Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """One report: ``done`` of ``total`` units of ``label`` in the step ``path``; ``values`` to show beside it."""

    path: str
    label: str
    done: int
    total: int
    values: Mapping[str, float]


class EpochStore(Protocol):
    """Where a training loop leaves its state after every epoch, so that a killed run loses one epoch at most."""

    def save(self, epoch: int, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Keep the state reached after ``epoch`` epochs, replacing the earlier one atomically."""

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The last state kept, or None."""


def derive_seed(seed: int, path: str) -> int:
    """A step's seed: a hash of the root seed and the step's path, 0 .. 2**63 - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class Context:
    """``models`` maps names (``original``, ``best``, students, teachers) to modules; methods name them."""

    task: Task | None = None
    seed: int = 0
    models: dict[str, nn.Module] = field(default_factory=dict)
    path: str = ""
    deadline: float | None = None
    listener: Callable[[Progress], None] | None = None
    record: Record = field(default_factory=lambda: Record("", ""))

    # --- what a technique asks for ---------------------------------------------------------------

    @property
    def data(self) -> Task:
        """The task. Raises ``NeedError`` where none was given."""
        if self.task is None:
            raise NeedError(
                f"{self.path or 'this'} needs a task: Context(task=espalier.tasks.classification(train, val, test))."
            )
        return self.task

    def model(self, name: str) -> nn.Module:
        """A named model. Raises ``NeedError`` listing the names there are."""
        if name not in self.models:
            raise NeedError(f"no model is called {name!r}; there is {', '.join(sorted(self.models)) or 'none'}.")
        return self.models[name]

    @property
    def step_seed(self) -> int:
        """The seed of this step."""
        return derive_seed(self.seed, self.path)

    def generator(self, salt: str = "") -> torch.Generator:
        """A CPU generator that belongs to this step (and ``salt``)."""
        return torch.Generator().manual_seed(derive_seed(self.seed, f"{self.path}/{salt}"))

    @contextmanager
    def forked(self, salt: str = "") -> Iterator[None]:
        """Run users' code on a global generator seeded for this step, and put the caller's state back."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            torch.manual_seed(derive_seed(self.seed, f"{self.path}/{salt}"))
            yield

    def out_of_time(self) -> bool:
        """Whether the user's minutes are spent."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    # --- what a technique says -------------------------------------------------------------------

    def progress(self, label: str, done: int, total: int, **values: float) -> None:
        """Tell how far this step is."""
        if self.listener is not None:
            self.listener(Progress(self.path, label, done, total, values))

    def measure(self, model: nn.Module, split: Split = "val") -> Score:
        """The task's metric of ``model`` on a split, with progress; the original answers for tasks without labels."""
        return self.data.measure(
            model,
            split,
            self.models.get("original"),
            progress=lambda done, of: self.progress(f"{split} metric", done, of),
        )

    def skip(self, name: str, reason: str) -> None:
        """Record a layer that was left alone, and why; once, however often it is said."""
        row = {"name": name, "reason": reason}
        if row not in self.record.skipped:
            self.record.skipped.append(row)

    def note(self, text: str) -> None:
        """Record a sentence for the report."""
        self.record.notes.append(text)

    def warn(self, text: str, category: type[EspalierWarning] = EspalierWarning) -> None:
        """Record a warning and raise it through Python's ``warnings``."""
        self.record.warnings.append(text)
        warnings.warn(text, category, stacklevel=3)

    def epochs(self, name: str = "fit") -> EpochStore | None:
        """Where the training loop called ``name`` keeps its epochs; None outside a run directory."""
        return None

    # --- running children ------------------------------------------------------------------------

    def check(self, method: Method) -> None:
        """Raise one ``NeedError`` for everything ``method`` needs that is not here, before any work starts."""
        missing = [need for need in sorted(method.needs) if not self._offers(need)]
        if missing:
            models = [need.removeprefix("model:") for need in missing if need.startswith("model:")]
            close = [did_you_mean(name, {"original", *self.models}) for name in models]
            raise NeedError(f"{method.name} needs {', '.join(_say(need) for need in missing)}.{''.join(close[:1])}")

    def _offers(self, need: str) -> bool:
        if need.startswith("model:"):
            return need[6:] in self.models or need[6:] == "original"
        return self.task is not None and self.task.has(need)

    def child(self, name: str, method: Technique) -> Context:
        """The context of a child step: same task, models and clock, its own path and record."""
        from dataclasses import replace

        path = f"{self.path}/{name}" if self.path else name
        return replace(self, path=path, record=Record(path, method.name))

    def run(self, child: Technique, model: nn.Module, name: str | None = None) -> nn.Module:
        """Run ``child`` on ``model`` (which it owns from now on) and return the result; modes are put back."""
        context = self.child(name or child.id, child)
        return context.perform(child, model)

    def perform(self, technique: Technique, model: nn.Module) -> nn.Module:
        """Transform inside this context; a technique that changed nothing warns."""
        before, changed = modes(model), digest(model)
        result = set_modes(technique.transform(model, self), before)
        if not getattr(technique, "steps", None) and type(technique).id != "recipe" and digest(result) == changed:
            self.warn(f"{technique.name} changed nothing{self._why()}.", NoEffectWarning)
        return result

    def _why(self) -> str:
        reasons = sorted({entry["reason"] for entry in self.record.skipped})
        return f" ({'; '.join(reasons)})" if reasons else ""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Keep the caller's torch generator as it was, whatever a technique draws."""
        with torch.random.fork_rng(devices=[]):
            yield


def _say(need: str) -> str:
    words = {
        "train": "training data (Task(train=...))",
        "val": "validation data (Task(val=...))",
        "labels": "labels in the batches",
        "loss": "a loss (Task(loss=...))",
    }
    return words.get(
        need, f"a model called {need[6:]!r} (models() in the project file)" if need.startswith("model:") else need
    )
