"""Classifier, Encoder, Generator and Discriminator, each beside the frozen config that rebuilds it.

Images are `[N, 1, R, R]` in [-1, 1]. `z1` is the lung structure, `z2 = dose * u` the disease, `u`
on the unit sphere; `w1` and `w2` are their style vectors.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import ops
from cxr.group_norm import GroupNorm


@dataclass(frozen=True)
class ClassifierConfig:
    channels: tuple[int, ...] = (32, 64, 96, 160)  # one stage each, halving the image before it
    blocks: int = 2  # residual blocks per stage
    dropout: float = 0.2


@dataclass(frozen=True)
class EncoderConfig:
    channels: tuple[int, ...]  # one stage each, from size / 2 down to 4 x 4
    layers: int  # of the generator: each gets its own `w1`
    w: int = 128
    z2: int = 16


@dataclass(frozen=True)
class GeneratorConfig:
    channels: tuple[int, ...]  # at 4, 8, ..., size
    z1: int = 128
    z2: int = 16
    w: int = 128
    convs: int = 1  # per block
    noisy: int = 32  # pixels of the largest layers that get noise: on larger ones it is film grain

    @property
    def layers(self) -> int:
        return 1 + self.convs * (len(self.channels) - 1)


@dataclass(frozen=True)
class DiscriminatorConfig:
    channels: tuple[int, ...]  # at size, ..., 8, 4
    group: int = 4  # images over which the minibatch standard deviation is taken


@dataclass(frozen=True)
class Preset:
    size: int
    classifier: ClassifierConfig
    encoder: EncoderConfig
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig


def _preset(
    up: tuple[int, ...],
    classifier: ClassifierConfig,
    encoder: tuple[int, ...],
    w: int = 128,
    convs: int = 1,
) -> Preset:
    """`up`: the generator's channels at 4, 8, ..., size; the discriminator mirrors them."""
    generator = GeneratorConfig(up, z1=w, w=w, convs=convs)
    return Preset(
        size=2 ** (len(up) + 1),
        classifier=classifier,
        encoder=EncoderConfig(encoder, generator.layers, w),
        generator=generator,
        discriminator=DiscriminatorConfig(up[::-1]),
    )


PRESETS = {
    "tiny": _preset((32, 32, 24, 16), ClassifierConfig((16, 24, 32), 1), (16, 24, 32), w=32),
    "cxr32": _preset((96, 96, 64, 40), ClassifierConfig((16, 32, 64), 1), (32, 64, 96), w=96),
    "cxr64": _preset((256, 192, 128, 96, 48), ClassifierConfig(), (32, 64, 128, 192)),
    "cxr128": _preset(  # cxr64 with a stage more, so that it can begin with its weights
        (256, 192, 128, 96, 48, 32),
        ClassifierConfig((32, 32, 64, 96, 160)),
        (32, 32, 64, 128, 192),
    ),
    "cxr256": _preset(
        (384, 384, 256, 192, 128, 64, 32),
        ClassifierConfig((48, 96, 128, 192, 256)),
        (32, 64, 96, 128, 192, 256),
        w=256,
        convs=2,
    ),
}


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate (Karras et al. 2018, section 4.1).

    `rate` slows learning: the stored weights are larger by 1 / rate than the ones used.
    """

    def __init__(self, inputs: int, outputs: int, bias: float | None = 0.0, rate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = None if bias is None else nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias * self.rate
        return F.linear(x, self.weight * self.scale, bias)


class EqualConv(nn.Module):
    """Convolution without bias, with equalised learning rate."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        raw = torch.randn(outputs, inputs, kernel, kernel)
        self.raw = nn.Parameter(raw.to(memory_format=torch.channels_last))
        self.scale = 1 / math.sqrt(inputs * kernel * kernel)

    def weight(self) -> Tensor:
        return self.raw * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), padding=self.raw.shape[2] // 2)


