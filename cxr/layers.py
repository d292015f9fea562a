"""The building blocks of the networks.

Images are `[N, 1, R, R]` in [-1, 1]; `w1` and `w2` are the style vectors of structure and disease.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import ops
from cxr.norm import NormReLU


def normal(*shape: int, over: float = 1.0) -> Tensor:
    """Normal numbers, divided by `over`. On the meta device nothing is computed: torch would need a
    second to import what arithmetic without numbers takes."""
    x = torch.empty(*shape)
    return x if x.is_meta else x.normal_() / over


def against_rest(logits: Tensor, target: int) -> Tensor:
    """The log-odds [N] of one class against the rest, of a softmax's logits [N, K]."""
    rest = torch.cat([logits[:, :target], logits[:, target + 1 :]], 1)
    return logits[:, target] - rest.logsumexp(1)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate (Karras et al. 2018, section 4.1).

    `rate` slows learning: the stored weights are 1 / rate times as large as the weights in use.
    """

    def __init__(self, inputs: int, outputs: int, bias: float | None = 0.0, rate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(normal(outputs, inputs, over=rate))
        self.bias = None if bias is None else nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(inputs), rate
        self.made: tuple | None = None  # within `settled`

    def make(self) -> tuple[Tensor, Tensor | None]:
        """The weights and the bias in use."""
        return self.weight * self.scale, None if self.bias is None else self.bias * self.rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *(self.made or self.make()))


class EqualConv(nn.Module):
    """Convolution without bias, with equalised learning rate."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        raw = normal(outputs, inputs, kernel, kernel)
        self.raw = nn.Parameter(raw.to(memory_format=torch.channels_last))
        self.scale = 1 / math.sqrt(inputs * kernel * kernel)
        self.made: tuple | None = None  # within `settled`

    def make(self) -> tuple[Tensor, Tensor]:
        """The weights in use, [O, I, K, K], and the sums [I, O] of their squares over the kernel."""
        weight = self.raw * self.scale
        return weight, weight.square().sum((2, 3)).T

    def weight(self) -> Tensor:
        return self.raw * self.scale if self.made is None else self.made[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), padding=self.raw.shape[2] // 2)


@contextmanager
def settled(network: nn.Module) -> Iterator[None]:
    """Within it, the network's weights stay as they are, so that what its layers make of them is
    made once. A descent on codes asks for it at every step."""
    layers = [m for m in network.modules() if isinstance(m, EqualLinear | EqualConv)]
    with torch.no_grad():
        for layer in layers:
            layer.made = layer.make()
    try:
        yield
    finally:
        for layer in layers:
            layer.made = None


class Mapping(nn.Module):
    """`z` [N, inputs] to `w` [N, width]: leaky ReLU between equalised linear layers.

    It has no biases. Therefore it is positively homogeneous, `M(a z) = a M(z)` for `a >= 0`, and
    `M(0) = 0`: scaling `z` moves along a straight line in style space.
    """

    def __init__(self, inputs: int, width: int, depth: int = 3):
        super().__init__()
        sizes = (inputs,) + (width,) * depth
        self.layers = nn.ModuleList(
            EqualLinear(a, b, bias=None, rate=0.1) for a, b in pairwise(sizes)
        )

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = F.leaky_relu(layer(z), ops.SLOPE) * ops.GAIN
        return z


class Structures(nn.Module):
    """`z1` [N, z1] to `w1` [N, layers, w], distributed like the structures that the encoder finds.

    The mean and the principal components are fitted, not trained. Random lungs therefore have
    structures like real ones (docs/ablations.md).
    """

    def __init__(self, z1: int, layers: int, w: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(layers, w))
        self.register_buffer("components", normal(z1, layers, w, over=math.sqrt(z1)))

    def forward(self, z1: Tensor) -> Tensor:
        return self.mean + torch.tensordot(z1, self.components, 1)  # [N, layers, w]

    @torch.no_grad()
    def fit(self, w1: Tensor) -> None:
        """Fit a Gaussian to structures `w1` [n, layers, w]."""
        if not w1.isfinite().all():  # training has diverged, and the training loop reports it
            return
        self.mean.copy_(w1.mean(0))
        apart = (w1 - self.mean).flatten(1)
        _, size, direction = torch.linalg.svd(apart, full_matrices=False)
        fitted = (size[:, None] * direction / math.sqrt(len(w1) - 1)).unflatten(1, w1.shape[1:])
        n = min(len(fitted), len(self.components))
        self.components.zero_()[:n] = fitted[:n]


