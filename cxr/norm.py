"""Group normalisation and the ReLU that follows it, as one operation.

Its schema, its reference in plain torch and its autograd formula are as those of `cxr.ops`; there is
a native kernel for the CPU. It can be differentiated once. On GPUs torch's own serve.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import ops

GROUPS = 8


class NormReLU(nn.GroupNorm):
    """`relu(group_norm(x))` of `x` [N, C, H, W] in 8 groups (Wu & He 2018)."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.relu(super().forward(x))
        return torch.ops.cxrgan.norm_relu(x, self.weight, self.bias, self.num_groups, self.eps)[0]


# ---- the reference ----


def _norm_relu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float):
    n, c, height, width = x.shape
    wide = ops.wide(x)
    if not wide.is_contiguous(memory_format=torch.channels_last):
        wide = wide.contiguous()  # torch's takes no third layout
    vectors = weight.to(wide.dtype), bias.to(wide.dtype)
    y, mean, rstd = torch.native_group_norm(wide, *vectors, n, c, height * width, groups, eps)
    return ops.channels_last(y.relu_(), x), mean, rstd


def _per_channel(t: Tensor, weight: Tensor) -> Tensor:
    """Of numbers of groups [N, groups], each channel's [N, C]."""
    return t.repeat_interleave(len(weight) // t.shape[1], 1)


def _norm_relu_bwd(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor):
    """With `n = (x - mean) * rstd`, `g` where the ReLU lets it pass and means E over a group, `dx =
    rstd (w g - E[w g] - n E[w g n])`. This is `a x + b g + c`, where a, b and c follow from the sums
    of `g` and `g n` over each channel."""
    wide, g = ops.wide(x), ops.wide(g)
    groups, pixels = mean.shape[1], x.shape[2] * x.shape[3]
    mean, rstd = (_per_channel(t, weight) for t in (mean, rstd))  # [N, C]
    scale = rstd * weight.to(rstd.dtype)
    shift = bias.to(rstd.dtype) - mean * scale
    y = torch.addcmul(shift[:, :, None, None], wide, scale[:, :, None, None])
    g = torch.ops.aten.threshold_backward(g, y, 0)
    sums = g.sum((2, 3))
    products = ((g * wide).sum((2, 3)) - mean * sums) * rstd
    of_sums, of_products = (
        _per_channel((weight * t / pixels).unflatten(1, (groups, -1)).mean(2), weight)
        for t in (sums, products)
    )
    a, b = -rstd * rstd * of_products, rstd * weight
    c = rstd * (mean * rstd * of_products - of_sums)
    a, b, c = (t[:, :, None, None] for t in (a, b, c))
    dx = torch.addcmul(c, wide, a).addcmul_(g, b)
    return ops.channels_last(dx, x), products.sum(0), sums.sum(0)


# ---- the fakes, autograd ----


def _fake(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float):
    y = torch.empty_like(x, memory_format=torch.channels_last)
    means = (x.new_empty((x.shape[0], groups), dtype=ops.wide_dtype(x)) for _ in "mr")
    return y, *means


def _fake_bwd(g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor):
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, torch.empty_like(weight, dtype=mean.dtype), torch.empty_like(bias, dtype=mean.dtype)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, g, *_):
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.cxrgan.norm_relu_bwd(g, x, weight, bias, mean, rstd)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


def _twice(ctx, *_):
    raise NotImplementedError("norm_relu can be differentiated once only")


ops.register(
    "norm_relu_bwd",
    "(Tensor g, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _norm_relu_bwd,
    _fake_bwd,
    _twice,
)
ops.register(
    "norm_relu",
    "(Tensor x, Tensor weight, Tensor bias, int groups, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _norm_relu,
    _fake,
    _backward,
    _save,
)