class Mapping(nn.Module):
    """`z` [N, inputs] to `w` [N, width]: leaky ReLU between equalised linear layers.

    It has no biases and so is positively homogeneous, `M(a z) = a M(z)` for `a >= 0`, and
    `M(0) = 0`: scaling `z` walks a straight line in style space.
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
    """The Gaussian of the structures that an encoder finds, `z1` [N, z1] to `w1` [N, layers, w].

    Its mean and principal components are fitted, not trained, so that random lungs have structures
    such as real ones have (benchmarks/trials.md).
    """

    def __init__(self, z1: int, layers: int, w: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(layers, w))
        self.register_buffer("components", torch.randn(z1, layers, w) / math.sqrt(z1))

    def forward(self, z1: Tensor) -> Tensor:
        return self.mean + torch.tensordot(z1, self.components, 1)  # [N, layers, w]

    @torch.no_grad()
    def fit(self, w1: Tensor) -> None:
        """Become the Gaussian of `w1` [n, layers, w]."""
        if not w1.isfinite().all():  # training has diverged, and its loop says so
            return
        self.mean.copy_(w1.mean(0))
        apart = (w1 - self.mean).flatten(1)
        _, size, direction = torch.linalg.svd(apart, full_matrices=False)
        found = (size[:, None] * direction / math.sqrt(len(w1) - 1)).unflatten(1, w1.shape[1:])
        n = min(len(found), len(self.components))
        self.components.zero_()[:n] = found[:n]


class Style(nn.Module):
    """A layer's style, `A(w1) + B(w2)`; `B` has no bias, so a zero `w2` leaves no trace."""

    def __init__(self, w: int, width: int):
        super().__init__()
        self.A = EqualLinear(w, width, bias=1.0)
        self.B = EqualLinear(w, width, bias=None)

    def forward(self, w1: Tensor, w2: Tensor) -> Tensor:
        return self.A(w1) + self.B(w2)  # [N, width]


class ModulatedLayer(nn.Module):
    """A shared 3x3 convolution of an input already scaled by its style `s`, then one fused
    epilogue: demodulation, noise, bias, activation and the next layer's style; at the end of a
    block also the activation's contribution to the image (Karras et al. 2020, section 2.2)."""

    def __init__(self, inputs: int, outputs: int, w: int, up: bool, end: bool):
        super().__init__()
        self.style = Style(w, inputs)
        self.conv = EqualConv(inputs, outputs, 3)
        self.strength = nn.Parameter(torch.zeros(()))  # noise comes in as it is needed
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.image_style = Style(w, outputs) if end else None
        self.image_weight = nn.Parameter(torch.randn(outputs)) if end else None
        self.up = up

    def forward(self, x, s, s_next, eps, w1, w2) -> tuple[Tensor | None, Tensor | None]:
        weight = self.conv.weight()
        d = (s.square() @ weight.square().sum((2, 3)).T + 1e-8).rsqrt()  # [N, O]
        if self.up:
            c = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [N, O, 2H + 1, 2W + 1]
        else:
            c = F.conv2d(x, weight, padding=1)  # [N, O, H, W]
        epilogue = (c, d, eps, self.strength, self.bias)
        if self.image_style is None:
            return (ops.fir_mod_act if self.up else ops.mod_act)(*epilogue, s_next), None
        r = self.image_style(w1, w2) * (self.image_weight / math.sqrt(len(self.image_weight)))
        return (ops.fir_mod_act_image if self.up else ops.mod_act_image)(*epilogue, r, s_next)


