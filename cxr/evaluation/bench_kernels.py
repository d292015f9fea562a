"""The speed of each operation, forward and backward, for every shape of a preset.

Speed is the number of bytes that have to be moved, divided by the median time, in GB/s. It is
compared with the device's copy bandwidth. The alternatives are ordinary autograd code with the same
storage type, eager and under `torch.compile`.
"""

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from cxr import console, ops
from cxr.networks import PRESETS, Generator, Preset

DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("c", "d", "eps", "strength", "b", "r", "s_next")
LARGE = 64 * 2**20  # bytes; for larger activations, only bandwidth matters


def kernels(
    device, presets: Sequence[str], batch: int, seconds: float, backend: str | None
) -> dict:
    """Time every operation and shape of the presets, forward and backward. backend: None leaves out
    the compiled alternative, which takes seconds for each."""
    torch._functorch.config.donated_buffer = False  # a backward pass is timed many times
    size = 2**30 if device.type == "cuda" else min(LARGE * 4, int(2**31 * seconds) or 1)
    bandwidth = copy_bandwidth(device, size, seconds)
    wanted = dict.fromkeys(case for name in presets for case in cases(PRESETS[name], batch))
    rows: list[dict] = []
    with console.progress("kernels", len(wanted) * len(DTYPES), unit="shapes") as bar:
        for dtype in DTYPES:
            for case in wanted:
                torch._dynamo.reset()
                rows += _time_case(case, dtype, device, seconds, backend, bandwidth)
                bar.advance()
    return {"copy_GBps": bandwidth, "rows": rows, "means": _means(rows)}


