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
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cxr.evaluation.bench import Timed

ROOT = Path(__file__).resolve().parents[1]
PYTHON, CXRGAN = sys.executable, [sys.executable, str(ROOT / "cxrgan.py")]
SELF = [PYTHON, str(Path(__file__).resolve())]


def parts(options: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """{name: (seconds at most, command)}, what is most wanted first."""
    device, preset, batch = options.device, options.preset, str(options.batch)
    bench = [*CXRGAN, "bench", "--device", device, "--preset", preset, "--batch", batch]
    own = [*SELF, str(options.out), "--device", device, "--preset", preset, "--batch", batch]
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    small = [*SELF, str(options.out), "--device", device, "--preset", "tiny", "--batch", "16"]
    return {
        "machine": (5, ["nvidia-smi"] if device.startswith("cuda") else ["lscpu"]),
        "info": (45, [*CXRGAN, "info"]),  # compiles the kernels
        "tests": (70, [PYTHON, "-m", "pytest", "-q", "tests/test_graphs.py", "tests/test_ops.py"]),
        "step": (90, [*bench, "step", "--out", str(options.out / "step.json")]),
        "kernels": (40, [*bench, "kernels", "--seconds", "0.1", "--out", str(options.out / "kernels.json")]),
        "explain": (25, [*bench, "explain", "--out", str(options.out / "explain.json")]),
        "profile": (25, [*own, "--part", "profile"]),
        "memcheck": (30, [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *small, "--part", "steps"]),
        "racecheck": (30, [sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *small, "--part", "steps"]),
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
    trainer = Timed(options.preset, options.batch, torch.device(options.device))
    for _ in range(2):
        terms = trainer.step()
    print({name: round(value.item(), 4) for name, value in terms.items()})


def profiled(options: argparse.Namespace) -> None:
    """Where one training step spends its time, after a warm-up."""
    trainer = Timed(options.preset, options.batch, torch.device(options.device))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="cxr128")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--part", choices=("steps", "profile"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return steps(options) if options.part == "steps" else profiled(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "summary.md", "w", buffering=1) as summary:
        summary.write("| part | status | time | last line |\n|---|---|---|---|\n")
        for name, (limit, command) in parts(options).items():
            line = run(name, limit, command, options.out)
            print(line, flush=True)
            summary.write(line + "\n")


if __name__ == "__main__":
    main()
