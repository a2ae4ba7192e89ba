"""Errors as one sentence: whose they are, the user's project's or espalier's own, and where they were raised."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from espalier.core.errors import EspalierError

OURS = Path(__file__).resolve().parent.parent
DEBUG = "ESPALIER_DEBUG"
"""Environment variable: where it is set, errors show their whole traceback."""
HINT = f"{DEBUG}=1 shows the whole traceback."
REPORT = (
    "This is a mistake in espalier, not in your project. Please report it with the lines above and the command that "
    "led to it."
)
LIMIT = 400
_CALLED = {"training_loss": "the loss of task()", "measure": "the metric of task()"}


@dataclass(frozen=True)
class Frame:
    """One level of a traceback: ``of`` is ``espalier``, ``user`` or ``library``."""

    file: str
    line: int
    function: str
    of: str

    def __str__(self) -> str:
        name = self.function.rpartition("<locals>.")[2]
        inside = {"<module>": "", "<lambda>": ", in a lambda"}.get(name, f", in {name}()")
        return f"{shown(self.file)} line {self.line}{inside}"


def shown(file: str) -> str:
    """A path as the user would write it: relative where it is below the current folder."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def explained(error: Exception) -> tuple[str, int]:
    """The sentence for an error that reached the command line, and the exit code.

    2: wrong use or input, the user's code included. 1: a mistake in espalier, whose traceback is printed.
    """
    if debugging():
        traceback.print_exception(error)
    if isinstance(error, EspalierError):
        return f"error: {error}", 2
    told = theirs(error)
    if told is not None:
        return f"error: {told}", 2
    if isinstance(error, OSError):
        return f"error: {error}", 2
    if not debugging():
        traceback.print_exception(error)
    return REPORT, 1


def debugging() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def theirs(error: BaseException) -> str | None:
    """The sentence for an error that the user's code raised, or something called from it; None for espalier's own.

    The innermost frame that is espalier's or the user's decides. Where espalier called the user's loss, metric or data
    loader and that is a library's, no frame is the user's, and the sentence names what was called.
    """
    found = list(frames(error.__traceback__))
    last = next((n for n in reversed(range(len(found))) if found[n].of != "library"), None)
    if last is None:
        return None
    if found[last].of == "user":
        return sentence(error, str(found[last]))
    called = found[last + 1 :]
    if any(f"torch{os.sep}utils{os.sep}data" in frame.file for frame in called):
        return sentence(error, "the data of task()")
    in_task = Path(found[last].file) == OURS / "core" / "task.py"
    what = _CALLED.get(found[last].function.rpartition(".")[2]) if in_task and called else None
    return None if what is None else sentence(error, what)


def in_project(error: BaseException, project: Path) -> str:
    """The sentence for an error while the project file was run: where the user's own code was, innermost."""
    own = [frame for frame in frames(error.__traceback__) if frame.of == "user"]
    return sentence(error, str(own[-1]) if own else str(project))


def sentence(error: BaseException, where: str) -> str:
    """``project.py line 7, in model(): KeyError: 'fc'.``, with what to do."""
    text = str(error)
    if "Original Traceback" in text:  # a worker of a data loader hands on its traceback as text
        text = text.strip().rpartition("\n")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = " ".join(lines)
    message = message if len(message) <= LIMIT else message[: LIMIT - 1] + "…"
    kind = "" if message.startswith(f"{type(error).__name__}:") else type(error).__name__
    said = f"{where}: {': '.join(part for part in (kind, message) if part)}"
    return f"{said}{'' if said.endswith(('.', '!', '?', '…')) else '.'}{_advice(error)} {HINT}"


def _advice(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return " Install it where espalier is installed, or put the module beside the project file."
    name = getattr(error, "filename", None)
    if isinstance(error, FileNotFoundError) and name is not None and not Path(str(name)).is_absolute():
        return f" Relative paths start at the folder the command is called in, {Path.cwd()}."
    return ""


def frames(found: TracebackType | None) -> Iterator[Frame]:
    """The frames of a traceback, outermost first."""
    while found is not None:
        code = found.tb_frame.f_code
        yield Frame(code.co_filename, found.tb_lineno, code.co_qualname, _owner(code.co_filename))
        found = found.tb_next


def _owner(file: str) -> str:
    if file.startswith("<"):
        return "library"
    path = Path(file).resolve()
    if path.is_relative_to(OURS):
        return "espalier"
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    if {"site-packages", "dist-packages"} & set(path.parts) or any(
        path.is_relative_to(Path(folder).resolve()) for folder in libraries
    ):
        return "library"
    return "user"