class Generator(nn.Module):
    """Style-based generator `(w1, z2, noise) -> image` with skip connections to the image."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.structure = Structures(config.z1, config.layers, config.w)
        self.disease = Mapping(config.z2, config.w)
        self.const = nn.Parameter(torch.randn(1, config.channels[0], 4, 4))
        self.layers, inputs = nn.ModuleList(), config.channels[0]
        for block, outputs in enumerate(config.channels):
            convs = config.convs if block else 1
            for i in range(convs):
                up, end = block > 0 and i == 0, i == convs - 1
                self.layers.append(ModulatedLayer(inputs, outputs, config.w, up, end))
                inputs = outputs
        self.image_bias = nn.Parameter(torch.zeros(()))
        self.detailed = min(2, len(config.channels) - 3)  # the block that a detail is added after

    def M1(self, z1: Tensor) -> Tensor:
        """`z1` [N, z1] to `w1` [N, layers, w]; only the direction of `z1` counts."""
        return self.structure(F.normalize(z1) * math.sqrt(z1.shape[1]))

    def M2(self, z2: Tensor) -> Tensor:
        """`z2` [N, z2] to `w2` [N, w]; zero for zero, and homogeneous."""
        return self.disease(z2 * math.sqrt(z2.shape[1]))

    def noise(self, n: int, rng: torch.Generator | None = None) -> list[Tensor]:
        """Unit Gaussian noise, [n, 1, H, W] per layer, drawn on the CPU; fixed along a path. Zeros
        for layers larger than `noisy`."""
        noise, size = [], 4
        for layer in self.layers:
            size *= 2 if layer.up else 1
            eps = torch.zeros(n, 1, size, size)
            if size <= self.config.noisy:
                eps.normal_(generator=rng)
            noise.append(eps.to(self.const.device))
        return noise

    def detail(self, n: int) -> Tensor:
        """A zero detail [n, C, S, S]: of 16 pixels, or R / 4 if that is less. A finer one would
        hold the texture by which classes differ, at every dose (benchmarks/trials.md)."""
        size = 4 * 2**self.detailed
        return torch.zeros(n, self.config.channels[self.detailed], size, size).to(self.const.device)

    def forward(
        self, w1: Tensor, z2: Tensor, noise: list[Tensor], detail: Tensor | None = None
    ) -> Tensor:
        """Images [N, 1, R, R], not clipped, from `w1` [N, layers, w].

        `detail` is added to the features of its size: what an inversion found in an image and no
        `w1` holds (the space F/W+ of Kang, Kim & Cho 2021, BDInvert).
        """
        w1, w2 = w1.unbind(1), self.M2(z2)
        styles = [layer.style(w, w2) for layer, w in zip(self.layers, w1)] + [None]
        x = (self.const * styles[0][:, :, None, None]).to(memory_format=torch.channels_last)
        image = None
        for i, layer in enumerate(self.layers):
            if detail is not None and i == 1 + self.detailed * self.config.convs:
                x = x + detail
            x, grey = layer(x, styles[i], styles[i + 1], noise[i], w1[i], w2)
            if grey is not None:
                image = grey if image is None else ops.fir(image, up=2) + grey  # [N, 1, H, W]
        return image + self.image_bias


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the image; activation and blur are one op."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv0, self.bias0 = EqualConv(inputs, inputs, 3), nn.Parameter(torch.zeros(inputs))
        self.conv1, self.bias1 = EqualConv(inputs, outputs, 3), nn.Parameter(torch.zeros(outputs))
        self.skip = EqualConv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.act_fir(self.conv0(x), self.bias0)  # [N, I, H / 2, W / 2]
        y = ops.mod_act(self.conv1(y), b=self.bias1)  # [N, O, H / 2, W / 2]
        return (y + self.skip(ops.fir(x, down=2))) * math.sqrt(0.5)


class Discriminator(nn.Module):
    """`(image, dose) -> realness`, conditioned on the dose by projection (Miyato & Koyama 2018).

    The minibatch standard deviation (Karras et al. 2018, section 3) is taken over consecutive
    groups, so that a batch cut between groups gives the same answer.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config, channels = config, config.channels
        self.stem, self.stem_bias = (
            EqualConv(1, channels[0], 3),
            nn.Parameter(torch.zeros(channels[0])),
        )
        self.blocks = nn.ModuleList(map(DiscriminatorBlock, channels, channels[1:]))
        width = channels[-1]
        self.conv, self.bias = EqualConv(width + 1, width, 3), nn.Parameter(torch.zeros(width))
        self.hidden = EqualLinear(width * 16, width)
        self.score = EqualLinear(width, 1)
        self.embed = nn.Sequential(
            EqualLinear(2, 64), nn.LeakyReLU(ops.SLOPE), EqualLinear(64, width)
        )

    def forward(self, x: Tensor, dose: Tensor) -> Tensor:
        """Logit [N] of being real, for images [N, 1, R, R] of doses [N] in [0, 1]."""
        x = ops.mod_act(self.stem(x.to(memory_format=torch.channels_last)), b=self.stem_bias)
        for block in self.blocks:
            x = block(x)  # ... [N, C, 4, 4]
        x = torch.cat([x, self.spread(x)], 1)
        x = ops.mod_act(self.conv(x), b=self.bias)
        h = F.leaky_relu(self.hidden(x.flatten(1)), ops.SLOPE) * ops.GAIN  # [N, C]
        e = self.embed(torch.stack([dose * 2 - 1, (dose == 0).to(dose)], 1))
        return (self.score(h)[:, 0] + (h * e).sum(1) / math.sqrt(h.shape[1])).float()

    def spread(self, x: Tensor) -> Tensor:
        """Mean standard deviation within each group, as a channel [N, 1, H, W]."""
        n, _, height, width = x.shape
        groups = x.float().unflatten(0, (-1, min(self.config.group, n)))  # [N / g, g, C, H, W]
        variance = (groups - groups.mean(1, keepdim=True)).square().mean(1)
        std = (variance + 1e-8).sqrt().mean((1, 2, 3))  # [N / g]
        return std.repeat_interleave(groups.shape[1])[:, None, None, None].expand(
            -1, 1, height, width
        )


