"""The modes of batch-norm and dropout, and a training with an average of the weights, keep the contract."""

from __future__ import annotations

from espalier.testing import MethodContract
from espalier.train import EMA, BatchNorm, Dropout, EarlyStopping, Finetune


class TestModes(MethodContract):
    method = (
        BatchNorm(mode="insert"), BatchNorm(mode="fold"), Dropout(), Dropout(mode="set", rate=0.25),
        Dropout(mode="rescale"),
    )  # fmt: skip


class TestAveraged(MethodContract):
    method = Finetune(epochs=1, ema=EMA(decay=0.5), stopping=EarlyStopping())
