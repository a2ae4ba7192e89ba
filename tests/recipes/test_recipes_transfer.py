"""A new head for a new task: found, sized, filled; the whole recipe; its files and a resumed run."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import espalier as es
from espalier.core.context import Context
from espalier.core.errors import DataError, EspalierWarning, ModelError, PhaseError, UnknownNameError, UsageError
from espalier.core.forms import Mask, Shared
from espalier.core.parametrize import slots
from espalier.core.plan import applied
from espalier.core.task import Task, classification
from espalier.data import Loader, standard
from espalier.prune import Linear as Evenly
from espalier.prune import Listed, Movement, Prune
from espalier.recipes import NewHead, Transfer
from espalier.share import KMeans
from espalier.testing import EXAMPLES, effective
from espalier.train import Finetune

BY_NAME = {example.name: example for example in EXAMPLES}


@cache
def tasks() -> tuple[Task, Task]:
    """Which digit; and whether it is below three, between, or above six."""
    splits = standard("digits", batch_size=32)

    def coarse(part: Any, *, shuffle: bool = False) -> Loader:
        scale = part.normalisation
        return Loader(
            part.x, (part.y - 1).clamp(0) // 3, batch_size=part.batch_size, shuffle=shuffle, normalisation=scale
        )

    first = classification(splits.train, splits.val, splits.test)
    return first, classification(coarse(splits.train, shuffle=True), coarse(splits.val), coarse(splits.test))


@cache
def trained() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    return Finetune(epochs=6, lr=4e-3)(net, Context(task=tasks()[0]))


def quick(**fields: Any) -> Transfer:
    return Transfer(
        prune=Prune(epochs=4, lr=3e-3, sparsity=0.7), finetune=Finetune(epochs=1), share=KMeans(bits=4), strength=None,
        **fields,
    )  # fmt: skip


def test_the_head_gets_as_many_outputs_as_there_are_labels() -> None:
    result = NewHead()(trained(), Context(task=tasks()[1]))
    head = result[5]
    assert isinstance(head, nn.Linear)
    assert head.weight.shape == (3, 24)
    assert float(head.weight.detach().abs().max()) <= 24**-0.5
    for name in ("1.weight", "3.weight"):
        assert torch.equal(effective(result)[name], effective(trained())[name])
    assert len(applied(result).edits) == 1
    again = NewHead()(trained(), Context(task=tasks()[1]))
    other = NewHead()(trained(), Context(task=tasks()[1], seed=1))
    assert torch.equal(effective(again)["5.weight"], effective(result)["5.weight"])
    assert not torch.equal(effective(other)["5.weight"], effective(result)["5.weight"])


def test_a_head_of_the_right_size_is_filled_where_it_is() -> None:
    result = NewHead()(trained(), Context(task=tasks()[0]))
    assert not applied(result).edits
    assert not torch.equal(effective(result)["5.weight"], effective(trained())["5.weight"])
    with pytest.warns(EspalierWarning, match="10 outputs already"):
        kept = NewHead(fresh=False)(trained(), Context(task=tasks()[0]))
    assert torch.equal(effective(kept)["5.weight"], effective(trained())["5.weight"])


def test_a_pruned_head_keeps_its_zeros_a_coded_one_is_refused() -> None:
    pruned = Prune(sparsity=0.5)(trained(), Context())
    result = NewHead()(pruned, Context(task=tasks()[0]))
    assert not effective(result)["5.weight"][effective(pruned)["5.weight"] == 0].any()
    with pytest.raises(PhaseError, match="new-head"):
        NewHead()(KMeans(bits=3)(trained(), Context()), Context(task=tasks()[0]))
    smaller = NewHead()(pruned, Context(task=tasks()[1]))
    assert slots(smaller)["5.weight"].form is None
    assert isinstance(slots(smaller)["3.weight"].form, Mask)


@pytest.mark.parametrize("name", ["convolution", "two-inputs", "named", "recurrent", "attention", "twice"])
def test_the_head_is_found_in_networks_of_all_kinds(name: str) -> None:
    example = BY_NAME[name]
    model = example.build()
    result = NewHead(classes=5)(model, Context(task=example.task()))
    with torch.no_grad():
        answer = example.task().predict(result.eval(), example.task().example())
    assert (answer["logits"] if isinstance(answer, dict) else answer).shape == (8, 5)


def test_a_convolution_may_be_the_head() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 10, 6), nn.Flatten())
    result = NewHead()(net, Context(task=tasks()[1]))
    assert effective(result)["2.weight"].shape == (3, 4, 6, 6)


def test_a_tied_head_is_left_alone_or_refused() -> None:
    example = BY_NAME["tied"]
    with pytest.warns(EspalierWarning, match="shared by embed.weight, head.weight"):
        NewHead()(example.build(), Context(task=example.task()))
    with pytest.raises(ModelError, match=r"head.*11 outputs.*cannot get 12.*Untie"):
        NewHead(classes=12)(example.build(), Context(task=example.task()))


def test_a_frozen_head_is_left_alone() -> None:
    model = BY_NAME["mlp"].build()
    model[3].requires_grad_(requires_grad=False)
    with pytest.warns(EspalierWarning, match="frozen"):
        NewHead()(model, Context(task=BY_NAME["mlp"].task()))


def test_what_is_no_head_is_refused_by_name() -> None:
    first, second = tasks()
    with pytest.raises(UnknownNameError, match=r"head='6'.*no linear layer"):
        NewHead(head="6")(trained(), Context(task=first))
    with pytest.raises(ModelError, match=r"3, gives 24 features.*hands back 10.*head=path"):
        NewHead(head="3")(trained(), Context(task=second))
    with pytest.raises(ModelError, match="no output layer"):
        NewHead()(nn.Flatten(), Context(task=first))
    with pytest.raises(ModelError, match="whole model is one layer"):
        NewHead(classes=4)(nn.Linear(6, 3), Context(task=BY_NAME["mlp"].task()))
    real = Task(train=[(torch.randn(4, 64), torch.randn(4, 10))], val=[(torch.randn(4, 64), torch.randn(4, 10))])
    with pytest.raises(DataError, match="classes=N"):
        NewHead()(trained(), Context(task=real))


def test_hooks_of_a_replaced_head_are_said() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].register_forward_hook(lambda module, args, output: output)
    with pytest.warns(EspalierWarning, match="hooks of 1 went"):
        NewHead()(model, Context(task=tasks()[1]))


def test_the_recipe_ends_sparse_and_shared_and_knows_the_new_task() -> None:
    result = quick()(trained(), Context(task=tasks()[1]))
    for name in ("1.weight", "3.weight", "5.weight"):
        slot = slots(result)[name]
        assert isinstance(slot.form, Shared)
        assert float((slot.value() == 0).float().mean()) >= 0.7 - 1 / slot.value().numel()
    assert tasks()[1].measure(result, "val").value > 60  # a third of the samples each; four epochs


def test_movement_prunes_while_it_transfers() -> None:
    moving = Prune(criterion=Movement(), schedule=Evenly(), epochs=2, sparsity=0.5, every=5, lr=3e-3)
    result = quick().replace(prune=moving)(trained(), Context(task=tasks()[1]))
    assert float((effective(result)["1.weight"] == 0).float().mean()) >= 0.49


def small() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def test_its_files_hold_the_new_head_and_a_killed_run_resumes(tmp_path: Path) -> None:
    def compress(name: str, **more: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EspalierWarning)
            return es.compress(
                small(), tasks()[1], quick(), out=tmp_path / name, timing_seconds=0, device="cpu", **more
            )  # fmt: skip

    whole = compress("whole")
    x = tasks()[1].example()[0]
    with torch.no_grad():
        alone = es.load(whole.file)(x)
        filled = es.load(tmp_path / "whole" / "model.weights.espalier", into=small()).eval()(x)
    assert alone.shape == (len(x), 3)
    torch.testing.assert_close(alone, filled, atol=1e-4, rtol=1e-4)

    def interrupt(report: Any) -> None:
        if report.path.endswith("02-prune") and report.label == "training" and report.done * 2 > report.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress("cut", listener=interrupt)
    assert compress("cut", resume=True).file.read_bytes() == whole.file.read_bytes()


def test_a_stage_that_decides_the_sparsity_itself_goes_without_strength() -> None:
    with pytest.raises(UsageError, match=r"strength=0.5 sets the sparsity"):
        Transfer(prune=Prune(schedule=Listed()))
    assert Transfer(strength=None, prune=Prune(schedule=Listed())).needs >= {"train", "labels"}
