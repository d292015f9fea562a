"""What the metadata of a model file must be, and what its networks must do, before they are used.

A model file may come from anywhere. Names that are not known here are left alone.
"""

import dataclasses
import math

import torch
from torch import nn

from cxr.networks import (
    Classifier,
    ClassifierConfig,
    Discriminator,
    DiscriminatorConfig,
    Encoder,
    EncoderConfig,
    Generator,
    GeneratorConfig,
)

NETWORKS = {
    "classifier": (Classifier, ClassifierConfig),
    "encoder": (Encoder, EncoderConfig),
    "generator": (Generator, GeneratorConfig),
    "discriminator": (Discriminator, DiscriminatorConfig),
}
MOST = 64  # classes
SIZES = (32, 64, 128, 256)
LONGEST = 4096  # characters of a class's name, which may join those of many classes
STAGES = {  # how many `channels` there are, the fewest and the most, less the bits of the size
    "classifier": (-8, -1),
    "encoder": (-3, -3),
    "generator": (-2, -2),
    "discriminator": (-2, -2),
}
LIMITS = {  # of a config's whole numbers
    "blocks": (1, 16),
    "outputs": (1, MOST),
    "layers": (1, 64),
    "w": (1, 4096),
    "z1": (1, 4096),
    "z2": (1, 4096),
    "convs": (1, 8),
    "noisy": (0, 4096),
    "group": (1, 4096),
}


class Misfit(ValueError):
    """What is wrong, in one line."""


def check_info(info: dict) -> None:
    """Raises Misfit unless these are the metadata of a model: the attributes of `Model.info`."""
    _need(info.get("size") in SIZES and type(info["size"]) is int, "size", "32, 64, 128 or 256")
    _need(info.get("fit") in ("crop", "pad", "lungs"), "fit", "crop, pad or lungs")
    check_classes(info.get("classes"))
    for name in ("configs", "provenance", "metrics", "thresholds"):
        _need(isinstance(info.get(name), dict), name, "a dictionary")
    _need(_depth(info) <= 12, "metadata", "less deep")
    for name, value in info["thresholds"].items():
        _need(_is_number(value), f"thresholds.{name}", "a number")
    _need(info.get("target") in (None, info["classes"][-1]), "target", "the diseased class")
    if "fingerprint" in info:
        told = info["fingerprint"]
        answers = told.get("answers") if isinstance(told, dict) else None
        sound = isinstance(answers, list) and len(answers) == 4 and all(map(_is_number, answers))
        sound = sound and isinstance(told.get("weights"), str)
        _need(sound, "fingerprint", "a text `weights` and four numbers `answers`")
    _need(type(info.get("fold", 0)) is int and 0 <= info.get("fold", 0) < 10, "fold", "0 to 9")
    for name in ("split", "leave_out"):
        _need(isinstance(info.get(name, ""), str), name, "a text")
    logits = info.get("logits", [0, 1])
    rising = isinstance(logits, list) and len(logits) == 2 and all(map(_is_number, logits))
    rising = rising and logits[1] - logits[0] > 1e-3  # a dose is a share of their distance
    _need(rising, "logits", "two finite numbers, the first smaller")


def check_classes(names: object) -> None:
    """Raises Misfit unless these are the names of two classes, the healthy one first, or of more."""
    several = isinstance(names, list | tuple) and 2 <= len(names) <= MOST
    several = several and all(isinstance(name, str) for name in names)
    _need(several and len({*names}) == len(names), "classes", f"2 to {MOST} different names")
    for name in names:
        sane = name.isprintable() and 0 < len(name) <= LONGEST
        _need(
            sane, "a class's name", f"1 to {LONGEST} characters, none of them a control character"
        )


def read_config(name: str, values: object, size: int):
    """The config of the network `name`. Raises Misfit unless it suits images of this size, and is
    one that can be built without cost."""
    _need(name in NETWORKS, f"configs.{name}", f"one of {', '.join(NETWORKS)}")
    config_class = NETWORKS[name][1]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    _need(isinstance(values, dict), f"configs.{name}", "a dictionary")
    for key, value in values.items():
        _need(key in fields, f"configs.{name}.{key}", "a name that this cxrgan knows")
        if key == "channels":
            whole = isinstance(value, list) and all(type(c) is int for c in value)
            low, high = (n + size.bit_length() for n in STAGES[name])
            fit = whole and low <= len(value) <= high and all(1 <= c <= 512 for c in value)
            count = f"{high}" if low == high else f"{max(low, 1)} to {high}"
            _need(fit, f"configs.{name}.{key}", f"{count} whole numbers from 1 to 512")
        elif key == "dropout":
            _need(_is_number(value) and 0 <= value < 1, f"configs.{name}.{key}", "0 to below 1")
        elif key == "target":
            _need(value is None or type(value) is int, f"configs.{name}.{key}", "a class's place")
        else:
            low, high = LIMITS[key]
            fit = type(value) is int and low <= value <= high
            _need(fit, f"configs.{name}.{key}", f"{low} to {high}")
    for key, field in fields.items():
        _need(
            key in values or field.default is not dataclasses.MISSING,
            f"configs.{name}",
            f"with {key}",
        )
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def count_classes(names: list[str], config: ClassifierConfig | None) -> None:
    """Raises Misfit unless a model with this classifier, or none, has so many classes: two, but
    where it has several outputs and no target."""
    several = config is not None and config.outputs > 1
    if several and config.target is not None:
        _need(0 <= config.target < config.outputs, "the classifier's target", "one of its outputs")
        several = False
    count = config.outputs if several else 2
    _need(len(names) == count, "classes", f"{count} names")


@torch.no_grad()
def rehearse(networks: dict[str, nn.Module], size: int) -> None:
    """Raises Misfit unless the networks, on the CPU, suit each other and images of this size, and
    answer a picture that is grey above and a ramp from black to white below with finite numbers."""
    x = torch.linspace(-1, 1, size).repeat(1, 1, size, 1)
    x[:, :, : size // 2] = 0
    answers = {}
    if "classifier" in networks:
        _need(networks["classifier"].temperature > 0, "the temperature", "positive")
        answers["classifier"] = networks["classifier"](x)
    if "encoder" in networks:
        w1, z2 = networks["encoder"](x)
        answers["encoder"] = torch.cat([w1.flatten(), z2.flatten()])
    if "generator" in networks:
        generator, config = networks["generator"], networks["generator"].config
        if "encoder" not in networks:
            w1, z2 = generator.M1(torch.ones(1, config.z1)), torch.ones(1, config.z2)
        shared = w1.shape[1:] == (config.layers, config.w) and z2.shape[1] == config.z2
        _need(shared, "layers, w and z2", "the same in encoder and generator")
        answers["generator"] = generator(w1, z2, generator.noise(1, torch.Generator()))
        _need(answers["generator"].shape == x.shape, "the image", f"{size} x {size}")
    if "discriminator" in networks:
        answers["discriminator"] = networks["discriminator"](x, torch.zeros(1))
    for name, answer in answers.items():
        _need(bool(answer.isfinite().all()), f"the answer of the {name}", "finite")


def _need(fine: bool, name: str, what: str) -> None:
    if not fine:
        raise Misfit(f"{name} must be {what}")


def _is_number(value: object) -> bool:
    """Whether it is a finite number of a size that arithmetic in fp32 bears."""
    return type(value) in (int, float) and abs(value) < 1e9 and not math.isnan(value)


def _depth(tree: object) -> int:
    """How many dictionaries and lists lie within each other; without recursion."""
    depth, level = 0, [tree]
    while level:
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        depth += 1
    return depth
