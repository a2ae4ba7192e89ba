"""One small network per operator pattern that channels pass through, with what must be removable in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Toy:
    """``build``: the network; ``call``: its arguments; ``expected``: (kind, units) of every group, sorted."""

    name: str
    build: Callable[[], nn.Module]
    call: tuple[Any, ...]
    expected: tuple[tuple[str, int], ...]
    boundaries: int = 0


class Net(nn.Module):
    """Layers by keyword; ``forward`` is a function of the network and its inputs."""

    def __init__(self, run: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, nn.Parameter(layer) if isinstance(layer, Tensor) else layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``run(self, *args)``."""
        return self.run(self, *args, **kwargs)


TOYS: list[Toy] = []


def toy(*call: Any, expected: str, boundaries: int = 0) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a builder; ``expected`` such as ``"channels 8, heads 3"``."""
    groups = tuple(sorted((k, int(n)) for k, n in (item.split() for item in expected.split(", ")))) if expected else ()

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def seeded() -> nn.Module:
            torch.manual_seed(0)
            model = build().eval()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
            return model

        TOYS.append(Toy(build.__name__, seeded, call, groups, boundaries))
        return build

    return register


def image(channels: int = 3, size: int = 6) -> Tensor:
    """A batch of two images."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def tokens(width: int = 8, length: int = 5) -> Tensor:
    """A batch of two sequences."""
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(1))


def conv(a: int, b: int, k: int = 3, **more: Any) -> nn.Conv2d:
    """Same-size convolution."""
    return nn.Conv2d(a, b, k, padding=k // 2, **more)


@toy(image(), expected="channels 8, channels 6")
def chain() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.PReLU(6), conv(6, 4))


@toy(image(), expected="channels 8, channels 6")
def residual() -> nn.Module:
    return Net(
        lambda s, x: s.o((y := s.a(x)) + s.c(s.b(y).relu())), a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), o=conv(8, 4)
    )


@toy(image(), expected="channels 6")
def residual_onto_the_input() -> nn.Module:
    return Net(lambda s, x: s.o(x + s.b(s.a(x))), a=conv(3, 6), b=conv(6, 3), o=conv(3, 4))


@toy(image(), expected="channels 8, channels 6")
def concat() -> nn.Module:
    return Net(lambda s, x: s.o(torch.cat([s.a(x), s.b(x)], 1)), a=conv(3, 8), b=conv(3, 6), o=conv(14, 4))


@toy(image(), expected="channels 4, channels 4, channels 4")
def dense_concat() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        x = torch.cat([x, s.b(x)], 1)
        return s.o(torch.cat([x, s.c(x)], 1))

    return Net(run, a=conv(3, 4), b=conv(4, 4), c=conv(8, 4), o=conv(12, 2))


@toy(image(), expected="channels 6")
def concat_with_the_input() -> nn.Module:
    return Net(lambda s, x: s.o(torch.cat([x, s.a(x)], 1)), a=conv(3, 6), o=conv(9, 4))


@toy(image(), expected="channels 6")
def concat_along_height() -> nn.Module:
    return Net(lambda s, x: s.o(torch.cat([s.a(x), s.b(x)], 2)), a=conv(3, 6), b=conv(3, 6), o=conv(6, 4))


@toy(image(), expected="channels 4")
def chunk_and_concat() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x).chunk(2, 1)
        return s.o(torch.cat([b, a], 1))

    return Net(run, a=conv(3, 8), o=conv(8, 4))


@toy(image(), expected="channels 6, channels 3")
def split_with_sizes() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x).split([6, 3], 1)
        return s.o(a) + s.p(b)

    return Net(run, a=conv(3, 9), o=conv(6, 4), p=conv(3, 4))


@toy(image(), expected="channels 5, channels 3")
def slices() -> nn.Module:
    return Net(lambda s, x: s.o((y := s.a(x))[:, :5]) + s.p(y[:, 5:]), a=conv(3, 8), o=conv(5, 4), p=conv(3, 4))


@toy(image(), expected="channels 5")
def gated_linear_unit() -> nn.Module:
    return nn.Sequential(conv(3, 10), nn.GLU(1), conv(5, 4))


@toy(image(4), expected="channels 6, channels 12")
def flatten_to_linear() -> nn.Module:
    return nn.Sequential(conv(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 12), nn.ReLU(), nn.Linear(12, 3))


