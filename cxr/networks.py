"""Classifier, Encoder, Generator and Discriminator, each with the frozen config that rebuilds it.

Images are `[N, 1, R, R]` in [-1, 1]. `z1` is the lung structure. `z2 = dose * u` is the disease,
with `u` on the unit sphere. `w1` and `w2` are their style vectors.
"""

import dataclasses
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxr import ops
from cxr.layers import (
    DiscriminatorBlock,
    EqualConv,
    EqualLinear,
    Mapping,
    ModulatedLayer,
    Structures,
    Trunk,
    against_rest,
    normal,
)


@dataclass(frozen=True)
class ClassifierConfig:
    channels: tuple[int, ...] = (32, 64, 96, 160)  # one stage each, which halves its input
    blocks: int = 2  # residual blocks per stage
    dropout: float = 0.2
    outputs: int = 1  # more: the logits of one softmax, over as many classes
    target: int | None = None  # of these: its log-odds against the rest are the answer


@dataclass(frozen=True)
class EncoderConfig:
    channels: tuple[int, ...]  # one stage each, from size / 2 down to 4 x 4
    layers: int  # of the generator; each layer gets its own `w1`
    w: int = 128
    z2: int = 16


@dataclass(frozen=True)
class GeneratorConfig:
    channels: tuple[int, ...]  # at 4, 8, ..., size
    z1: int = 128
    z2: int = 16
    w: int = 128
    convs: int = 1  # per block
    noisy: int = 32  # largest layers with noise, in pixels; in larger ones noise is film grain

    @property
    def layers(self) -> int:
        return 1 + self.convs * (len(self.channels) - 1)


