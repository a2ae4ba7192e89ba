"""The recipe that ``--recipe``, ``--step`` and ``--set`` describe."""

from __future__ import annotations

from typing import Any

from espalier.core.errors import UsageError, did_you_mean


def parse_step(text: str) -> dict[str, Any]:
    """``"prune.prune sparsity=0.9 schedule=cubic"`` -> ``{"prune.prune": {...}}``; values are YAML."""
    import shlex

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--step {text!r} cannot be read: {str(error).lower()}.") from error
    if not words:
        raise UsageError("--step is empty; write for example --step 'prune.prune sparsity=0.9'.")
    fields = {}
    for word in words[1:]:
        key, sign, value = word.partition("=")
        if not sign:
            raise UsageError(f"--step {text!r}: {word!r} is not of the form field=value.")
        fields[key] = _value(value, f"--step {text!r}: the value of {key}")
    return {words[0]: fields}


def _value(text: str, what: str) -> Any:
    """``text`` as YAML. Raises ``UsageError``."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(
            f"{what} is {text!r}, which is no YAML. Values with blanks or brackets stand in quotes, for example "
            "ema='{ema: {decay: 0.9}}'."
        ) from error


def chosen(recipe: str | None, steps: list[str], settings: list[str]) -> Any:
    """The recipe or the steps, with the settings applied. Raises ``UsageError``."""
    from espalier import api
    from espalier.core.recipe import Recipe, step_from_data, step_to_data

    if recipe is not None and steps:
        raise UsageError("give --recipe or --step, not both.")
    api.fill_registry()
    found = (
        Recipe.from_data([parse_step(step) for step in steps])
        if steps
        else api.named_recipe(recipe or "deep-compression")
    )
    if not settings:
        return found
    data = step_to_data(found)
    for setting in settings:
        _set(data, setting)
    return step_from_data(data)


def _set(data: dict[str, Any], setting: str) -> None:
    """Apply ``prune.epochs=10`` to a recipe's plain data (part names in between are found by themselves)."""
    path, sign, value = setting.partition("=")
    if not sign:
        raise UsageError(f"--set {setting!r} is not of the form field=value, for example --set prune.epochs=10.")
    node: Any = data
    *parents, last = path.split(".")
    for key in (*parents, None):
        while (
            isinstance(node, dict)
            and len(node) == 1
            and isinstance(next(iter(node.values())), dict)
            and key not in node
        ):
            node = next(iter(node.values()))
        if key is None:
            break
        if not isinstance(node, dict) or key not in node:
            raise UsageError(
                f"--set {setting!r}: there is no {key!r}.{did_you_mean(key, node if isinstance(node, dict) else ())}"
            )
        if isinstance(node[key], str):
            node[key] = {node[key]: {}}
        node = node[key]
    if not isinstance(node, dict) or last not in node:
        raise UsageError(
            f"--set {setting!r}: there is no {last!r}.{did_you_mean(last, node if isinstance(node, dict) else ())}"
        )
    node[last] = _value(value, f"--set {setting!r}: the value")
