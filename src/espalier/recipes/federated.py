r"""Federated averaging: clients train on their own data and send sparse updates in few bits; the server averages them.

Paper    McMahan, Moore, Ramage, Hampson, Aguera y Arcas. Communication-Efficient Learning of Deep Networks from
         Decentralized Data. AISTATS 2017. arXiv:1602.05629; Sattler, Wiedemann, Mueller, Samek. Robust and
         Communication-Efficient Federated Learning from Non-IID Data. 2019. arXiv:1903.02891 (the updates, both ways)
Formula  w_k <- SGD_k(w), each client k of a share C, E epochs;   u_k = r_k + w_k - w;   send c_k = code(top(u_k));
         r_k <- u_k - c_k;   u = r + sum_k n_k / n c_k;   send c = code(top(u));   r <- u - c;   w <- w + c
Departs  All clients are in one process, and every client hears every message of the server. Messages are .espalier
         files, with an adaptive coder in place of Golomb codes; their length is what is counted. bits=1 sends a sign
         and one magnitude for each tensor (Sattler: one for the whole update), more bits a uniform grid. The
         statistics of batch norms are averaged as well, and sent as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from espalier.core.context import Context, EpochStore
from espalier.core.fields import Bits, Count, Epochs, Fraction, LearningRate, Positive, Rounds, Sparsity
from espalier.core.model import copy_model
from espalier.core.record import Record
from espalier.encode.compiled import announce
from espalier.recipes.clients import Part, Samples, Split, divide
from espalier.recipes.updates import Sender, Tensors, install, learned
from espalier.train import SGD, Constant, Optimizer, Training
from espalier.train.schedule import LearningRateSchedule
from espalier.train.state import pack, unpack

FEWEST = 2
STORE = "rounds"


@dataclass(frozen=True, kw_only=True)
class Federated(Training):
    """Train by ``rounds`` of ``clients``, of which a ``share`` takes part in each, for ``epochs`` on data of their own.

    ``sparsity``: the share of an update that is not sent; ``bits`` of what is, null for floats as they are.
    ``down``: the server sends the same way; else it sends the whole model. ``feedback``: what a message leaves out is
    sent later. ``split``: how the data differ: not at all (``iid``), each client has ``shards`` runs of the samples in
    the order of their labels, or shares of each class from a Dirichlet distribution of ``alpha``.
    """

    id: ClassVar[str] = "federated"
    epochs: Epochs = 1
    lr: LearningRate = 0.05
    optimizer: Optimizer = field(default_factory=lambda: SGD(momentum=0.0))
    lr_schedule: LearningRateSchedule = field(default_factory=Constant)
    clients: Count = 10
    rounds: Rounds = 20
    share: Fraction = 1.0
    sparsity: Sparsity = 0.99
    bits: Bits | None = 1
    down: bool = True
    feedback: bool = True
    split: Split = "shards"
    shards: Count = 2
    alpha: Positive = 0.5

    @property
    def needs(self) -> frozenset[str]:
        """Data to divide, and labels to divide it by."""
        return super().needs | {"train"} | (set() if self.split == "iid" else {"labels"})

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if self.clients < FEWEST:
            found.append(f"clients={self.clients} is no federation; give {FEWEST} at least")
        if not self.epochs:
            found.append("epochs=0: the clients would not train")
        if self.split == "shards" and not self.shards:
            found.append("shards=0 leaves the clients without data")
        if self.stopping is not None:
            found.append("stopping looks at val, which clients do not have; leave it unset")
        if self.reestimate:
            found.append("reestimate looks at all the training data, which nobody has; put train.batch-norm after it")
        return found

    def transform(self, model: nn.Module, context: Context) -> nn.Module:
        """Round after round; the state after each is kept where the context keeps epochs."""
        with context.forked("samples"):  # a loader may shuffle
            samples = Samples.of(context.data)
        labels = None if self.split == "iid" else samples.labels(context.data)
        parts = divide(
            labels, len(samples), self.clients, self.split, shards=self.shards, alpha=self.alpha,
            generator=context.generator("clients"),
        )  # fmt: skip
        federation = Federation(self, model, [Part(samples, rows) for rows in parts], context)
        federation.run(context.epochs(STORE))
        return model


class Federation:
    """The server's model, the clients' data, and what both sides still owe each other."""

    def __init__(self, method: Federated, model: nn.Module, parts: list[Part], context: Context) -> None:
        self.method, self.model, self.parts, self.context = method, model, parts, context
        statistics = [name for name, _ in model.named_buffers()]
        self.senders = [self.sender(statistics) for _ in parts]
        self.server = self.sender(statistics) if method.down else Sender()
        self.with_data = [n for n, part in enumerate(parts) if len(part.rows)]
        self.rows: list[dict[str, Any]] = []

    def sender(self, statistics: list[str]) -> Sender:
        """One that sends as the fields say."""
        method = self.method
        return Sender(method.sparsity, method.bits, feedback=method.feedback, whole=statistics)

    def run(self, store: EpochStore | None) -> None:
        """All rounds, from the state kept if there is one."""
        announce(self.method.rounds * len(self.parts) * sum(value.numel() for value in learned(self.model).values()))
        kept = store.load() if store is not None else None
        if kept is not None:
            self.load_state_dict(unpack(kept[2], kept[1]))
        context, method = self.context, self.method
        for number in range(len(self.rows), method.rounds):
            context.progress("rounds", number, method.rounds)
            if context.out_of_time():
                context.note(f"stopped after round {number} of {method.rounds}: the time is up.")
                break
            self.rows.append(self.round(number))
            if store is not None:
                tensors: Tensors = {}
                store.save(number + 1, tensors, pack(self.state_dict(), tensors))
        idle = len(self.parts) - len(self.with_data)
        if idle:
            context.note(f"{idle} of {len(self.parts)} clients have no samples and took no part.")
        context.record.details["rounds"] = self.rows
        context.record.details["samples"] = [len(part.rows) for part in self.parts]

    def round(self, number: int) -> dict[str, Any]:
        """One round: who takes part trains and sends, the server averages and sends. The row of the record."""
        method, context = self.method, self.context
        asked = max(1, round(method.share * len(self.with_data)))
        order = torch.randperm(len(self.with_data), generator=context.generator(f"round {number}"))
        chosen = sorted(self.with_data[n] for n in order[:asked].tolist())
        before, total = learned(self.model), sum(len(self.parts[client].rows) for client in chosen)
        mean, up = {name: torch.zeros_like(value) for name, value in before.items()}, 0
        for client in chosen:
            after = learned(self.trained(number, client))
            change = {name: after[name] - value for name, value in before.items()}
            message, arrived = self.senders[client].send(change)
            up += len(message)
            for name, value in arrived.items():
                mean[name] += value * (len(self.parts[client].rows) / total)
        if method.down:
            message, arrived = self.server.send(mean)
            now = {name: before[name] + value for name, value in arrived.items()}
            down = len(message) * len(self.parts)
        else:
            message, now = self.server.send({name: before[name] + value for name, value in mean.items()})
            down = len(message) * len(chosen)
        install(self.model, now)
        row: dict[str, Any] = {"round": number + 1, "clients": len(chosen), "bytes_up": up, "bytes_down": down}
        if context.data.val is not None:
            row["metric"] = context.measure(self.model).value
        return row

    def trained(self, number: int, client: int) -> nn.Module:
        """The model after a client's training."""
        place = f"{self.context.path}/round-{number + 1:03d}/client-{client + 1:03d}"
        task = dataclasses.replace(self.context.data, train=self.parts[client], val=None, test=None)
        context = Context(
            task=task, seed=self.context.seed, models=self.context.models, path=place, deadline=self.context.deadline,
            listener=self.context.listener, record=Record(place, self.method.name),
        )  # fmt: skip
        model = copy_model(self.model)
        self.method.train(model, context)
        return model

    def state_dict(self) -> dict[str, Any]:
        """What the next round depends on."""
        return {
            "model": learned(self.model), "rows": self.rows, "server": self.server.residual,
            "clients": [sender.residual for sender in self.senders],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        install(self.model, state["model"])
        self.rows, self.server.residual = state["rows"], state["server"]
        for sender, residual in zip(self.senders, state["clients"], strict=True):
            sender.residual = residual
