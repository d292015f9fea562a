"""Time the kernels, the training step and the explainer, and compare them with alternatives.

`bench` measures and returns one dictionary; `write` saves it as JSON.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import torch

from cxr import CxrError, UsageError, __version__, build, console, explain, graphs, train_gan
from cxr.checkpoints import Model, load_model, shipped
from cxr.datasets import Dataset
from cxr.device import prepare
from cxr.evaluation.bench_kernels import kernels
from cxr.files import write_text
from cxr.networks import PRESETS, Classifier, Discriminator, Encoder, Generator
from cxr.training import World

STEPS = ("off", "on", "compiled")  # the kernels; "compiled": kernels on, networks compiled
PARTS = ("invert", "lay_over", "heat_maps")  # of an explanation that are shown; the JSON has all
GPU_STEPS = (*STEPS, "graphs")  # kernels on, the step recorded as a CUDA graph


def bench(
    what: str = "all",
    device: str = "auto",
    presets: Sequence[str] = (),
    batch: int = 32,
    seconds: float = 1.0,
    rounds: int | None = None,
    backend: str | None = "inductor",
) -> dict:
    """Measure `kernels`, `step`, `explain`, or `all` of them, and print tables.

    Parameters
    ----------
    presets : the shapes and networks to measure; by default cxr64 and cxr128, on a GPU cxr256, too
    batch : number of images in a batch of the GAN
    seconds : time spent on each operation and shape, after the warm-up
    rounds : number of training steps and of explanations; by default 20 on a GPU, 5 on a CPU
    backend : the backend of `torch.compile`; None leaves the compiled kernels out

    Returns {"about": {...}, "kernels": {...}, "step": [...], "explain": [...]}, fit for JSON.
    Raises UsageError if the training step is asked for a batch that is no multiple of 16.
    """
    if batch % 16 and what in ("step", "all"):
        raise UsageError(f"--batch {batch}: the training step needs a multiple of 16")
    on = prepare(device)
    gpu = on.type == "cuda"
    presets = presets or (("cxr64", "cxr128", "cxr256") if gpu else ("cxr64", "cxr128"))
    rounds = rounds or (20 if gpu else 5)
    results = {"about": _about(on)}
    if what in ("kernels", "all"):
        results["kernels"] = kernels(on, presets, batch, seconds, backend)
        _show_kernels(results["kernels"])
    if what in ("step", "all"):
        total = len(presets) * len(_variants(on)) * (WARM_UP + rounds)
        with console.progress("training step", total, unit="steps") as bar:
            results["step"] = [step(on, preset, batch, rounds, backend, bar) for preset in presets]
        _show("training step", results["step"])
    if what in ("explain", "all"):
        with console.progress("explain", len(presets) * (1 + rounds)) as bar:
            results["explain"] = [explanation(on, preset, rounds, bar) for preset in presets]
        shown = ("preset", "unit", "total", "at_once", "each_at_once", *PARTS)
        _show("explain", [{key: row[key] for key in shown} for row in results["explain"]])
    return results


def write(results: dict, path: str | Path) -> None:
    """Save the results of `bench` as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")


def _about(device: torch.device) -> dict:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ()
    )
    cpu = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name = cpu[0] if cpu else platform.processor()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "threads": torch.get_num_threads(),
        "cxrgan": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "kernels": build.status()[0],
        "date": date.today().isoformat(),
        "command": shlex.join(("cxrgan", *sys.argv[1:])),
    }


def _show(title: str, rows: list[dict]) -> None:
    """Print a table of rows with the same keys. Lists are left out; None is shown as a dash."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    cells = [
        tuple(f"{v:.3g}" if isinstance(v, float) else "-" if v is None else v for v in values)
        for values in ([row[key] for key in keys] for row in rows)
    ]
    console.table(title, tuple(key.replace("_", " ") for key in keys), cells)


def _show_kernels(results: dict) -> None:
    """Print a table for each type and pass, narrow enough for a terminal; the JSON has the rest."""
    shown = ("op", "shape", "ms", "of_copy", "vs_eager", "vs_compiled")
    for mean in results["means"]:
        rows = [row for row in results["rows"] if all(row[k] == mean[k] for k in ("dtype", "pass"))]
        _show(f"{mean['dtype']}, {mean['pass']}", [{k: row[k] for k in shown} for row in rows])
    _show(f"geometric means; copy bandwidth {results['copy_GBps']:.0f} GB/s", results["means"])


def clock(device: torch.device) -> float:
    """The time in seconds, after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- the training step ----

WARM_UP = 2  # steps; the first one compiles


def step(
    device: torch.device, preset: str, batch: int, rounds: int, backend: str, bar: console.Bar
) -> dict:
    """Images per second of the GAN's training step. Each variant has its own process, and the
    processes take turns."""
    order = json.dumps([str(device), preset, batch, backend])
    children = {variant: _child(variant, order) for variant in _variants(device)}
    times: dict[str, list[float]] = {variant: [] for variant in children}
    try:
        for _ in range(WARM_UP + rounds):
            for variant, child in children.items():
                bar.note(f"{preset}, {variant}")
                times[variant].append(_ask(child))
                bar.advance()
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    times = {variant: seconds[WARM_UP:] for variant, seconds in times.items()}
    medians = {variant: statistics.median(seconds) for variant, seconds in times.items()}
    return {
        "preset": preset,
        "batch": batch,
        "unit": "images/s",
        **{variant: batch / t for variant, t in medians.items()},
        **{f"{v}_vs_off": medians["off"] / medians[v] for v in children if v != "off"},
        "seconds": [times],
    }


