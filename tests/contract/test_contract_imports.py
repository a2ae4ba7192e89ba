"""The rooms import one way only, and what must be light stays light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import espalier

SOURCE = Path(espalier.__file__).parent
METHOD_ROOMS = {"prune", "quantize", "distill", "factorize", "share", "compact"}
LEVELS = (
    {"core"},
    {"graph", "data"},
    {"encode", "deploy"},
    {"measure"},
    {"train"},
    METHOD_ROOMS,
    {"search", "recipes"},
    {"runs"},
    {"report", "cli", "studio"},
)
"""Left to right as docs/architecture.md draws them; a room imports to its left."""
ABOVE = {"api", "tasks", "testing", "__init__"}
FRONT = {("cli", "api")}
"""Who may use what stands above all rooms."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms a file imports or reaches through the lazy package, with the line; imports inside functions count."""
    names = set(LEVEL) | ABOVE
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively"
            found = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "espalier"
                else [node.module or ""]
            )
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "espalier":
            found = [f"espalier.{node.attr}"]
        for name in found:
            parts = name.split(".")
            if parts[0] == "espalier" and len(parts) > 1 and parts[1] in names:
                yield parts[1], node.lineno


def edges() -> Iterator[tuple[str, str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        for target, line in imported(path):
            if target != room_of(path):
                yield room_of(path), target, f"{path.relative_to(SOURCE)}:{line}"


def allowed(room: str, target: str) -> bool:
    if room in ABOVE or (room, target) in FRONT:
        return True
    if target in ABOVE or room not in LEVEL:
        return False
    if LEVEL[room] == LEVEL[target]:
        return room not in METHOD_ROOMS
    return LEVEL[target] < LEVEL[room]


def test_every_room_is_known() -> None:
    rooms = {room_of(path) for path in SOURCE.rglob("*.py")}
    assert rooms <= set(LEVEL) | ABOVE


def test_imports_go_one_way() -> None:
    wrong = [f"{where}: {room} -> {target}" for room, target, where in edges() if not allowed(room, target)]
    assert not wrong


def test_no_cycle_between_rooms() -> None:
    graph: dict[str, set[str]] = {}
    for room, target, _ in edges():
        if room not in ABOVE:
            graph.setdefault(room, set()).add(target)
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("room", "target"),
    [
        ("core", "prune"),
        ("prune", "share"),
        ("train", "prune"),
        ("encode", "measure"),
        ("runs", "report"),
        ("runs", "api"),
    ],
)
def test_the_rule_refuses(room: str, target: str) -> None:
    assert not allowed(room, target)


def test_light_modules_import_no_torch() -> None:
    light = (
        "espalier",
        "espalier.core",
        "espalier.core.errors",
        "espalier.core.representation",
        "espalier.core.registry",
        "espalier.core.cluster",
        "espalier.encode",
        "espalier.cli.main",
    )
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name); print(name, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, *light], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:-1] == [f"{name} False" for name in light]