def _medians(calls: Sequence[Callable[[int], object]], device, seconds: float) -> list[float]:
    """Median seconds of each call, after a warm-up. The calls take turns, in a random order because
    a call may be slowed by the call before it. The argument of a call is the number of the turn."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(3):
        for call in calls:
            call(turn)
    end, turn = time.perf_counter() + seconds, 0
    while turn < 5 or (time.perf_counter() < end and turn < 1000):
        for i in random.Random(turn).sample(range(len(calls)), len(calls)):
            times[i].append(_time(calls[i], turn, device))
        turn += 1
    return [statistics.median(seconds_of_call) for seconds_of_call in times]


def _time(call: Callable[[int], object], turn: int, device: torch.device) -> float:
    """Seconds of one call. On a GPU only its own time counts: it sleeps until the host is ahead."""
    if device.type != "cuda":
        began = time.perf_counter()
        call(turn)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    torch.cuda._sleep(2**20)  # cycles, about half a millisecond
    start.record()
    call(turn)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max([os.sysconf(n) for n in os.sysconf_names if n == "SC_LEVEL3_CACHE_SIZE"] + [2**25])


def copy_bandwidth(device: torch.device, size: int, seconds: float) -> float:
    """The speed of copying `size` bytes in GB/s; bytes read and bytes written both count."""
    x, y = (torch.randn(size // 4, device=device) for _ in "xy")  # zeros may move faster
    return 2 * size / _medians([lambda _: y.copy_(x)], device, seconds)[0] / 1e9


@dataclass(frozen=True)
class Case:
    """An operation as a network calls it. `shape` is the shape of its first argument; `present` are
    the names of the optional arguments."""

    op: str
    shape: tuple[int, int, int, int]
    present: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor | None]:
        n, c, h, w = self.shape
        if self.op == "fir_mod_act":
            h, w = h - 1, w - 1
        shapes = dict(zip(NAMES, (self.shape, (n, c), (n, 1, h, w), (), (c,), (n, c), (n, c))))
        tensors = {
            name: torch.randn(shape, device=device) if name in ("c", *self.present) else None
            for name, shape in shapes.items()
        }
        c = tensors["c"].to(dtype, memory_format=torch.channels_last)
        return tensors | {"c": c}

    def fused(self, t: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        if self.op in ("mod_act", "fir_mod_act"):
            y, image = getattr(torch.ops.cxrgan, self.op)(*t.values())
            return tuple(x for x in (y, image) if x.numel())
        if self.op == "act_fir":
            return (ops.act_fir(t["c"], t["b"]),)
        return (ops.fir(t["c"], **({"up": 2} if self.op == "fir up" else {"down": 2})),)

    def plain(self, t: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        """The same operation as ordinary torch code, in the storage type throughout."""
        x, channels = t["c"], self.shape[1]
        if self.op == "fir up":
            kernel = _blur_kernel(x, 4.0)
            return (F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels),)
        if self.op == "fir down":
            return (F.conv2d(x, _blur_kernel(x, 1.0), stride=2, padding=1, groups=channels),)
        if self.op == "act_fir":
            y = _plain_activation(x + t["b"][:, None, None])
            return (F.conv2d(y, _blur_kernel(x, 1.0), stride=2, padding=1, groups=channels),)
        if self.op == "fir_mod_act":
            x = F.conv2d(x, _blur_kernel(x, 4.0), padding=1, groups=channels)
        if t["d"] is not None:
            x = x * t["d"][:, :, None, None] + t["strength"] * t["eps"]
        y = _plain_activation(x + t["b"][:, None, None])
        outputs = () if t["s_next"] is None and t["r"] is not None else (y,)
        if t["s_next"] is not None:
            outputs = (y * t["s_next"][:, :, None, None],)
        if t["r"] is not None:
            outputs += ((y * t["r"][:, :, None, None]).sum(1, keepdim=True),)
        return outputs


def _plain_activation(x: Tensor) -> Tensor:
    return (F.leaky_relu(x, ops.SLOPE) * ops.GAIN).clamp(-ops.CLAMP, ops.CLAMP)


def _blur_kernel(x: Tensor, gain: float) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    return (torch.outer(taps, taps) * gain).expand(x.shape[1], 1, 4, 4)


def cases(preset: Preset, batch: int) -> list[Case]:
    """Every call of an operation in a preset's generator and discriminator, each once."""
    calls, size, config = [], 4, preset.generator
    full = ("d", "eps", "strength", "b")
    layers = Generator(config).layers
    for i, layer in enumerate(layers):
        size *= 2 if layer.up else 1
        present = full + (("r",) if layer.image_style else ())
        present += ("s_next",) if i + 1 < len(layers) else ()
        shape = (batch, layer.conv.raw.shape[0], size + layer.up, size + layer.up)
        calls.append(Case("fir_mod_act" if layer.up else "mod_act", shape, present))
        if layer.up and layer.image_style:
            calls.append(Case("fir up", (batch, 1, size // 2, size // 2)))
    channels, size = preset.discriminator.channels, preset.size
    calls.append(Case("mod_act", (batch, channels[0], size, size), ("b",)))
    for inputs, outputs in pairwise(channels):
        calls.append(Case("act_fir", (batch, inputs, size, size), ("b",)))
        calls.append(Case("fir down", (batch, inputs, size, size)))
        size //= 2
        calls.append(Case("mod_act", (batch, outputs, size, size), ("b",)))
    return list(dict.fromkeys(calls))


def _time_case(
    case: Case, dtype, device, seconds: float, backend: str | None, bandwidth: float
) -> list:
    """Time a case: a row for the forward pass and a row for the backward pass."""
    variants = {"fused": case.fused, "again": case.fused, "eager": case.plain}
    if backend:
        variants["compiled"] = torch.compile(case.plain, backend=backend, dynamic=False)
    example = case.inputs(dtype, device)
    outputs = case.fused(example)
    activations = sum(map(_bytes, (example["c"], *outputs)))
    sets = min(max(2, math.ceil(2 * _cache_bytes(device) / activations)), 64)
    forward, backward = [], []
    for name, function in variants.items():
        wide = name in ("fused", "again")  # small vectors are in fp32, as in training
        once = [_prepare(case, function, dtype, device, wide) for _ in range(sets)]
        forward.append(_forward_call(function, once))
        backward.append(_backward_call(once))
    vectors = sum(_bytes(example[name]) for name in NAMES[1:] if example[name] is not None)
    gradients = vectors - (_bytes(example["eps"]) if example["eps"] is not None else 0)
    needed = activations + vectors
    moved = {"forward": needed, "backward": needed + _bytes(example["c"]) + gradients}
    if case.op.startswith("fir "):  # linear: nothing is saved for the backward pass
        moved["backward"] = needed
    rows = []
    for name, calls in (("forward", forward), ("backward", backward)):
        fused, again, eager, *compiled = _medians(calls, device, seconds)
        speed = moved[name] / fused / 1e9
        rows.append(
            {
                "op": case.op + (" image" if "r" in case.present else ""),
                "shape": "x".join(map(str, case.shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "pass": name,
                "MB": moved[name] / 1e6,
                "ms": fused * 1e3,
                "again_ms": again * 1e3,
                "GBps": speed,
                "of_copy": speed / bandwidth,
                "vs_eager": eager / fused,
                "vs_compiled": compiled[0] / fused if compiled else None,
            }
        )
    return rows


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _prepare(case: Case, function, dtype, device, wide: bool) -> tuple:
    """Inputs of `function`, those that get gradients, its outputs, and gradients of its outputs."""
    inputs = case.inputs(dtype, device)
    if not wide:
        inputs = {k: None if x is None else x.to(dtype) for k, x in inputs.items()}
    wanted = [x for k, x in inputs.items() if x is not None and k != "eps"]
    for x in wanted:
        x.requires_grad_()
    outputs = function(inputs)
    gradients = [torch.randn_like(y) for y in outputs]
    return inputs, wanted, outputs, gradients


def _forward_call(function: Callable, sets: list[tuple]) -> Callable[[int], object]:
    def call(turn: int):
        with torch.no_grad():
            return function(sets[turn % len(sets)][0])

    return call


def _backward_call(sets: list[tuple]) -> Callable[[int], object]:
    def call(turn: int):
        _, wanted, outputs, gradients = sets[turn % len(sets)]
        return torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)

    return call


def _means(rows: list[dict]) -> list[dict]:
    """For each type and pass: the geometric means and minima of the ratios, and the lowest share of
    the copy bandwidth among large activations."""
    means = []
    for key in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
        group = [row for row in rows if (row["dtype"], row["pass"]) == key]
        large = [row["of_copy"] for row in group if row["MB"] * 1e6 >= LARGE]
        mean = {"dtype": key[0], "pass": key[1], "lowest_of_copy": min(large, default=None)}
        for name in ("vs_eager", "vs_compiled"):
            ratios = [row[name] for row in group if row[name] is not None]
            mean[name] = statistics.geometric_mean(ratios) if ratios else None
            mean[f"lowest_{name}"] = min(ratios, default=None)
        means.append(mean)
    return means
