"""The kernels, the training step and the explainer against their alternatives.

`bench` measures and returns one dictionary; `write` keeps it as JSON.
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

from cxr import CxrError, UsageError, __version__, build, console, explain, train_gan
from cxr.checkpoints import Model
from cxr.datasets import Dataset
from cxr.device import prepare
from cxr.evaluation.bench_kernels import kernels
from cxr.files import write_text
from cxr.networks import PRESETS, Classifier, Discriminator, Encoder, Generator
from cxr.training import World

STEPS = ("off", "on", "compiled")  # the kernels; "compiled" has them on and compiles the networks


def bench(
    what: str = "all",
    device: str = "auto",
    presets: Sequence[str] = (),
    batch: int = 32,
    seconds: float = 1.0,
    rounds: int | None = None,
    backend: str = "inductor",
) -> dict:
    """Measure `kernels`, `step`, `explain`, or `all` of them, and show the tables.

    Parameters
    ----------
    presets : whose shapes and networks are taken; by default cxr64 and cxr128, on a GPU cxr256, too
    batch : images in a batch of the GAN
    seconds : spent on each operation and shape, after the warm-up
    rounds : of training steps and of explanations; by default 20 on a GPU, 5 elsewhere
    backend : of `torch.compile`
    """
    if batch % 16 and what in ("step", "all"):
        raise UsageError(f"--batch {batch}: the training step needs a multiple of 16")
    on = prepare(device)
    gpu = on.type == "cuda"
    presets = presets or (("cxr64", "cxr128", "cxr256") if gpu else ("cxr64", "cxr128"))
    rounds = rounds or (20 if gpu else 5)
    found = {"about": _about(on)}
    if what in ("kernels", "all"):
        found["kernels"] = kernels(on, presets, batch, seconds, backend)
        _show_kernels(found["kernels"])
    if what in ("step", "all"):
        total = len(presets) * len(STEPS) * (WARM_UP + rounds)
        with console.progress("training step", total, unit="steps") as bar:
            found["step"] = [step(on, preset, batch, rounds, backend, bar) for preset in presets]
        _show("training step", found["step"])
    if what in ("explain", "all"):
        with console.progress("explain", len(presets) * (1 + rounds)) as bar:
            found["explain"] = [explanation(on, preset, rounds, bar) for preset in presets]
        _show("explain", found["explain"])
    return found


def write(found: dict, path: str | Path) -> None:
    """Keep what `bench` found."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1) + "\n")


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
    """A table of rows of like keys; a list is left out, None a dash."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list)]
    cells = [
        tuple(f"{v:.3g}" if isinstance(v, float) else "-" if v is None else v for v in values)
        for values in ([row[key] for key in keys] for row in rows)
    ]
    console.table(title, tuple(key.replace("_", " ") for key in keys), cells)


def _show_kernels(found: dict) -> None:
    """A table for each type and pass, as narrow as a terminal; the rest is in the JSON."""
    shown = ("op", "shape", "ms", "of_copy", "vs_eager", "vs_compiled")
    for mean in found["means"]:
        rows = [row for row in found["rows"] if all(row[k] == mean[k] for k in ("dtype", "pass"))]
        _show(f"{mean['dtype']}, {mean['pass']}", [{k: row[k] for k in shown} for row in rows])
    _show(f"geometric means; copy bandwidth {found['copy_GBps']:.0f} GB/s", found["means"])


def _clock(device: torch.device) -> float:
    """Seconds, when the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---- the training step ----

WARM_UP = 2  # steps, the first of which compiles


def step(
    device: torch.device, preset: str, batch: int, rounds: int, backend: str, bar: console.Bar
) -> dict:
    """Images per second of the GAN's training step, in a process for each variant, in turns."""
    order = json.dumps([str(device), preset, batch, backend])
    children = {variant: _child(variant, order) for variant in STEPS}
    times: dict[str, list[float]] = {variant: [] for variant in STEPS}
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
    times = {variant: of[WARM_UP:] for variant, of in times.items()}
    medians = {variant: statistics.median(of) for variant, of in times.items()}
    return {
        "preset": preset,
        "batch": batch,
        "unit": "images/s",
        **{variant: batch / t for variant, t in medians.items()},
        "on_vs_off": medians["off"] / medians["on"],
        "compiled_vs_off": medians["off"] / medians["compiled"],
        "seconds": [times],
    }


