"""The report: plain data in (a run's ``record.json``), a terminal table and one offline HTML file out.

``info`` does all arithmetic; the views only draw. No torch is needed to read a report.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.report.html import page, write_html
    from espalier.report.info import Info, summarise
    from espalier.report.source import load
    from espalier.report.terminal import render_terminal

_HOMES = {
    "Info": "info",
    "load": "source",
    "page": "html",
    "render_terminal": "terminal",
    "summarise": "info",
    "write_html": "html",
}

__all__ = ["Info", "load", "page", "render_terminal", "summarise", "write_html"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'espalier.report' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"espalier.report.{_HOMES[name]}"), name)
