"""Small networks with every habit a graph must survive, and the three of the benchmarks."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Call = tuple[tuple[Any, ...], dict[str, Any]]


class LeNet300(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Block(nn.Module):
    """CIFAR basic block with the parameter-free shortcut (option A)."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.extra = (outside - inside) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)) if self.extra else x
        return F.relu(out + shortcut)


class ResNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = ((16, 16), (16, 32), (32, 64))
        for number, (inside, outside) in enumerate(widths, 1):
            first = Block(inside, outside, 1 if inside == outside else 2)
            rest = [Block(outside, outside, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


class Fire(nn.Module):
    def __init__(self, inside, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.squeeze(x))
        return torch.cat([self.act(self.one(x)), self.act(self.three(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self):
        super().__init__()
        pool = [nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3)]
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, 2), nn.ReLU(inplace=True), pool[0], Fire(96, 16, 64), Fire(128, 16, 64),
            Fire(128, 32, 128), pool[1], Fire(256, 32, 128), Fire(256, 48, 192), Fire(384, 48, 192),
            Fire(384, 64, 256), pool[2], Fire(512, 64, 256),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(512, 1000, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x):
        return torch.flatten(self.classifier(self.features(x)), 1)


class TwoInputs(nn.Module):
    """Keyword input, a constant argument, a class token, constants, a non-persistent buffer, in-place writes."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2)
        self.register_buffer("position", torch.randn(4), persistent=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x, flag=True, y=None):
        h = torch.cat([self.token.expand(x.size(0), -1, -1), x.reshape(x.size(0), -1, 4)], 1)
        h = self.act(self.fc(h))
        h += x.mean()
        h[:, 0] *= 2
        h = h * self.position + torch.tensor(3.0)
        return self.drop(self.bn(h.transpose(1, 2))) + y, None, 3


class Dicts(nn.Module):
    """Dict in, dict out, tied weights, masks, indexing, sizes that follow from the batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch):
        h = self.head(self.embed(batch["ids"]))
        n, t, c = h.shape
        h = h.masked_fill(batch["mask"].unsqueeze(-1) == 0, float("-inf")).softmax(-1)
        triangle = torch.tril(torch.ones(t, t, dtype=torch.bool))
        best, where = h.max(-1)
        return {
            "attention": torch.einsum("btc,bsc->bts", h, h).masked_fill(~triangle, 0.0),
            "best": (best, where),
            "picked": h[:, [0, 2]],
            "rows": h.view(n * t, c).split([4, 6], 1)[1],
            "filled": torch.full((n, 2), 1.5) + n,
            "unit": F.normalize(h, dim=-1),
            "resized": F.interpolate(h.unsqueeze(1), scale_factor=2, mode="bilinear"),
            "rest": [
                1 - h,
                2 / h.clamp(min=0.1),
                2**h,
                h.std(1),
                (h > 0.1).float(),
                h.unbind(1)[0],
                torch.roll(h, 1, 1),
            ],
        }


class Shared(nn.Module):
    """One layer used twice, a residual sum, a concatenation, a named tuple."""

    result = namedtuple("result", "first second")

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        h = self.fc(x)
        h = x + self.fc(h)
        return self.result(torch.cat([h, x], 1), h.sum())


class Convolutions(nn.Module):
    """Depthwise, grouped, same-padded, transposed, 1-d and 3-d convolutions and the norms."""

    def __init__(self):
        super().__init__()
        self.depth = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.same = nn.Conv2d(8, 6, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(6, 6, 3, 2, 1, 1, groups=2)
        self.norm, self.instance, self.act = nn.GroupNorm(2, 6), nn.InstanceNorm2d(6, affine=True), nn.PReLU()
        self.line, self.cube = nn.Conv1d(6, 3, 3), nn.Conv3d(1, 2, 3, padding=1)
        self.layer, self.drop = nn.LayerNorm(10), nn.Dropout2d(0.5)
        self.overlap, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1, ceil_mode=True, count_include_pad=False)

    def forward(self, x):
        h = self.act(self.instance(self.norm(self.up(self.same(self.depth(x))))))
        a, b = h.chunk(2, 1)
        h = torch.cat([torch.relu(a), b], 1)
        h[:, 1:2] = h[:, :1]
        line = self.line(h.flatten(2)[:, :, :12])
        return self.layer(line), self.cube(h[:, None]).mean((2, 3, 4)), self.drop(self.average(self.overlap(h)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 3, 2, batch_first=True, dropout=0.3, bidirectional=True)
        self.gru, self.rnn = nn.GRU(6, 3, batch_first=True), nn.RNN(3, 2, batch_first=True)

    def forward(self, x):
        return self.rnn(self.gru(self.lstm(x)[0])[0])[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, 0.1, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        out, weights = self.attention(x, x, x)
        return self.head(out.mean(1)), weights


def _images(*shape: int) -> Callable[[int], Call]:
    return lambda batch: ((torch.randn(batch, *shape),), {})


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Call]]] = {
    "lenet5": (LeNet5, _images(1, 28, 28)),
    "resnet8": (lambda: ResNet(1), _images(3, 32, 32)),
    "two-inputs": (TwoInputs, lambda b: ((torch.randn(b, 4, 8), True), {"y": torch.randn(b, 1, 1)})),
    "dicts": (Dicts, lambda b: (({"ids": torch.randint(0, 10, (b, 5)), "mask": torch.ones(b, 5)},), {})),
    "shared": (Shared, _images(6)),
    "convolutions": (Convolutions, _images(4, 5, 5)),
    "recurrent": (Recurrent, _images(5, 4)),
    "attention": (Attention, _images(5, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), _images(5, 8)),
    "bare-linear": (lambda: nn.Linear(3, 4), _images(3)),
}
