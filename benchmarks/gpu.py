"""All that only a GPU can tell, in one call of six minutes at most: each part within a time limit of its
own and written at once, so that what fails late costs itself alone.

    python benchmarks/gpu.py OUT [--device cuda] [--preset cxr128] [--batch 64]

OUT gets a log of each part, the JSON files of `bench`, and summary.md. On a CPU (`--device cpu
--preset tiny --batch 16`) it rehearses.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cxr import train_gan
from cxr.device import prepare
from cxr.evaluation import bench
from cxr.evaluation.bench import Timed

ROOT = Path(__file__).resolve().parents[1]
PYTHON, CXRGAN = sys.executable, [sys.executable, str(ROOT / "cxrgan.py")]
SELF = [PYTHON, str(Path(__file__).resolve())]


def parts(options: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """{name: (seconds at most, command)}, what is most wanted first."""
    device, preset, batch = options.device, options.preset, str(options.batch)
    timed = [*CXRGAN, "bench", "--device", device, "--preset", preset, "--batch", batch]
    own = [*SELF, str(options.out), "--device", device, "--preset", preset, "--batch", batch]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    checked = ["--kernel-name", "kns=cxrgan", "--error-exitcode", "9"]  # our kernels alone
    chosen = "cuda and (parts_a_larger or agrees)"
    ops = [PYTHON, "-m", "pytest", "-q", "tests/test_ops.py", "-k", chosen]
    small = [*SELF, str(options.out), "--device", device, "--preset", "tiny", "--batch", "16"]
    return {
        "machine": (5, ["nvidia-smi"] if device.startswith("cuda") else ["lscpu"]),
        "info": (45, [*CXRGAN, "info"]),  # compiles the kernels
        "tests": (60, [PYTHON, "-m", "pytest", "-q", "tests/test_graphs.py", "tests/test_ops.py"]),
        "pace": (45, [*own, "--part", "pace"]),
        "kernels": (20, [*own, "--part", "kernels"]),
        "step": (75, [*timed, "step", "--out", str(options.out / "step.json")]),
        "explain": (25, [*timed, "explain", "--out", str(options.out / "explain.json")]),
        "profile": (20, [*own, "--part", "profile"]),
        "memcheck": (30, [sanitizer, "--tool", "memcheck", *checked, *small, "--part", "steps"]),
        "racecheck": (35, [sanitizer, "--tool", "racecheck", *checked, *ops]),  # cuDNN does not run in it
    }  # fmt: skip


def run(name: str, limit: int, command: list[str], out: Path) -> str:
    """Run one part with its log in `out`. Returns its line of the summary."""
    environment = os.environ | {"CXRGAN_KERNELS": "require", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with open(out / f"{name}.log", "w") as log:
        try:
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
            status = str(process.wait(limit))
        except FileNotFoundError:
            status = f"no {command[0]} here"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {limit} s"
    last = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
    return f"| {name} | {status} | {time.perf_counter() - start:.0f} s | {''.join(last)[:90]} |"


def steps(options: argparse.Namespace) -> None:
    """Two training steps, the first with R1: every operation forward and backward."""
    trainer = Timed(options.preset, options.batch, prepare(options.device))
    for _ in range(2):
        terms = trainer.step()
    print({name: round(value.item(), 4) for name, value in terms.items()})


def pace(options: argparse.Namespace) -> None:
    """Images per second of training as it runs, draws included, and what of it is the GPU's: steps on
    one batch that is there already."""
    on, runs = prepare(options.device), [(options.preset, n, "auto") for n in (options.batch, 16)]
    runs += [(options.preset, options.batch, "off")]
    runs += [("cxr256", train_gan.fitting(256, on), "auto")] * (on.type == "cuda")
    for preset, batch, mode in runs:
        os.environ["CXRGAN_GRAPHS"] = mode
        trainer = Timed(preset, batch, on)
        for _ in range(2 * trainer.config.r1_every):  # both kinds are recorded
            trainer.step()
        drawn = trainer.draws((trainer.step_number, 0.3))
        alone = [seconds(on, partial(trainer.recorded, drawn, kind)) for kind in (False, True)]
        shown = {"preset": preset, "batch": batch, "recorded": sorted(trainer.recorded.replays)}
        shown["images/s"] = round(batch / seconds(on, trainer.step))
        shown["ms a step on one batch, without R1 and with"] = [round(1e3 * s, 1) for s in alone]
        shown["ms a draw"] = round(1e3 * seconds(on, partial(trainer.draws.make, 0, 0.3)), 1)
        print(shown, flush=True)
        del trainer, drawn  # its memory, before the next takes its own


def seconds(device: torch.device, work, times: int = 16) -> float:
    """Of one call among several, the device's work done."""
    bench.clock(device)
    began = bench.clock(device)
    for _ in range(times):
        work()
    return (bench.clock(device) - began) / times


def kernels(options: argparse.Namespace) -> None:
    """Each operation against its floor and eager code; compiled code takes minutes to compile."""
    what = {"device": options.device, "presets": [options.preset], "batch": options.batch}
    found = bench.bench("kernels", **what, seconds=0.03, backend=None)
    bench.write(found, options.out / "kernels.json")


def profiled(options: argparse.Namespace) -> None:
    """Where one training step spends its time, after a warm-up."""
    trainer = Timed(options.preset, options.batch, prepare(options.device))
    for _ in range(3):
        trainer.step()
    gpu = options.device.startswith("cuda")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as seen:
        trainer.step()
        if gpu:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=60))


PARTS = {"pace": pace, "kernels": kernels, "profile": profiled, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="cxr128")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return PARTS[options.part](options)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "summary.md", "w", buffering=1) as summary:
        summary.write("| part | status | time | last line |\n|---|---|---|---|\n")
        for name, (limit, command) in parts(options).items():
            line = run(name, limit, command, options.out)
            print(line, flush=True)
            summary.write(line + "\n")


if __name__ == "__main__":
    main()
