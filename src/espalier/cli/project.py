"""The user's project file: ``model()``, ``task()`` and, where more models are named, ``models()``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from espalier.cli.failures import in_project, shown
from espalier.core.errors import EspalierError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from espalier.core.task import Task

EXAMPLE = "def model(): return MyNetwork()   and   def task(): return espalier.tasks.classification(train, val, test)"


@dataclass
class Project:
    """What a project file offers."""

    model: nn.Module
    task: Task
    models: dict[str, nn.Module] = field(default_factory=dict)


def load_project(path: Path) -> Project:
    """Run the project file and call its functions. Raises ``UsageError`` naming what is missing or wrong."""
    from torch import nn

    from espalier.core.task import Task

    with _as_project(path):
        module = _execute(path)
        model, task = _call(module, "model", path), _call(module, "task", path)
        models = _call(module, "models", path) if hasattr(module, "models") else {}
    if not isinstance(model, nn.Module):
        raise UsageError(f"{path}: model() must return a torch.nn.Module; it returned {type(model).__name__}.")
    if not isinstance(task, Task):
        raise UsageError(
            f"{path}: task() must return an espalier Task; it returned {type(task).__name__}. For example: {EXAMPLE}."
        )
    if not isinstance(models, dict) or not all(isinstance(m, nn.Module) for m in models.values()):
        raise UsageError(f"{path}: models() must return a dict of name -> torch.nn.Module.")
    return Project(model, task, models)


def load_result(file: Path, project: Path | None, *, codes: bool = False) -> tuple[nn.Module, Project | None]:
    """The model in an .espalier file; one of weights alone fills a copy of the project's model, which comes along."""
    from espalier.core.model import copy_model
    from espalier.encode import open_file
    from espalier.runs import load

    with open_file(file) as archive:
        whole = archive.graph is not None
    if whole:
        return load(file, codes=codes), None
    if project is None:
        raise UsageError(
            f"{file} holds weights only, without the architecture. Name the project file whose model() it was made "
            "from: --project project.py."
        )
    found = load_project(project)
    return load(file, into=copy_model(found.model), codes=codes).eval(), found


@contextmanager
def _as_project(path: Path) -> Iterator[None]:
    """The project's folder can be imported from, and what its code raises becomes one sentence."""
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        yield
    except EspalierError:
        raise
    except SyntaxError as error:
        file = shown(error.filename) if error.filename else path
        raise UsageError(f"{file} line {error.lineno}: {error.msg}.") from error
    except Exception as error:
        raise UsageError(in_project(error, path)) from error
    except SystemExit as error:
        raise UsageError(
            f"{path} ended the program (sys.exit). espalier imports the file and calls model() and task(); put what "
            "only a script does under if __name__ == '__main__':."
        ) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _execute(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no project file {path}. It is a Python file with {EXAMPLE}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file; a project file ends in .py and has {EXAMPLE}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _call(module: ModuleType, name: str, path: Path) -> Any:
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{path} has no function {name}(). A project file has {EXAMPLE}.")
    return function()
