"""The pruning step that the options of ``espalier prune`` and ``espalier sensitivity`` describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.prune import Prune
    from espalier.prune.structure import Structural


def pruning(fields: dict[str, Any]) -> Prune:
    """``prune.prune`` with the ``fields`` that were given; None leaves the default."""
    from espalier.core.recipe import step_from_data
    from espalier.prune import Prune

    step = step_from_data({"prune.prune": {name: value for name, value in fields.items() if value is not None}})
    assert isinstance(step, Prune)  # noqa: S101 - named so
    return step


def units(part: str | None, **options: Any) -> Structural:
    """The pattern of the units that go: channels, or those of the ``part`` of a transformer that was named."""
    from espalier.prune import Channels, Heads

    return Channels(**options) if part is None else Heads(part=part, **options)  # type: ignore[arg-type]