class Style(nn.Module):
    """The style of a layer, `A(w1) + B(w2)`. `B` has no bias, so a zero `w2` has no effect."""

    def __init__(self, w: int, width: int):
        super().__init__()
        self.A = EqualLinear(w, width, bias=1.0)
        self.B = EqualLinear(w, width, bias=None)

    def forward(self, w1: Tensor, w2: Tensor) -> Tensor:
        return self.A(w1) + self.B(w2)  # [N, width]


class ModulatedLayer(nn.Module):
    """A 3x3 convolution whose weights all images share, of an input that its style `s` has already
    scaled. One fused operation follows: demodulation, noise, bias, activation, scaling by the next
    layer's style and, at the end of a block, the contribution to the image (Karras et al. 2020,
    section 2.2)."""

    def __init__(self, inputs: int, outputs: int, w: int, up: bool, end: bool):
        super().__init__()
        self.style = Style(w, inputs)
        self.conv = EqualConv(inputs, outputs, 3)
        self.strength = nn.Parameter(torch.zeros(()))  # of the noise, which training may raise
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.image_style = Style(w, outputs) if end else None
        self.image_weight = nn.Parameter(normal(outputs)) if end else None
        self.up = up

    def forward(self, x, s, s_next, eps, w1, w2) -> tuple[Tensor | None, Tensor | None]:
        weight, energy = self.conv.made or self.conv.make()
        d = (s.square() @ energy + 1e-8).rsqrt()  # [N, O]
        if self.up:
            c = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [N, O, 2H + 1, 2W + 1]
        else:
            c = F.conv2d(x, weight, padding=1)  # [N, O, H, W]
        epilogue = (c, d, eps, self.strength, self.bias)
        if self.image_style is None:
            return (ops.fir_mod_act if self.up else ops.mod_act)(*epilogue, s_next), None
        r = self.image_style(w1, w2) * (self.image_weight / math.sqrt(len(self.image_weight)))
        return (ops.fir_mod_act_image if self.up else ops.mod_act_image)(*epilogue, r, s_next)


class DiscriminatorBlock(nn.Module):
    """A residual block that halves the image. Activation and blur are one operation."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv0, self.bias0 = EqualConv(inputs, inputs, 3), nn.Parameter(torch.zeros(inputs))
        self.conv1, self.bias1 = EqualConv(inputs, outputs, 3), nn.Parameter(torch.zeros(outputs))
        self.skip = EqualConv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.act_fir(self.conv0(x), self.bias0)  # [N, I, H / 2, W / 2]
        y = ops.mod_act(self.conv1(y), b=self.bias1)  # [N, O, H / 2, W / 2]
        return (y + self.skip(ops.fir(x, down=2))) * math.sqrt(0.5)


class ResidualBlock(nn.Module):
    """Pre-activation residual block with group normalisation (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm0, self.norm1 = NormReLU(inputs), NormReLU(outputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv1.weight)  # starts as the identity
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(self.norm0(x))
        y = self.conv1(self.norm1(y))
        return y + self.skip(F.avg_pool2d(x, 2) if self.stride == 2 else x)


class Trunk(nn.Sequential):
    """Images [N, 1, R, R] to features [N, channels[-1], R / 2^stages, R / 2^stages]. Each image is
    first normalised to zero mean and unit variance, so that its exposure does not matter."""

    def __init__(self, channels: tuple[int, ...], blocks: int):
        layers: list[nn.Module] = [nn.Conv2d(1, channels[0], 3, padding=1)]
        for inputs, outputs in zip((channels[0], *channels), channels):
            layers += [ResidualBlock(inputs, outputs, stride=2)]
            layers += [ResidualBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
        super().__init__(*layers, NormReLU(channels[-1]))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return super().forward(((x - mean) / (std + 0.01)).to(memory_format=torch.channels_last))
