"""What cxrgan runs on, and what a model file holds: (name, text) lines for `cxrgan info`."""

from collections.abc import Iterator

import torch

from cxr import build, checkpoints, packing
from cxr.training import find_device, half_precision


def machine() -> list[tuple[str, str]]:
    """Device, arithmetic, kernels, shipped models and cache folder."""
    device = find_device()
    with half_precision(device):
        half = torch.is_autocast_enabled(device.type)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("device", ", ".join(gpus) or "cpu"),
        ("arithmetic", "bf16 and fp32" if half else "fp32"),
        ("torch", torch.__version__),
        ("CPU threads", str(torch.get_num_threads())),
        ("kernels", ": ".join(build.status())),
        ("shipped models", ", ".join(checkpoints.shipped()) or "none"),
        ("cache", str(packing.cache_folders()[0])),
    ]


def contents(name: str) -> list[tuple[str, str]]:
    """Networks with their sizes, then everything that the metadata of a model file say.

    Raises CxrError if it is no model file or a shipped model's name.
    """
    model = checkpoints.load_model(name)
    networks = [
        (kind, f"{sum(p.numel() for p in network.parameters()):,} parameters")
        for kind, network in model.networks.items()
    ]
    return networks + list(_leaves(model.info))


def _leaves(tree: dict, above: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested dictionaries under its dotted name; an interval is one leaf."""
    for name, value in tree.items():
        if isinstance(value, dict) and "low" in value:
            interval = f"{_text(value['low'])} to {_text(value['high'])}"
            yield above + name, f"{_text(value['value'])} ({interval})"
        elif isinstance(value, dict):
            yield from _leaves(value, f"{above}{name}.")
        elif value is not None:
            yield above + name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