@dataclass(frozen=True)
class DiscriminatorConfig:
    channels: tuple[int, ...]  # at size, ..., 8, 4
    group: int = 4  # images in a group of the minibatch standard deviation


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
    """A preset. up: the generator's channels at 4, 8, ..., size; the discriminator has the same in
    reverse."""
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
    "cxr128": _preset(  # cxr64 with one more stage, so that it can begin with the weights of cxr64
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


class Generator(nn.Module):
    """Style-based generator `(w1, z2, noise) -> image` with skip connections to the image."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.structure = Structures(config.z1, config.layers, config.w)
        self.disease = Mapping(config.z2, config.w)
        self.const = nn.Parameter(normal(1, config.channels[0], 4, 4))
        self.layers, inputs = nn.ModuleList(), config.channels[0]
        for block, outputs in enumerate(config.channels):
            convs = config.convs if block else 1
            for i in range(convs):
                up, end = block > 0 and i == 0, i == convs - 1
                self.layers.append(ModulatedLayer(inputs, outputs, config.w, up, end))
                inputs = outputs
        self.image_bias = nn.Parameter(torch.zeros(()))
        self.detailed = min(2, len(config.channels) - 3)  # a detail is added after this block

    def M1(self, z1: Tensor) -> Tensor:
        """`z1` [N, z1] to `w1` [N, layers, w]. Only the direction of `z1` matters."""
        return self.structure(F.normalize(z1) * math.sqrt(z1.shape[1]))

    def M2(self, z2: Tensor) -> Tensor:
        """`z2` [N, z2] to `w2` [N, w]. Homogeneous, and zero for a zero `z2`."""
        return self.disease(z2 * math.sqrt(z2.shape[1]))

    def noise(
        self, n: int, rng: torch.Generator | None = None, device: str | None = None
    ) -> list[Tensor]:
        """Unit Gaussian noise, [n, 1, H, W] per layer, drawn on the CPU, for the generator's device
        or another. It is zero for layers larger than `noisy`. A path uses the same noise at all
        doses."""
        noise, size = [], 4
        for layer in self.layers:
            size *= 2 if layer.up else 1
            eps = torch.zeros(n, 1, size, size)
            if size <= self.config.noisy:
                eps.normal_(generator=rng)
            noise.append(eps.to(device or self.const.device))
        return noise

    def detail(self, n: int) -> Tensor:
        """A detail [n, C, S, S] of zeros, where S is 16, or R / 4 if that is less. A finer detail
        would hold the texture by which the classes differ, and show it at every dose
        (docs/ablations.md)."""
        size = 4 * 2**self.detailed
        return torch.zeros(n, self.config.channels[self.detailed], size, size).to(self.const.device)

    def forward(
        self, w1: Tensor, z2: Tensor, noise: list[Tensor], detail: Tensor | None = None
    ) -> Tensor:
        """Images [N, 1, R, R], not clipped, from `w1` [N, layers, w] and `z2` [N, z2].

        `detail` [N, C, S, S] is added to the features of its size. It holds what an inversion found
        in an image and no `w1` can draw (the space F/W+ of Kang, Kim & Cho 2021, BDInvert).
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


class Discriminator(nn.Module):
    """`(image, dose) -> logit of being real`, conditioned on the dose by projection (Miyato &
    Koyama 2018).

    The minibatch standard deviation (Karras et al. 2018, section 3) is computed in groups of
    consecutive images, so that a batch can be split between two groups without a change.
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
        """The logit [N] of being real, for images [N, 1, R, R] at doses [N] in [0, 1]."""
        x = ops.mod_act(self.stem(x.to(memory_format=torch.channels_last)), b=self.stem_bias)
        for block in self.blocks:
            x = block(x)  # ... [N, C, 4, 4]
        x = torch.cat([x, self.spread(x)], 1)
        x = ops.mod_act(self.conv(x), b=self.bias)
        h = F.leaky_relu(self.hidden(x.flatten(1)), ops.SLOPE) * ops.GAIN  # [N, C]
        e = self.embed(torch.stack([dose * 2 - 1, (dose == 0).to(dose)], 1))
        return (self.score(h)[:, 0] + (h * e).sum(1) / math.sqrt(h.shape[1])).float()

    def spread(self, x: Tensor) -> Tensor:
        """The mean standard deviation within each group, as a channel [N, 1, H, W]."""
        n, _, height, width = x.shape
        groups = x.float().unflatten(0, (-1, min(self.config.group, n)))  # [N / g, g, C, H, W]
        variance = (groups - groups.mean(1, keepdim=True)).square().mean(1)
        std = (variance + 1e-8).sqrt().mean((1, 2, 3))  # [N / g]
        return std.repeat_interleave(groups.shape[1])[:, None, None, None].expand(
            -1, 1, height, width
        )


class Classifier(nn.Module):
    """A compact residual CNN from images `[N, 1, R, R]`, R at least 32, to logits [N] of disease;
    with several `outputs` and no `target`, to the logits [N, outputs] of a softmax.

    A logit is divided by `temperature`, which is calibrated after training (Guo et al. 2017).
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.channels, config.blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.channels[-1], config.outputs)
        self.register_buffer("temperature", torch.ones(()))

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [N, channels[-1]]."""
        return self.trunk(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.dropout(self.features(x))).float() / self.temperature
        if self.config.outputs == 1:
            return y[:, 0]
        return y if self.config.target is None else against_rest(y, self.config.target)


class Encoder(nn.Module):
    """Images [N, 1, R, R] to `w1` [N, layers, w] and `z2` [N, z2]. The length of `z2`, the dose, is
    in [0, 1]."""

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


def outgrows(config, smaller) -> bool:
    """Whether a network of this config is a network of the config `smaller`, of the same kind, with
    more stages for a larger image, a classifier also with other outputs. `grow` needs this."""
    n = len(smaller.channels)
    first = isinstance(config, GeneratorConfig)  # its channels begin at 4 x 4; others end there
    shared = config.channels[:n] if first else config.channels[-n:]
    free = {EncoderConfig: ("layers",), ClassifierConfig: ("outputs", "target")}
    fewer = {name: getattr(smaller, name) for name in free.get(type(smaller), ())}
    return type(config) is type(smaller) and (
        dataclasses.replace(config, channels=shared, **fewer) == smaller
    )


@torch.no_grad()
def grow(network: nn.Module, smaller: nn.Module) -> None:
    """Copy the weights of a network for smaller images; see `outgrows`. Stages correspond by their
    distance from the 4 x 4 stage.

    The new stages, a discriminator's first convolution and the head of a classifier with another
    number of outputs keep their own weights. A generator's new
    stages draw nothing at first, so it begins with the smaller generator's image, enlarged
    (progressive growing, Karras et al. 2018, section 2, without fading in). An encoder's new layers
    begin with the `w1` of the last old layer. A generator's random structures are not copied if the
    number of layers differs: training fits them again.
    """
    config, old = network.config, smaller.config
    shift = (len(config.channels) - len(old.channels)) * getattr(config, "blocks", 1)
    weights = network.state_dict()
    for key, value in smaller.state_dict().items():
        if key.startswith("stem") and shift:  # a discriminator's; as wide as its first stage
            continue
        if key.startswith("head.") and weights[key].shape != value.shape:
            continue
        if not key.startswith("trunk.0."):  # blocks are numbered from the image on
            key = re.sub(r"^(trunk|blocks)\.(\d+)", lambda m: f"{m[1]}.{int(m[2]) + shift}", key)
        if key.startswith("structure.") and isinstance(config, GeneratorConfig):
            if weights[key].shape != value.shape:
                continue
        elif key.startswith("structure."):
            last = value[-config.w :]
            value = torch.cat([value, *[last] * (config.layers - old.layers)])
        weights[key] = value
    network.load_state_dict(weights)
    if isinstance(network, Generator):
        for layer in network.layers[len(smaller.layers) :]:
            if layer.image_weight is not None:
                layer.image_weight.zero_()
