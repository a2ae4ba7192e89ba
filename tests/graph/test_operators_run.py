"""Every operator of the table as torch users write it: traced, stored, reloaded and run against eager."""

from __future__ import annotations

import pytest
import torch
from tests.graph.support import assert_same, reloaded, runner_of
from torch import nn
from torch.nn import functional as F

from espalier.graph import TABLE, trace

UNARY = (
    *("exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "square", "sin", "cos", "tan"),
    *("asin", "acos", "atan", "sinh", "cosh", "asinh", "atanh", "tanh", "sigmoid", "abs", "sign", "floor", "ceil"),
    *("round", "trunc", "frac", "erf", "erfc", "neg"),
)
# x: (batch, 4, 6, 6) positive, y: (batch, 4, 6, 6) of either sign, i: (batch, 3) integers in 0..2
CALLS = {
    "arithmetic": lambda x, y, i: [
        x + y, x + 2, 2 - x, x - y, torch.sub(x, y, alpha=3), torch.add(x, y, alpha=0.5), torch.rsub(x, y, alpha=2),
        x * y, x / 3, x // 0.3, torch.div(x, 0.3, rounding_mode="trunc"), y % 0.7, x**2, 2**x, x**x, -x, torch.lerp(x,
        y, 0.3), torch.addcmul(x, y, y, value=2), torch.addcdiv(x, y, x, value=0.1), torch.fmod(y, 0.3),
        torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y), torch.min(x, y), torch.atan2(x, y), 1 / x,
        torch.floor_divide(x, 0.3), torch.true_divide(x, y), x.remainder(0.3),
    ],
    "logic": lambda x, y, i: [
        x == y, x != y, x < y, x <= 0.5, x > y, x >= 0.5, (x > 0.5) & (y > 0), (x > 0.5) | (y > 0),
        (x > 0.5) ^ (y > 0), ~(x > 0.5), torch.logical_and(x > 0.5, y > 0), torch.logical_or(x > 0.5, y > 0),
        torch.logical_not(x > 0.5), torch.logical_xor(x > 0.5, y > 0), torch.where(y > 0, x, y), torch.where(y > 0, x,
        0.5), torch.where(y > 0, 1.0, x), y.masked_fill(y > 0, float("-inf")), torch.isnan(y), torch.isinf(y),
        torch.isfinite(y), torch.nan_to_num(y / 0.0), (y > 0).any(), (y > 0).any(1), (y > 0).all(-1, keepdim=True),
        (y > 0).all(), (y > 0).to(torch.int64), y.clamp(-1), y.clamp(max=0.5), y.clamp(-0.2, 0.3), y.clamp_min(0.1),
        torch.clamp(y, x - 1, x), i & 1, i | 2, i ^ 1,
    ],
    "functions": lambda x, y, i: [
        *(getattr(torch, name)(x * 0.9) for name in UNARY), torch.acosh(x + 1), y.abs().norm(), y.norm(dim=1),
        y.norm(1, dim=(1, 2), keepdim=True), torch.linalg.vector_norm(y, 3, (2,)), F.cosine_similarity(x, y),
        F.normalize(y, dim=-1), torch.cumsum(y, 1), torch.cumprod(y, -1), torch.logsumexp(y, (1, 2)),
    ],
    "activations": lambda x, y, i: [
        F.relu(y), F.relu6(4 * y), F.leaky_relu(y), F.leaky_relu(y, 0.2), F.elu(y), F.elu(y, 0.5), F.selu(y),
        F.celu(y, 0.7), F.gelu(y), F.gelu(y, approximate="tanh"), F.silu(y), F.mish(y), F.hardswish(y),
        F.hardsigmoid(y), F.hardtanh(y), F.hardtanh(y, -0.5, 0.2), F.softplus(y), F.softplus(y, 2, 5),
        F.logsigmoid(y), F.threshold(y, 0.1, 20), F.hardshrink(y), F.softshrink(y, 0.2), F.glu(y, 1), F.softmax(y, 1),
        F.log_softmax(y, -1), F.softsign(y), F.tanhshrink(y), F.prelu(y, torch.full((4,), 0.1)), F.softmin(y, 1),
    ],
    "moving": lambda x, y, i: [
        y.reshape(y.shape[0], -1), y.view(-1, 6), y.flatten(1), y.flatten(1, 2), y.unflatten(1, (2, 2)), y.permute(0,
        2, 3, 1), y.transpose(1, -1), y.swapaxes(1, 2), y.movedim(1, -1), y[:, :1].squeeze(1), y[:, :1].squeeze(),
        y.unsqueeze(-1), y[:, :1].expand(-1, 5, 6, 6), y[:, :1].expand_as(y), y.repeat(1, 2, 1, 1), y.tile(2),
        y.repeat_interleave(2, 1), y.roll(1, 2), y.roll((1, 2), (1, 2)), y.flip(1), F.pad(y, (1, 2)), F.pad(y, (1, 1,
        1, 1), value=2.0), F.pad(y, (1, 1, 1, 1), "reflect"), F.pad(y, (1, 1, 1, 1), "replicate"), F.pad(y, (1, 1, 1,
        1), "circular"), F.pixel_shuffle(y, 2), F.pixel_unshuffle(y, 2), nn.ChannelShuffle(2)(y), y.unfold(2, 3, 2),
        F.unfold(y, 3), F.fold(F.unfold(y, 3), (6, 6), 3), y.tril(), y.triu(1), y.diagonal(0, 2, 3), y.mT, y[0,
        0].t(), y.view_as(x), y.broadcast_to(2, *y.shape), torch.atleast_2d(y), torch.outer(x[0, 0, 0], y[0, 0, 0]),
    ],
    "picking": lambda x, y, i: [
        torch.cat([x, y], 1), torch.stack([x, y], -1), *y.split(2, 1), *y.split([1, 3], 1), *y.chunk(3, 2),
        *y.unbind(1), y[:, 1:3], y[:, ::2, -2:], y[:, 1], y[..., -1], y.narrow(1, 1, 2), y[:, [0, 2]], y[:,
        torch.tensor([1, 0])], y.index_select(1, torch.tensor([3, 0])), y[:, :3, 0, 0].gather(1, i),
        torch.take_along_dim(y[0], y[0].argsort(0), 0), F.one_hot(i, 5), y[:, i[0]], torch.select_scatter(y, x[:, 0], 1,
        2), torch.slice_scatter(y, x[:, :2], 1, 1, 3), *torch.meshgrid(y[0, 0, 0], y[0, 0, 1], indexing="xy"), y[:,
        None], y.select(1, 2), *torch.meshgrid(y[0, 0, 0], y[0, 0, 1], indexing="ij"), torch.hstack([x, y]),
        torch.vstack([x, y]),
        y[:, :3, 0, 0].scatter(1, i, x[:, :3, 0, 0]), y[:, :3, 0, 0].scatter(1, i, 2.0),
        y[:, :, 0, 0].scatter_add(1, i, x[:, :3, 0, 0]),
        y.index_add(1, torch.tensor([0, 2]), x[:, :2]), y.index_put((torch.tensor([0]),), x[:1]),
        y[y.shape[0] - 1],
    ],
    "making": lambda x, y, i: [
        torch.zeros(2, 3) + y[0, 0, 0, 0], torch.ones(2, dtype=torch.int64) + i[0, 0], torch.full((2,), 0.5) + y[0, 0,
        0, 0], torch.arange(6) + y, torch.arange(1, 13, 2) * y, torch.linspace(0, 1, 6) + y, torch.eye(6) @ y,
        torch.zeros_like(y) + x, torch.ones_like(y, dtype=torch.float64), torch.full_like(y, 3), y.new_zeros(2),
        y.new_ones((2, 2)), y.new_full((2,), 7.0), torch.tensor(2.0) * y, torch.scalar_tensor(3.0) + y, y.double(),
        y.half().float(), y.type_as(i), y.to(torch.bfloat16), y.clone().fill_(2.0),
    ],
    "pooling": lambda x, y, i: [
        F.max_pool1d(y[:, 0], 2), F.max_pool2d(y, 2), F.max_pool2d(y, 3, 2, 1, ceil_mode=True), *F.max_pool2d(y, 2, 1,
        return_indices=True), F.max_pool3d(y, 2), F.avg_pool1d(y[:, 0], 2), F.avg_pool2d(y, 3, 2, 1), F.avg_pool2d(y,
        2, divisor_override=3), F.avg_pool3d(y, 2), F.adaptive_avg_pool1d(y[:, 0], 2), F.adaptive_avg_pool2d(y, (3,
        1)), F.adaptive_avg_pool3d(y, 2), F.adaptive_max_pool1d(y[:, 0], 2), F.adaptive_max_pool2d(y, 3),
        F.lp_pool2d(x, 2, 2), F.adaptive_avg_pool2d(y, 1),
    ],
    "resizing": lambda x, y, i: [
        F.interpolate(y[:, 0], 9), F.interpolate(y, scale_factor=2), F.interpolate(y, (4, 9)), F.interpolate(y[:,
        None], scale_factor=2), F.interpolate(y[:, 0], 9, mode="linear"), F.interpolate(y, scale_factor=1.5,
        mode="bilinear"), F.interpolate(y, (4, 4), mode="bilinear", align_corners=True), F.interpolate(y,
        scale_factor=2, mode="bicubic"), F.interpolate(y[:, None], (4, 4, 4), mode="trilinear"), F.grid_sample(y, y[:,
        :2].permute(0, 2, 3, 1), align_corners=False),
    ],
    "reducing": lambda x, y, i: [
        y.mean(), y.mean((2, 3)), y.mean(1, keepdim=True), y.sum(), y.sum(1), y.sum(1, dtype=torch.float64), y.prod(),
        y.prod(1), y.amax((1, 2)), y.amin(1), y.max(), y.min(), *y.max(1), *y.min(-1, keepdim=True), y.argmax(1),
        y.argmin(), y.var(1), y.var(1, unbiased=False), y.var(), y.std((1, 2)), y.std(1, correction=0), *y.topk(2, 1),
        *y.sort(1, descending=True), y.argsort(1),
    ],
    "products": lambda x, y, i: [
        x @ y, torch.bmm(x[:, 0], y[:, 0]), torch.mm(x[0, 0], y[0, 0]), torch.mv(x[0, 0], y[0, 0, 0]), torch.dot(x[0,
        0, 0], y[0, 0, 0]), torch.addmm(x[0, 0], x[0, 1], y[0, 1], beta=0.5, alpha=2), torch.baddbmm(x[:, 0], x[:, 1],
        y[:, 1]), torch.einsum("bchw,bcwk->bhk", x, y), F.scaled_dot_product_attention(x, y, x),
        F.scaled_dot_product_attention(x, y, x, is_causal=True), F.scaled_dot_product_attention(x, y, x,
        attn_mask=y[:, :, :, :1] + 0 * y, scale=0.3), F.bilinear(x, y, torch.ones(2, 6, 6)), F.linear(x, torch.ones(3,
        6)), F.embedding(i, torch.eye(5)),
    ],
    "norms": lambda x, y, i: [
        F.layer_norm(y, (6,)), F.layer_norm(y, (6, 6), eps=0.1), F.group_norm(y, 2), F.instance_norm(y), F.rms_norm(y,
        (6,)), F.batch_norm(y, torch.zeros(4), torch.ones(4)), F.batch_norm(y, torch.zeros(4), torch.ones(4),
        torch.ones(4) * 2, torch.ones(4)), F.local_response_norm(y, 2), F.rms_norm(y, (6,), torch.ones(6), 0.1),
    ],
    "quantizing": lambda x, y, i: [
        torch.fake_quantize_per_tensor_affine(y, torch.tensor(0.05), torch.tensor(3, dtype=torch.int32), 0, 255),
        torch.fake_quantize_per_tensor_affine(y, 0.1, 0, -8, 7),
        torch.tensor([-1.0, 0.0, 2.0])[torch.bucketize(y, torch.tensor([-0.5, 0.5]))],
        torch.bucketize(y, torch.tensor([-0.5, 0.5]), out_int32=True, right=True),
    ],
}  # fmt: skip
NOT_CALLED_HERE = {
    *(
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "lstm",
        "gru",
        "rnn_tanh",
    ),
    *(
        "rnn_relu",
        "scale_shift",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "weight_norm",
        "size",
        "numel",
        "size_add",
    ),
    *("size_sub", "size_mul", "size_div", "size_mod", "size_neg"),
}
SEEN: set[str] = set()


class Calls(nn.Module):
    def __init__(self, family):
        super().__init__()
        self.family = family

    def forward(self, x, y, i):
        return CALLS[self.family](x, y, i)


def inputs(batch):
    return torch.rand(batch, 4, 6, 6) * 0.98 + 0.01, torch.randn(batch, 4, 6, 6), torch.randint(0, 3, (batch, 3))


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_family(family):
    torch.manual_seed(0)
    model = Calls(family).eval()
    graph = trace(model, inputs(2))
    assert reloaded(graph) == graph
    runner = runner_of(model, graph)
    SEEN.update(node.op for node in graph.nodes)
    for batch in (1, 2, 7):
        example = inputs(batch)
        assert_same(runner(*example), model(*example))


def test_the_families_cover_the_table():
    if len(SEEN) < 50:
        pytest.skip("the families above did not run")
    rewritten = set()
    assert set(TABLE) - SEEN - NOT_CALLED_HERE - rewritten == set()