@toy(image(4), expected="channels 6")
def channels_last_flatten() -> nn.Module:
    return Net(lambda s, x: s.o(s.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)), a=conv(4, 6), o=nn.Linear(216, 3))


@toy(image(4), expected="channels 6, channels 5")
def permute_to_linear() -> nn.Module:
    return Net(
        lambda s, x: s.o(s.l(s.a(x).permute(0, 2, 3, 1)).mean((1, 2))),
        a=conv(4, 6),
        l=nn.Linear(6, 5),
        o=nn.Linear(5, 3),
    )


@toy(torch.randn(2, 7), expected="channels 4")
def linear_to_transposed_convolution() -> nn.Module:
    return Net(lambda s, x: s.o(s.l(x).view(-1, 4, 3, 3)), l=nn.Linear(7, 36), o=nn.ConvTranspose2d(4, 2, 2))


@toy(torch.randn(2, 7), expected="channels 4")
def unflatten() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 36), nn.Unflatten(1, (4, 3, 3)), conv(4, 2))


@toy(tokens(), expected="channels 6")
def product_of_two_activations() -> nn.Module:
    return Net(lambda s, x: s.a(x) @ s.b(x).transpose(1, 2), a=nn.Linear(8, 6), b=nn.Linear(8, 6))


@toy(tokens(), expected="channels 6")
def einsum_of_two_activations() -> nn.Module:
    return Net(lambda s, x: torch.einsum("bnd,bmd->bnm", s.a(x), s.b(x)), a=nn.Linear(8, 6), b=nn.Linear(8, 6))


@toy(tokens(), expected="")
def einsum_that_shows_its_channels() -> nn.Module:
    return Net(lambda s, x: torch.einsum("bnd,bme->bde", s.a(x), s.b(x)), a=nn.Linear(8, 6), b=nn.Linear(8, 4))


@toy(image(), expected="channels 4, channels 3, groups 2")
def grouped_convolution() -> nn.Module:
    return nn.Sequential(conv(3, 8), conv(8, 6, groups=2), conv(6, 4))


@toy(image(), expected="channels 8")
def depthwise_convolution() -> nn.Module:
    return nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 4, 1))


@toy(image(), expected="channels 2, groups 8")
def depth_multiplier() -> nn.Module:
    return nn.Sequential(conv(3, 8), conv(8, 16, groups=8), conv(16, 4, 1))


@toy(image(), expected="channels 8, channels 6")
def transposed_convolution() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), conv(6, 4))


@toy(image(), expected="channels 4, channels 3, groups 2")
def grouped_transposed_convolution() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, groups=2), conv(6, 4))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return y.reshape(*y.shape[:2], -1)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


@toy(tokens(), expected="channels 8, heads 3, width 4, width 4")
def separate_attention() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        x = s.e(x)
        y = s.p(_attend(_heads(s.q(x), 3), _heads(s.k(x), 3), _heads(s.v(x), 3)))
        return s.o(x + y)

    return Net(
        run,
        e=nn.Linear(8, 8),
        q=nn.Linear(8, 12),
        k=nn.Linear(8, 12),
        v=nn.Linear(8, 12),
        p=nn.Linear(12, 8),
        o=nn.Linear(8, 2),
    )


def _fused(layout: tuple[int, ...], order: tuple[int, ...]) -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).reshape(x.shape[0], x.shape[1], *layout).permute(*order).unbind(0)
        return s.p(_attend(q, k, v))

    return Net(run, qkv=nn.Linear(8, 36), p=nn.Linear(12, 3))


@toy(tokens(), expected="heads 3, width 4")
def fused_attention() -> nn.Module:
    return _fused((3, 3, 4), (2, 0, 3, 1, 4))


@toy(tokens(), expected="heads 3, width 4")
def attention_fused_by_head() -> nn.Module:
    return _fused((3, 3, 4), (3, 0, 2, 1, 4))


@toy(tokens(), expected="heads 3, width 4")
def attention_fused_last() -> nn.Module:
    return _fused((3, 4, 3), (4, 0, 2, 1, 3))


