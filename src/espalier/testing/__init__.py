"""Tests that ship: the contract every technique keeps, for third parties to subclass, and the small models it runs on.

    class TestMyPruning(MethodContract):
        method = MyPruning(sparsity=0.7)

Needs pytest.
"""

import pytest

pytest.register_assert_rewrite("espalier.testing.contract")

from espalier.testing.compare import bits, effective, fingerprint, frozen_copy, outputs  # noqa: E402 - after the rewrite
from espalier.testing.contract import MethodContract, shortened  # noqa: E402
from espalier.testing.models import EXAMPLES, Example  # noqa: E402

__all__ = [
    "EXAMPLES", "Example", "MethodContract", "bits", "effective", "fingerprint", "frozen_copy", "outputs", "shortened",
]  # fmt: skip