def _variants(device: torch.device) -> tuple[str, ...]:
    return GPU_STEPS if device.type == "cuda" else STEPS


def _child(variant: str, order: str) -> subprocess.Popen:
    environment = {**os.environ, "CXRGAN_KERNELS": "off" if variant == "off" else "auto"}
    environment["CXRGAN_GRAPHS"] = "require" if variant == "graphs" else "off"
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    code = f"from cxr.evaluation import bench; bench.serve({variant!r}, *{order})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def _ask(child: subprocess.Popen) -> float:
    """Let a child process do one step. Returns the seconds that it took."""
    child.stdin.write("step\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise CxrError("a process of the benchmark ended early: its error stands above")
    return float(answer)


def serve(variant: str, device: str, preset: str, batch: int, backend: str) -> None:
    """A child process of `step`: for every input line, do one step without R1 and print the
    seconds that it took."""
    on = prepare(device)
    trainer = Timed(preset, batch, on)
    if variant == "compiled":
        for network in (trainer.G, trainer.E, trainer.D, trainer.classifier):
            network.compile(backend=backend)
        torch._functorch.config.donated_buffer = False
    if trainer.recorded.on:
        for _ in range(graphs.WARM_UP + 1):
            _plain_step(trainer)
    for _ in sys.stdin:
        print(_plain_step(trainer), flush=True)


def _plain_step(trainer: "Timed") -> float:
    """The seconds of one step without R1."""
    if trainer.step_number % trainer.config.r1_every == 0:
        trainer.progress["images"] += trainer.config.batch
    began = clock(trainer.device)
    trainer.step()
    return clock(trainer.device) - began


class Timed(train_gan.Trainer):
    """The GAN's trainer on noise, with an untrained classifier."""

    def __init__(self, preset: str, batch: int, device: torch.device):
        config = train_gan.Config("noise", "none", preset, batch=batch, device=str(device))
        size, n = PRESETS[preset].size, 4 * batch
        images = np.random.default_rng(0).integers(0, 255, (n, size, size), dtype=np.uint8)
        names = tuple(map(str, range(n)))
        splits = np.where(np.arange(n) % 8 < 6, "train", "val")
        labels = np.arange(n) % 2
        data = Dataset(images, labels, names, splits, names, ("NORMAL", "DISEASE"), "noise")
        super().__init__(config, data, _untrained(preset, device), device, World(device), None)

    def read_classifier(self) -> tuple[np.ndarray, np.ndarray]:
        doses = (self.data.labels * 0.7).astype(np.float32)
        return doses, self.model.logit(torch.from_numpy(doses)).numpy()


def _untrained(preset: str, device: torch.device) -> Model:
    """A model with all four networks, untrained."""
    torch.manual_seed(0)
    configs = PRESETS[preset]
    networks = {
        "classifier": Classifier(configs.classifier),
        "encoder": Encoder(configs.encoder),
        "generator": Generator(configs.generator),
        "discriminator": Discriminator(configs.discriminator),
    }
    for network in networks.values():
        network.to(device).eval().requires_grad_(False)
    size, classes = configs.size, ["NORMAL", "DISEASE"]
    info = {"size": size, "fit": "crop", "classes": classes, "logits": [-3.0, 3.0]}
    info |= {"provenance": {}, "metrics": {}, "thresholds": {}}
    mean = torch.zeros(1, 1, size, size, device=device)
    return Model(networks, info, {"mean_image": mean})


# ---- the explainer ----


def explanation(device: torch.device, preset: str, rounds: int, bar: console.Bar) -> dict:
    """Seconds that `explain` takes for one image with its defaults, in total and by part, and for one
    of as many as are best explained at once."""
    model, image = _explained(device, preset)
    runs, many = [], explain.at_once(model)
    bar.note(preset)
    for _ in range(1 + rounds):  # the first round is the warm-up
        parts: dict[str, float] = {}
        began = clock(device)
        explain.explain_group([image], model, timer=_timer(device, parts))
        alone = clock(device)
        explain.explain_group([image] * many, model)
        shared = (clock(device) - alone) / many
        runs.append({"total": alone - began, "at_once": many, "each_at_once": shared, **parts})
        bar.advance()
    medians = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
    return {"preset": preset, "unit": "s", **medians}


def _explained(device: torch.device, preset: str) -> tuple[Model, Path | np.ndarray]:
    """What is explained: a model that ships and its sample where the preset is theirs. On an untrained
    one, an integral's steps are up to chance."""
    for name in shipped():
        model = load_model(name, device)
        if model.generator.config == PRESETS[preset].generator:
            return model, explain.sample_image(name)
    size = PRESETS[preset].size
    image = np.random.default_rng(0).integers(0, 255, (size, size), dtype=np.uint8)
    return _untrained(preset, device), image


def _timer(device: torch.device, parts: dict[str, float]) -> explain.Timer:
    """A timer that stores the seconds of each part in `parts`."""

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = clock(device)
        yield
        parts[name] = clock(device) - began

    return timed
