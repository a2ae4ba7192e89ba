"""Every registered technique keeps the contract; a new one joins by being registered."""

from __future__ import annotations

from espalier.api import fill_registry
from espalier.core import registry
from espalier.core.method import Technique
from espalier.testing import MethodContract

fill_registry()
TECHNIQUES = [cls for cls in registry.methods() if issubclass(cls, Technique)]


class TestAsTheyStand(MethodContract):
    method = tuple(TECHNIQUES)


class TestTrained(MethodContract):
    """Techniques that train only when asked, asked."""

    method = tuple(cls(epochs=1) for cls in TECHNIQUES if getattr(cls(), "epochs", None) == 0)
