"""Mixup, cutout and resized crops against their formulas."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.train.conftest import image_task, small_net, states_equal
from torch import nn
from torch.nn import functional as F

from espalier.core.callback import Callback
from espalier.core.context import Context
from espalier.core.errors import NeedError, UsageError
from espalier.core.recipe import Recipe
from espalier.core.task import Task
from espalier.train import Crop, Cutout, Finetune, Flip, LabelSmoothing, Mixup, ResizedCrop, Shift, fit
from espalier.train.augmentation import Mixing, augmented, blend

fast = settings(deadline=None, max_examples=40)


@dataclass(frozen=True, kw_only=True)
class Reversed(Mixing):
    """The partner of the first is the last; always the same share."""

    def draw(self, images):
        return torch.arange(len(images) - 1, -1, -1), torch.tensor(0.3)


# --- mixup ---------------------------------------------------------------------------------------


@fast
@given(st.integers(0, 99), st.integers(1, 9), st.floats(0.05, 4.0))
def test_mixup_blends_each_image_with_its_partner(seed: int, n: int, alpha: float) -> None:
    torch.manual_seed(seed)
    images, labels = torch.randn(n, 2, 3, 4), torch.arange(n)
    mixup = Mixup(alpha=alpha)
    torch.manual_seed(seed)
    partner, share = mixup.draw(images)
    assert sorted(partner.tolist()) == list(range(n))
    assert 0 <= float(share) <= 1
    torch.manual_seed(seed)
    found = augmented((images, labels), (mixup,))
    expected = share * images + (1 - share) * images[partner]
    assert torch.allclose(found.batch[0], expected, atol=1e-6)
    assert torch.equal(found.batch[0], found.other[0])
    assert torch.equal(found.batch[1], labels)
    assert torch.equal(found.other[1], partner)
    assert float(found.share) == float(share)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixups_shares_are_beta(alpha: float) -> None:
    torch.manual_seed(0)
    images = torch.zeros(1, 1, 1, 1)
    shares = torch.stack([Mixup(alpha=alpha).draw(images)[1] for _ in range(1500)])
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def captured_loss(net: nn.Module, batch, **options) -> float:
    found = []

    class Take(Callback):
        def loss(self, loop, batch, output, loss):
            found.append(float(loss.detach()))
            return loss

    fit(net, Context(image_task(train=[batch])), epochs=1, callbacks=[Take()], **options)
    return found[0]


@pytest.mark.parametrize("amount", [0.0, 0.2])
def test_mixups_loss_is_the_loss_on_the_blended_label(amount: float) -> None:
    batch = next(iter(image_task().train))
    x, y = batch
    net = small_net()
    with torch.no_grad():
        logits = net(blend(x, torch.arange(15, -1, -1), torch.tensor(0.3)))
    hard = F.one_hot(y, 3).float()
    target = (1 - amount) * (0.3 * hard + 0.7 * hard.flip(0)) + amount / 3
    loss = LabelSmoothing(amount=amount).loss(image_task()) if amount else None
    found = captured_loss(net, batch, augment=(Reversed(),), loss=loss)
    assert found == pytest.approx(float(F.cross_entropy(logits, target)), abs=1e-6)


def test_mixup_goes_with_labels_in_mappings_and_with_probabilities() -> None:
    x, y = torch.randn(4, 1, 3, 3), torch.arange(4)
    found = augmented({"x": x, "labels": y, "scale": torch.tensor(2.0)}, (Flip(), Reversed()))
    assert torch.equal(found.other["labels"], y.flip(0))
    assert torch.equal(found.batch["labels"], y)
    assert found.other["scale"] == 2
    soft = [(x, F.one_hot(y % 3, 3).float()) for x, y in image_task().train]
    fit(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), Context(image_task(train=soft, val=None)), epochs=1,
        augment=(Mixup(),))  # fmt: skip


def test_mixup_learns() -> None:
    context = Context(image_task())
    net = Finetune(epochs=12, lr=0.02, augment=(Mixup(alpha=0.4),))(small_net(norm=True), context)
    assert context.data.measure(net, "val").value > 80


def test_mixup_is_refused_where_there_is_no_class_to_blend() -> None:
    step = Finetune(augment=(Mixup(),))
    assert step.needs == {"train", "labels"}
    assert Finetune(epochs=0, augment=(Mixup(),)).needs == frozenset()
    with pytest.raises(NeedError, match="labels in the batches"):
        step(small_net(), Context(dataclasses.replace(image_task(), target=lambda batch: None)))
    regression = image_task(loss=F.mse_loss, target=lambda batch: F.one_hot(batch[1], 3).float(), val=None)
    with pytest.raises(UsageError, match=r"blends class labels .*float32 of shape \(16, 3\) with the loss mse_loss"):
        step(small_net(), Context(regression))
    with pytest.raises(UsageError, match="blends labels once; got mixup, mixup"):
        Finetune(augment=(Mixup(), Flip(), Mixup()))


# --- cutout --------------------------------------------------------------------------------------


@fast
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0, 1), st.integers(0, 99))
def test_cutout_blanks_one_square(height: int, width: int, size: float, seed: int) -> None:
    """Against brute force: each result is the image without one of the squares around a pixel."""
    torch.manual_seed(seed)
    x = torch.rand(4, 2, height, width) + 1
    kept, side = x.clone(), round(size * min(height, width))
    found = Cutout(size=size)(x)
    assert torch.equal(x, kept)
    for image, before in zip(found, x, strict=True):
        possible = []
        for row in range(height):
            for column in range(width):
                cut = before.clone()
                top, left = row - side // 2, column - side // 2
                cut[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0
                possible.append(cut)
        assert any(torch.equal(image, cut) for cut in possible)


def test_cutout_reaches_every_centre() -> None:
    torch.manual_seed(0)
    holes = (Cutout(size=0.2)(torch.ones(2000, 1, 5, 5)) == 0).flatten(1)
    assert torch.equal(holes.sum(1), torch.ones(2000, dtype=torch.long))
    assert int(holes.sum(0).min()) > 40


# --- resized crop --------------------------------------------------------------------------------


def ramps(n: int, height: int, width: int) -> torch.Tensor:
    """Two channels that say where a pixel is: its column and its row, in pixels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows]).float().expand(n, 2, height, width).contiguous()