def _child(variant: str, order: str) -> subprocess.Popen:
    environment = {**os.environ, "CXRGAN_KERNELS": "off" if variant == "off" else "auto"}
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    code = f"from cxr.evaluation import bench; bench.serve({variant!r}, *{order})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def _ask(child: subprocess.Popen) -> float:
    """Have a child do one step; its seconds."""
    child.stdin.write("step\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise CxrError("a process of the benchmark ended early: its error stands above")
    return float(answer)


def serve(variant: str, device: str, preset: str, batch: int, backend: str) -> None:
    """A child of `step`: for every line that comes in, one step without R1, and its seconds."""
    on = prepare(device)
    trainer = Timed(preset, batch, on)
    if variant == "compiled":
        for network in (trainer.G, trainer.E, trainer.D, trainer.classifier):
            network.compile(backend=backend)
        torch._functorch.config.donated_buffer = False
    for _ in sys.stdin:
        if trainer.step_number % trainer.config.r1_every == 0:
            trainer.progress["images"] += batch
        began = _clock(on)
        trainer.step()
        print(_clock(on) - began, flush=True)


class Timed(train_gan.Trainer):
    """The GAN's trainer on noise, with an untrained classifier."""

    def __init__(self, preset: str, batch: int, device: torch.device):
        config = train_gan.Config("noise", "none", preset, batch=batch, device=str(device))
        size, n = PRESETS[preset].size, 4 * batch
        images = np.random.default_rng(0).integers(0, 255, (n, size, size), dtype=np.uint8)
        names = tuple(map(str, range(n)))
        splits = np.where(np.arange(n) % 8 < 6, "train", "val")
        labels = np.arange(n) % 2
        data = Dataset(images, labels, names, splits, names, ("NORMAL", "SICK"), "noise")
        super().__init__(config, data, _untrained(preset, device), device, World(device), None)

    def read_classifier(self) -> tuple[np.ndarray, np.ndarray]:
        doses = (self.data.labels * 0.7).astype(np.float32)
        return doses, self.model.logit(torch.from_numpy(doses)).numpy()


def _untrained(preset: str, device: torch.device) -> Model:
    """All four networks as they begin."""
    torch.manual_seed(0)
    of = PRESETS[preset]
    networks = {
        "classifier": Classifier(of.classifier),
        "encoder": Encoder(of.encoder),
        "generator": Generator(of.generator),
        "discriminator": Discriminator(of.discriminator),
    }
    for network in networks.values():
        network.to(device).eval().requires_grad_(False)
    info = {"size": of.size, "fit": "crop", "classes": ["NORMAL", "SICK"], "logits": [-3.0, 3.0]}
    info |= {"provenance": {}, "metrics": {}, "thresholds": {}}
    mean = torch.zeros(1, 1, of.size, of.size, device=device)
    return Model(networks, info, {"mean_image": mean})


# ---- the explainer ----


def explanation(device: torch.device, preset: str, rounds: int, bar: console.Bar) -> dict:
    """Seconds for one image with the defaults of `explain`, and where they go."""
    size = PRESETS[preset].size
    model = _untrained(preset, device)
    image = np.random.default_rng(0).integers(0, 255, (size, size), dtype=np.uint8)
    runs = []
    bar.note(preset)
    for _ in range(1 + rounds):  # the first warms up
        parts: dict[str, float] = {}
        began = _clock(device)
        explain.explain(image, model, device=str(device), timer=_timer(device, parts))
        runs.append({"total": _clock(device) - began, **parts})
        bar.advance()
    medians = {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
    return {"preset": preset, "unit": "s", **medians}


def _timer(device: torch.device, parts: dict[str, float]) -> explain.Timer:
    """A timer that leaves the seconds of each part in `parts`."""

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = _clock(device)
        yield
        parts[name] = _clock(device) - began

    return timed