@toy(tokens(), expected="heads 2, width 3, width 3")
def grouped_query_attention() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        q, k, v = _heads(s.q(x), 4), _heads(s.k(x), 2), _heads(s.v(x), 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        return s.p(y.reshape(x.shape[0], x.shape[1], 12))

    return Net(run, q=nn.Linear(8, 12), k=nn.Linear(8, 6), v=nn.Linear(8, 6), p=nn.Linear(12, 3))


@toy(tokens(), expected="heads 2, width 3, width 3")
def repeated_keys() -> nn.Module:
    def repeat(x: Tensor) -> Tensor:
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, 2, n, d).reshape(b, 2 * h, n, d)

    def run(s: Any, x: Tensor) -> Tensor:
        q, k, v = _heads(s.q(x), 4), repeat(_heads(s.k(x), 2)), repeat(_heads(s.v(x), 2))
        y = torch.softmax(q @ k.transpose(2, 3) / 3**0.5, -1) @ v
        return s.p(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 12))

    return Net(run, q=nn.Linear(8, 12), k=nn.Linear(8, 6), v=nn.Linear(8, 6), p=nn.Linear(12, 3))


@toy(tokens(), expected="channels 12, heads 3, width 4")
def multihead_attention_module() -> nn.Module:
    return Net(
        lambda s, x: s.o((y := s.e(x)) + s.m(y, y, y, need_weights=False)[0]),
        e=nn.Linear(8, 12), m=nn.MultiheadAttention(12, 3, batch_first=True), o=nn.Linear(12, 2),
    )  # fmt: skip


@toy(tokens(), expected="channels 12, channels 10, heads 3, width 4")
def transformer_encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 10, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(8, 12), layer, nn.Linear(12, 2))


@toy(tokens(8, 5), tokens(8, 4), expected="heads 3, width 4, width 4")
def cross_attention() -> nn.Module:
    def run(s: Any, x: Tensor, y: Tensor) -> Tensor:
        return s.p(_attend(_heads(s.q(x), 3), _heads(s.k(y), 3), _heads(s.v(y), 3)))

    return Net(run, q=nn.Linear(8, 12), k=nn.Linear(8, 12), v=nn.Linear(8, 12), p=nn.Linear(12, 3))


@toy(tokens(), expected="channels 12, channels 10")
def layer_norms() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 10), nn.RMSNorm(10), nn.Linear(10, 2))


@toy(image(), expected="channels 4, groups 2")
def group_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.ReLU(), conv(8, 4))


@toy(image(), expected="channels 8")
def instance_norm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 4))


@toy(torch.randn(4, 7), expected="channels 8")
def batch_norm_of_vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@toy(image(), expected="channels 8")
def standardised_weights() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        w = F.batch_norm(s.w.reshape(1, 8, -1), None, None, training=True).reshape_as(s.w)
        return s.o(F.conv2d(x, w, padding=1))

    return Net(run, w=torch.randn(8, 3, 3, 3), o=conv(8, 4))


@toy(image(), expected="channels 3")
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.PixelShuffle(2), conv(3, 4))


@toy(image(), expected="channels 5")
def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(conv(3, 5), nn.PixelUnshuffle(2), conv(20, 4))


@toy(image(), expected="channels 4, groups 2")
def channel_shuffle() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 4))


@toy(image(), expected="heads 2, width 4")
def channel_shuffle_by_reshape() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        b, c, h, w = y.shape
        return s.o(y.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    return Net(run, a=conv(3, 8), o=conv(8, 4))


@toy(image(), expected="channels 8, channels 4")
def squeeze_and_excite() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        gate = s.up(s.down(y.mean((2, 3))).relu()).sigmoid()
        return s.o(y * gate[:, :, None, None])

    return Net(run, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), o=conv(8, 4))


@toy(tokens(), expected="channels 6, channels 5")
def recurrent() -> nn.Module:
    return Net(
        lambda s, x: s.o(s.r(s.e(x))[0][:, -1]), e=nn.Linear(8, 5), r=nn.RNN(5, 6, batch_first=True), o=nn.Linear(6, 3)
    )


@toy(tokens(), expected="channels 6")
def long_short_term_memory() -> nn.Module:
    return Net(
        lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), o=nn.Linear(12, 3)
    )


@toy(tokens(), expected="channels 6, channels 4")
def projected_lstm() -> nn.Module:
    return Net(lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(8, 6, proj_size=4, batch_first=True), o=nn.Linear(4, 3))


@toy(tokens(), expected="channels 6")
def lstm_of_one_unit() -> nn.Module:
    return Net(
        lambda s, x: s.o(s.r(s.e(x))[0]), e=nn.Linear(8, 6), r=nn.LSTM(6, 1, batch_first=True), o=nn.Linear(1, 3)
    )