@pytest.mark.parametrize(("area", "ratio"), [((0.08, 1.0), (0.75, 4 / 3)), ((0.25, 0.25), (1.0, 1.0))])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_resized_crop_is_a_window_of_the_size_and_shape_asked_for(area, ratio, shape) -> None:
    torch.manual_seed(0)
    height, width = shape
    crops = ResizedCrop(area=area, ratio=ratio)(ramps(300, height, width))
    middle_row, middle_column = crops[:, 0, height // 2], crops[:, 1, :, width // 2]
    wide = (middle_row[:, width // 2 + 1] - middle_row[:, width // 2]) * width  # a ramp stays one: its slope is w / W
    high = (middle_column[:, height // 2 + 1] - middle_column[:, height // 2]) * height
    covered = wide * high / (height * width)
    assert area[0] - 1e-3 <= float(covered.min())
    assert float(covered.max()) <= area[1] + 1e-3
    assert ratio[0] - 1e-2 <= float((wide / high).min())
    assert float((wide / high).max()) <= ratio[1] + 1e-2
    centre = (middle_row[:, width // 2] + middle_row[:, width // 2 - 1]) / 2 + 0.5
    assert bool((centre - wide / 2 >= -1e-3).all())
    assert bool((centre + wide / 2 <= width + 1e-3).all())
    assert float(centre.std()) > 1


def test_resized_crop_of_everything_is_the_image() -> None:
    x = torch.randn(3, 2, 6, 6)
    assert torch.allclose(ResizedCrop(area=(1.0, 1.0), ratio=(1.0, 1.0))(x), x, atol=1e-5)
    tall = ResizedCrop(area=(1.0, 1.0), ratio=(4.0, 4.0))(ramps(1, 6, 6))  # twice as wide as there is room
    assert torch.allclose(tall[0, 0], ramps(1, 6, 6)[0, 0], atol=1e-5)


def test_resized_crop_refuses_ranges_that_fall() -> None:
    with pytest.raises(UsageError, match=r"area must rise from above 0; got \(0.5, 0.2\)"):
        ResizedCrop(area=(0.5, 0.2))
    with pytest.raises(UsageError, match="area must rise from above 0"):
        ResizedCrop(area=(0.0, 0.2))
    with pytest.raises(UsageError, match="ratio must rise"):
        ResizedCrop(ratio=(2.0, 1.0))


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [Crop(), Flip(), Shift(), ResizedCrop()], ids=lambda part: part.id)
def test_labels_with_a_place_in_the_image_are_refused_where_pixels_move(part) -> None:
    x = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    for y in (torch.zeros(2, 6, 6, dtype=torch.long), x, {"mask": x > 0}):
        with pytest.raises(
            UsageError, match=rf"train\.{part.id} moves the pixels.*\(2, 1, 6, 6\).*leave {part.id} out"
        ):
            part.check(Task(train=[(x, y)]))
    part.check(Task(train=[(x, torch.zeros(2, 3, 3))]))
    part.check(Task(train=[(x, torch.zeros(2, 6))]))
    part.check(Task(train=[x], target=lambda batch: (batch > 0).float()))  # follows the image
    Cutout().check(Task(train=[(x, x)]))


def test_they_travel_in_a_recipe_and_draw_from_the_loops_seeds_only() -> None:
    augment = "[mixup, {cutout: {size: 0.3}}, {resized-crop: {area: [0.5, 1.0]}}]"
    (step,) = Recipe.from_yaml(f"steps: [{{train.finetune: {{epochs: 2, augment: {augment}}}}}]").steps
    assert isinstance(step, Finetune)
    assert step.augment == (Mixup(), Cutout(size=0.3), ResizedCrop(area=(0.5, 1.0)))
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(step(small_net(), Context(image_task())))
    assert states_equal(*nets)
