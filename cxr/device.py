"""The machine: the device, its arithmetic, its random numbers, and a description of it.

No state of a random generator is kept between steps. Each draw uses a new generator with a seed
made from (seed, step, purpose).
"""

import contextlib
import ctypes
import os
import time
from pathlib import Path

import torch

from cxr import UsageError, build, checkpoints, console
from cxr.data import cache


def find_device(name: str = "auto") -> torch.device:
    """The device called `auto`, `cpu` or `cuda[:N]`. Raises UsageError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: say auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: say auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: torch sees no such GPU here; say --device cpu")
    return device


def prepare(name: str = "auto") -> torch.device:
    """Find a device, load the native kernels and set up the memory allocator."""
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    torch.set_flush_denormal(True)  # Adam's moments of unused weights decay to denormals: slow
    build.load()
    return device


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next activations. Getting fresh pages from the system
    takes longer than the arithmetic done on them."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: never map a tensor on its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the heap's top


def share_cores() -> None:
    """Compute with one thread for each idle core, unless OMP_NUM_THREADS says how many. OpenMP's
    threads wait for each other by spinning: where one has to share its core with another program,
    all of them wait for it, and two threads are five times slower than one."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    idle, threads = _idle_cores(0.2), torch.get_num_threads()
    if idle is None or round(idle) >= threads:
        return
    torch.set_num_threads(max(1, round(idle)))
    console.say(
        f"of {os.cpu_count()} cores {idle:.1f} are idle: computing with "
        f"{torch.get_num_threads()} of {threads} threads (OMP_NUM_THREADS={threads} takes all)"
    )


def _idle_cores(seconds: float) -> float | None:
    """How many cores are idle, on average over so many seconds; None where it cannot be told."""
    try:
        ticks = []
        for pause in (seconds, 0):
            total = Path("/proc/stat").read_text().split("\n", 1)[0].split()
            ticks.append(int(total[4]) + int(total[5]))  # idle, and waiting for the disk
            time.sleep(pause)
        return (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / seconds
    except (OSError, ValueError, IndexError):
        return None


def half_precision(device: torch.device) -> torch.autocast:
    """Autocast to bf16 if the hardware supports bf16 multiplication, else a disabled autocast."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=able)


def rng(*seed: int) -> torch.Generator:
    """A CPU random generator, seeded from all of these numbers: (seed, step, purpose)."""
    mixed = 0
    for number in seed:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 25)
    return torch.Generator().manual_seed(mixed)


def machine() -> list[tuple[str, str]]:
    """Names and values to show: device, arithmetic, kernels, shipped models, cache folder."""
    device = prepare()
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
        ("cache", str(cache.writable_folder())),
    ]
