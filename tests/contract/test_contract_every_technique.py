"""Every registered technique keeps the contract; a new one joins by being registered."""

from __future__ import annotations

import dataclasses

import pytest

import espalier.prune
import espalier.recipes
import espalier.share
import espalier.train
from espalier.core import registry
from espalier.core.method import Technique
from espalier.testing import MethodContract

TECHNIQUES = [cls for cls in registry.methods() if issubclass(cls, Technique)]


class TestAsTheyStand(MethodContract):
    method = tuple(TECHNIQUES)


class TestTrained(MethodContract):
    """Techniques that train only when asked, asked."""

    method = tuple(cls(epochs=1) for cls in TECHNIQUES if getattr(cls(), "epochs", None) == 0)
