"""HTML and SVG as a tree of calls: every string is escaped unless it already came from here."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = {"meta", "br", "rect", "circle", "line", "polyline"}


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Text as markup. A character that no UTF-8 file can hold is replaced."""
    clean = str(text).encode("utf-8", "replace").decode("utf-8")
    return Markup(html.escape(clean, quote=True))


def join(children: Iterable[object]) -> Markup:
    """Markup of children: markup as it is, None left out, nests flattened, everything else escaped."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, (list, tuple)) or (not isinstance(child, str) and isinstance(child, Iterable)):
            parts.append(join(child))
        elif child is not None:
            parts.append(escape(child))
    return Markup("".join(parts))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element. ``class_`` and ``for_`` lose their underscore, others become hyphens; None leaves one out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID and not children:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")