@toy(tokens(), expected="channels 6")
def gated_recurrent_unit() -> nn.Module:
    return Net(lambda s, x: s.o(s.r(x)[0]), r=nn.GRU(8, 6, batch_first=True), o=nn.Linear(6, 3))


@toy(image(), expected="channels 6")
def reused_module() -> nn.Module:
    return Net(lambda s, x: s.o(s.c(s.c(s.a(x)).relu())), a=conv(3, 6), c=conv(6, 6), o=conv(6, 4))


@toy(torch.randint(0, 11, (2, 5)), expected="channels 8, channels 6")
def tied_embedding() -> nn.Module:
    head = nn.Linear(8, 11, bias=False)
    net = Net(
        lambda s, x: s.head((y := s.e(x)) + s.b(s.a(y).relu())),
        e=nn.Embedding(11, 8),
        a=nn.Linear(8, 6),
        b=nn.Linear(6, 8),
        head=head,
    )
    head.weight = net.e.weight
    return net


@toy(tokens(), expected="channels 12, channels 6")
def bare_parameters() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = torch.cat([s.token.expand(x.shape[0], -1, -1), s.e(x)], 1) + s.position
        return s.o((y + s.scale * s.b(s.a(y).relu()))[:, 0])

    token, position, scale = torch.randn(1, 1, 12), torch.randn(1, 6, 12), torch.randn(12)
    return Net(run, e=nn.Linear(8, 12), token=token, position=position, scale=scale,
               a=nn.Linear(12, 6), b=nn.Linear(6, 12), o=nn.Linear(12, 3))  # fmt: skip


@toy(image(), expected="channels 8")
def convolution_with_a_bare_weight() -> nn.Module:
    return Net(
        lambda s, x: s.o(F.conv2d(x, s.w, s.b, padding=1)), w=torch.randn(8, 3, 3, 3), b=torch.randn(8), o=conv(8, 4)
    )


@toy(image(), expected="channels 8")
def gate_of_one_channel() -> nn.Module:
    return Net(lambda s, x: s.o((y := s.a(x)) * s.g(y).sigmoid()), a=conv(3, 8), g=conv(8, 1), o=conv(8, 4))


@toy(image(4, 8), expected="channels 4, channels 4, channels 5")
def padded_shortcut() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        y = s.c(s.b(x).relu())
        return s.o(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))

    return Net(run, a=conv(4, 4), b=conv(4, 5, stride=2), c=conv(5, 8), o=conv(8, 3))


@toy(image(), expected="channels 6, channels 5")
def frozen() -> nn.Module:
    return nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 5), nn.ReLU(), conv(5, 2)).requires_grad_(False)


@toy(image(), expected="channels 5", boundaries=1)
def unknown_operator() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = torch.scatter_add(
            s.a(x), 1, torch.zeros(2, 6, 6, 6, dtype=torch.long)[:1].expand(x.shape[0], -1, -1, -1), s.a(x)
        )
        return s.o(s.b(y).relu())

    return Net(run, a=conv(3, 6), b=conv(6, 5), o=conv(5, 2))


@torch.library.custom_op("espalier_tests::halved", mutates_args=())
def halved(x: Tensor, places: list[int], note: str = "") -> tuple[Tensor, Tensor]:
    """An operator of the user's own."""
    return x / 2, x.sum(places)


@halved.register_fake
def _(x: Tensor, places: list[int], note: str = "") -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty([n for k, n in enumerate(x.shape) if k not in places])


# of the one call below
halved.register_autograd(lambda _, a, b: (a / 2 + b[:, :, None, None], None, None))


@toy(image(), expected="channels 7, channels 5", boundaries=1)
def spectrum_between_layers() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.b(s.a(x).relu())
        z = torch.fft.rfft2(y).abs()
        return s.o(s.c(z).relu())

    return Net(run, a=conv(3, 7), b=conv(7, 6), c=conv(6, 5), o=conv(5, 2))


@toy(image(), expected="channels 5", boundaries=2)
def convolution_by_spectra() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        spectrum = torch.fft.fft2(y.to(torch.complex64), norm="ortho") * torch.fft.fft2(s.w, s=y.shape[2:])
        return s.o(s.b(torch.fft.ifft2(spectrum).real).relu())

    return Net(run, a=conv(3, 6), w=torch.randn(6, 3, 3), b=conv(6, 5), o=conv(5, 2))