class ResidualBlock(nn.Module):
    """Pre-activation residual block with group normalisation (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm0, self.norm1 = GroupNorm(inputs), GroupNorm(outputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv1.weight)  # starts as the identity
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(F.relu(self.norm0(x)))
        y = self.conv1(F.relu(self.norm1(y)))
        return y + self.skip(F.avg_pool2d(x, 2) if self.stride == 2 else x)


class Trunk(nn.Sequential):
    """Image [N, 1, R, R] to features [N, channels[-1], R / 2^stages, ...]: each image is first
    brought to zero mean and unit variance, so that exposure alone says nothing."""

    def __init__(self, channels: tuple[int, ...], blocks: int):
        layers: list[nn.Module] = [nn.Conv2d(1, channels[0], 3, padding=1)]
        for inputs, outputs in zip((channels[0], *channels), channels):
            layers += [ResidualBlock(inputs, outputs, stride=2)]
            layers += [ResidualBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
        super().__init__(*layers, GroupNorm(channels[-1]), nn.ReLU())
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
        return super().forward(((x - mean) / (std + 0.01)).to(memory_format=torch.channels_last))


class Classifier(nn.Module):
    """A compact residual CNN, `[N, 1, R, R]` to the logit [N] of disease, any R from 32 up.

    The logit is divided by `temperature`, calibrated after training (Guo et al. 2017).
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.channels, config.blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.channels[-1], 1)
        self.register_buffer("temperature", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [N, channels[-1]]."""
        return self.trunk(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))[:, 0].float() / self.temperature


class Encoder(nn.Module):
    """Image [N, 1, R, R] to `w1` [N, layers, w] and `z2` [N, z2] with length in [0, 1]."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.channels, blocks=1)
        features = config.channels[-1] * 16
        self.squeeze = nn.Conv2d(config.channels[-1], config.channels[-1] // 2, 1)
        self.structure = nn.Linear(features // 2, config.layers * config.w)
        self.disease = nn.Linear(features // 2, config.z2 + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.squeeze(self.trunk(x))).flatten(1)
        w1 = self.structure(h).unflatten(1, (self.config.layers, self.config.w))
        direction, dose = self.disease(h).float().split((self.config.z2, 1), 1)
        return w1.float(), F.normalize(direction) * dose.sigmoid()
