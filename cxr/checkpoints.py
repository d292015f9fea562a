"""Safetensors in and out: the model file that travels, and the state that a run resumes from.

A model file holds `classifier.*` and, after `train-gan`, `encoder.*`, `generator.*` (both EMA) and
`discriminator.*` (a shipped one has it in `discriminators/`); its metadata (one JSON text) holds all
else that `explain` and `evaluate` need.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cxr import CxrError, UsageError, appearance, weights_folder
from cxr.cnn import contract, own
from cxr.cnn.adapter import find_target
from cxr.data.listing import joined
from cxr.files import replacing
from cxr.networks import grow, outgrows
from cxr.schema import NETWORKS, Misfit, check_info, count_classes, read_config, rehearse

FORMAT = 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what weights are kept in


@dataclass
class Model:
    """What a model file holds.

    Attributes
    ----------
    networks : the modules by name, in eval mode and frozen
    info : JSON-able metadata: `size`, `fit`, `classes` (negative, positive; or all that a classifier
        of several tells apart), `target` (of several, the one explained), `logits` (the two between
        which the dose runs), `provenance`, `metrics`, `thresholds`
    buffers : other tensors, `mean_image` [1, 1, R, R] among them
    """

    networks: dict[str, nn.Module]
    info: dict
    buffers: dict[str, Tensor] = field(default_factory=dict)
    path: Path | None = None

    def __getattr__(self, name: str) -> nn.Module:
        if name not in NETWORKS:
            raise AttributeError(name)
        self.require(name)
        return self.networks[name]

    def require(self, *names: str) -> None:
        """Raises CxrError, which says what to do, if one of these networks is missing."""
        for name in names:
            if name not in self.__dict__["networks"]:
                made = "a model made by `cxrgan train-gan`"
                remedy = "--classifier" if name == "classifier" else made
                raise CxrError(f"{self.path} holds no {name}: give {remedy}")

    @property
    def device(self) -> torch.device:
        """Where the networks are; the CPU for those without a tensor."""
        states = (network.state_dict().values() for network in self.networks.values())
        return next((t.device for state in states for t in state), torch.device("cpu"))

    def dose(self, logit: Tensor) -> Tensor:
        """A logit as a dose: 0 at the median healthy logit, 1 at the diseased 98th percentile."""
        low, high = self.info["logits"]
        return ((logit - low) / (high - low)).clamp(0, 1)

    def logit(self, dose: Tensor) -> Tensor:
        """The logit that a dose names."""
        low, high = self.info["logits"]
        return low + dose * (high - low)

    def save(self, path: str | Path, half: bool = False) -> None:
        """Write a model file; `half` stores the weights in fp16, for shipping."""
        own = {
            name: net for name, net in self.networks.items() if isinstance(net, NETWORKS[name][0])
        }
        tensors = {
            f"{name}.{key}": value
            for name, network in own.items()
            for key, value in network.state_dict().items()
        }
        tensors |= {f"buffers.{key}": value for key, value in self.buffers.items()}
        if half:
            tensors = {key: value.half() for key, value in tensors.items()}
        configs = {name: dataclasses.asdict(network.config) for name, network in own.items()}
        save(path, tensors, {"format": FORMAT, "configs": configs, **self.info})


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """Read a model file, or a shipped model by its name (`pneumonia`), frozen and in fp32.

    Nothing in it is run. Raises CxrError unless it is sound: the metadata first, then the tensors'
    names and shapes, then what the networks answer.
    """
    path = find_model(path)
    tensors, info = load(path)
    _check_format(path, info)
    try:
        check_info(info)
        configs = {
            name: read_config(name, values, info["size"])
            for name, values in info.pop("configs").items()
        }
        count_classes(info["classes"], configs.get("classifier"))
        networks = {name: _rebuild(name, config, tensors) for name, config in configs.items()}
        rehearse(networks, info["size"])
        buffers = {k[8:]: v for k, v in tensors.items() if k.startswith("buffers.")}
        known = {"mean_image": (1, 1, info["size"], info["size"])} | appearance.shapes(buffers)
        _check_tensors(buffers, known, "buffers")
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise CxrError(f"{path} is no model file this cxrgan can rebuild ({reason})") from None
    networks = {name: network.to(device) for name, network in networks.items()}
    return Model(networks, info, {k: v.float().to(device) for k, v in buffers.items()}, path)


def _check_format(path: Path, info: dict) -> None:
    """Take the format out of the metadata. Raises CxrError unless it is the one that is read."""
    if "configs" not in info:
        raise CxrError(f"{path} is not a cxrgan model file: make one with `cxrgan train-cnn`")
    found = info.pop("format", None)
    if found == FORMAT:
        return
    told = f"{path} has format {str(found)[:20]}, this cxrgan reads format {FORMAT}"
    newer = isinstance(found, int) and found > FORMAT
    raise CxrError(f"{told}: {'install a newer cxrgan' if newer else 'train the model again'}")


def _check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple], name: str) -> None:
    """Raises Misfit unless all are finite floats, and those that are told have these shapes."""
    for key, value in tensors.items():
        if value.dtype not in FLOATS:
            raise Misfit(f"{name}.{key} holds {value.dtype}")
        if value.shape != shapes.get(key, value.shape):
            raise Misfit(f"{name}.{key} has shape {list(value.shape)}, not {list(shapes[key])}")
        if not value.isfinite().all():
            raise Misfit(f"{name}.{key} holds weights that are not numbers: train again")


def _rebuild(name: str, config, tensors: dict[str, Tensor]) -> nn.Module:
    """A network from its config and the tensors under its name, in eval mode, frozen, in fp32.
    Nothing is allocated before the tensors are known to be its own."""
    with torch.device("meta"):
        network = NETWORKS[name][0](config)
    prefix = name + "."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if unlike := sorted(own.keys() ^ shapes.keys()):
        raise Misfit(f"{prefix}{unlike[0]} is {'missing' if unlike[0] in shapes else 'unknown'}")
    _check_tensors(own, shapes, name)
    network.to_empty(device="cpu").load_state_dict(own)
    return network.eval().requires_grad_(False)


def with_discriminator(model: Model, device: str | torch.device = "cpu") -> Model:
    """The model with its discriminator, which of one that ships lies in a file of the same name in
    `discriminators/`; as it is, if there is none."""
    if "discriminator" in model.networks or model.path is None:
        return model
    beside = model.path.parent / "discriminators" / model.path.name
    if not beside.is_file():
        return model
    return dataclasses.replace(model, networks=model.networks | load_model(beside, device).networks)


def start_from(path: str | Path, networks: dict[str, nn.Module]) -> None:
    """Give the networks the weights that a model file holds under their names; those of fewer
    pixels grow. Raises CxrError if the file lacks one, or one has another config."""
    model = load_model(path)
    held = (with_discriminator(model) if "discriminator" in networks else model).networks
    if missing := networks.keys() - held.keys():
        raise CxrError(
            f"--start {path}: it holds no {', '.join(sorted(missing))}; give a model file that the "
            "same command wrote, or pneumonia"
        )
    for name, network in networks.items():
        if not outgrows(network.config, held[name].config):
            raise CxrError(
                f"--start {path}: its {name} is of another kind; start from a model of the same "
                "preset, or from cxr64 for cxr128"
            )
        grow(network, held[name])


def aim(model: Model, target: str | None) -> Model:
    """A classifier's model, answering with the log-odds of the class `target`, by name or number,
    against the rest; of two classes only the second can be one. Raises UsageError."""
    network, names = model.classifier, model.info["classes"]
    if network.config.outputs == 1 or network.config.target is not None:
        if target in (None, names[1]):
            return model
        raise UsageError(
            f"--target {target}: this classifier tells {' from '.join(names)}, no more"
        )
    if target is None:
        raise UsageError(f"{model.path} tells {', '.join(names)} apart: say one with --target")
    place = find_target(target, names)
    network.config = dataclasses.replace(network.config, target=place)
    rest = joined({*names} - {names[place]}, f"no {names[place]}")
    known = model.info["metrics"].get("classifier")  # of a file from anywhere
    own = known.get(names[place]) if isinstance(known, dict) else None
    numbers = {"classifier": own} if own else {}
    model.info |= {"classes": [rest, names[place]], "target": names[place], "metrics": numbers}
    return model


def load_classifier(
    spec: str | nn.Module,
    size: int,
    device: str | torch.device = "cpu",
    target: str | None = None,
    classifier_input: str | None = None,
) -> Model:
    """A classifier from a model file, or a user's own: `FILE.py:FUNCTION`, a torch.export program
    or a TorchScript file.

    FUNCTION takes nothing and returns a module from [N, 1, R, R] in [-1, 1] to a logit [N], or
    what `adapt` makes one of. Its contract is checked at R = `size`, and what it is given is
    clipped to that range. target: of a classifier with several classes; classifier_input: the
    option of that name, for a user's own. A module is copied and put into eval mode.
    """
    if isinstance(spec, nn.Module):
        network, spec = own.of_module(spec, device), own.name_of(spec)
    elif not own.is_own(spec):
        if classifier_input is not None:
            raise UsageError("--classifier-input is for a CNN of your own")
        model = aim(load_model(spec, device), target)
        model.networks = {"classifier": model.classifier}
        return model
    else:
        network = own.load(spec, size, device, target, classifier_input)
    contract.keep_to(network, spec, size, device)
    about = {"classifier": Path(spec).name, "target": target, "classifier_input": classifier_input}
    provenance = {name: value for name, value in about.items() if value is not None}
    info = {"provenance": provenance, "metrics": {}, "thresholds": {}}
    return Model({"classifier": network}, info, path=Path(spec))


def shipped() -> dict[str, Path]:
    """The model files that came with the package, by name (`pneumonia` for pneumonia-128)."""
    return {p.stem.rsplit("-", 1)[0]: p for p in sorted(weights_folder().glob("*-*.safetensors"))}


def find_model(name: str | Path) -> Path:
    models = shipped()
    if str(name) in models:
        return models[str(name)]
    if not Path(name).is_file():
        names = ", ".join(models) or "none"
        raise CxrError(f"no model file at {name}: give a path or a shipped model ({names})")
    return Path(name)


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write a safetensors file whole or not at all; `metadata` is any JSON-able dictionary."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"cxrgan": json.dumps(metadata)})
    except safetensors.SafetensorError as error:  # a full disk
        raise CxrError(f"{path}: cannot be written: {error}") from None


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a file that `save` wrote. Raises CxrError."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("cxrgan", "{}"))
            if not isinstance(metadata, dict):
                raise ValueError("its metadata are no dictionary")  # noqa: TRY004
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["empty"])[0]
        raise CxrError(f"cannot read {path} as safetensors ({reason}): is it whole?") from None


def checksum(tensors: dict[str, Tensor], metadata: dict) -> str:
    """A digest of tensors on the CPU, their names, types and shapes, and the metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def pack(parts: dict[str, nn.Module | torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of modules and optimisers as one flat dictionary of tensors."""
    tensors = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        else:
            for index, state in part.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
    return tensors


def unpack(tensors: dict[str, Tensor], parts: dict[str, nn.Module | torch.optim.Optimizer]) -> None:
    """Put what `pack` took back into the same modules and optimisers."""
    for name, part in parts.items():
        prefix = name + "."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if isinstance(part, nn.Module):
            part.load_state_dict(own)
            continue
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in own.items():
            index, term = key.split(".")
            state.setdefault(int(index), {})[term] = value
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
        for weight, moments in part.state.items():  # in the weight's own memory format again
            for key, value in moments.items():
                if value.shape == weight.shape:
                    moments[key] = torch.empty_like(weight).copy_(value)


def contents(name: str) -> list[tuple[str, str]]:
    """Networks with their sizes, then everything that the metadata of a model file say.

    Raises CxrError if it is no model file or a shipped model's name.
    """
    model = load_model(name)
    networks = [
        (kind, f"{sum(p.numel() for p in network.parameters()):,} parameters")
        for kind, network in model.networks.items()
    ]
    return networks + list(_leaves(model.info))


def _leaves(tree: dict, above: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested dictionaries under its dotted name; an interval is one leaf."""
    for name, value in tree.items():
        if isinstance(value, dict) and {"value", "low", "high"} <= value.keys():
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