@toy(image(), expected="channels 7, channels 4", boundaries=1)
def operator_of_the_users_own() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y, z = halved(s.b(s.a(x).relu()), [2, 3], note="here")
        return s.p(s.c(y + z[:, :, None, None]).relu())

    return Net(run, a=conv(3, 7), b=conv(7, 5), c=conv(5, 4), p=conv(4, 2))


@toy(image(), expected="channels 5")
def spectrum_of_the_input() -> nn.Module:
    return Net(lambda s, x: s.o(s.a(torch.view_as_real(torch.fft.fft2(x)).mean(4)).relu()), a=conv(3, 5), o=conv(5, 2))


@toy(image(), expected="channels 5")
def sorted_channels() -> nn.Module:
    return Net(lambda s, x: s.o(s.b(s.a(x).sort(1)[0]).relu()), a=conv(3, 6), b=conv(6, 5), o=conv(5, 2))


@toy(image(), expected="channels 5")
def running_sum() -> nn.Module:
    return Net(lambda s, x: s.o(s.b(s.a(x).cumsum(1)).relu()), a=conv(3, 6), b=conv(6, 5), o=conv(5, 2))


@toy(tokens(), expected="channels 6")
def normalised_vectors() -> nn.Module:
    return Net(lambda s, x: s.o(F.normalize(s.a(x), dim=-1)), a=nn.Linear(8, 6), o=nn.Linear(6, 3))


@toy(image(), expected="channels 6")
def mean_over_channels() -> nn.Module:
    return Net(lambda s, x: s.o((y := s.a(x)) - y.mean(1, keepdim=True)), a=conv(3, 6), o=conv(6, 3))


@toy(tokens(), expected="")
def rotary_halves() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        half = torch.cat([-y[..., 3:], y[..., :3]], -1)
        return y * s.cos + half * s.sin

    return Net(run, a=nn.Linear(8, 6), cos=torch.randn(6), sin=torch.randn(6))


@toy(tokens(), expected="channels 3")
def rotary_halves_read_on() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        half = torch.cat([-y[..., 3:], y[..., :3]], -1)
        return s.o(y * s.cos + half * s.sin)

    return Net(run, a=nn.Linear(8, 6), cos=torch.randn(6), sin=torch.randn(6), o=nn.Linear(6, 2))


@toy(image(), expected="channels 5")
def picked_channels() -> nn.Module:
    return Net(
        lambda s, x: s.o(s.b(s.a(x)[:, torch.tensor([2, 0, 1, 3, 5, 4])]).relu()),
        a=conv(3, 6),
        b=conv(6, 5),
        o=conv(5, 2),
    )


@toy(image(3, 8), expected="channels 6, channels 5")
def encoder_and_decoder() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        a = s.a(x).relu()
        b = F.interpolate(s.b(F.max_pool2d(a, 2)).relu(), scale_factor=2)
        return s.o(torch.cat([a, b], 1))

    return Net(run, a=conv(3, 6), b=conv(6, 5), o=conv(11, 2))


@toy({"image": image(), "vector": torch.randn(2, 4)}, expected="channels 8, channels 6")
def several_inputs_and_outputs() -> nn.Module:
    def run(s: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        y = s.a(batch["image"]).mean((2, 3))
        z = s.v(batch["vector"]).relu()
        return {"classes": s.o(torch.cat([y, z], 1)), "score": s.p(z)}

    return Net(run, a=conv(3, 8), v=nn.Linear(4, 6), o=nn.Linear(14, 3), p=nn.Linear(6, 1))


@toy(image(), expected="channels 6")
def unused_parameters() -> nn.Module:
    return Net(lambda s, x: s.o(s.a(x).relu()), a=conv(3, 6), spare=nn.Linear(4, 4), o=conv(6, 2))


@toy(tokens(), expected="channels 6, channels 4")
def bilinear_layer() -> nn.Module:
    return Net(lambda s, x: s.m(s.a(x), s.b(x)), a=nn.Linear(8, 6), b=nn.Linear(8, 4), m=nn.Bilinear(6, 4, 3))


@toy(image(), expected="channels 6")
def weight_normalised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many models
        return nn.Sequential(torch.nn.utils.weight_norm(conv(3, 6)), nn.ReLU(), conv(6, 2))
