"""A training step on a GPU without waiting for Python: its work recorded as a CUDA graph, its
draws made ahead.

After PyTorch's notes on CUDA graphs (whole-network capture).
"""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from cxr import UsageError, console

WARM_UP = 12  # steps before the first is recorded: libraries choose their algorithms in them
THREADS = 3  # that draw for the steps to come: in one, a draw takes as long as a GPU's step
SETTINGS = ("auto", "off", "require")

T = TypeVar("T")  # tensors in named tuples, lists and dictionaries
Terms = dict[str, Tensor]


def setting() -> str:
    """What CXRGAN_GRAPHS says: `auto` (the default), `off`, or `require`, under which a step that
    cannot be recorded is an error. Raises UsageError for anything else."""
    mode = os.environ.get("CXRGAN_GRAPHS") or "auto"
    if mode not in SETTINGS:
        raise UsageError(f"CXRGAN_GRAPHS is '{mode}': set it to auto, off or require")
    return mode


def wanted(device: torch.device, processes: int) -> bool:
    """Whether steps are recorded: on a GPU, by a single process, unless CXRGAN_GRAPHS is off."""
    return setting() != "off" and device.type == "cuda" and processes == 1


def placed(batch: T, device: torch.device, copy: bool = False) -> T:
    """The batch's tensors on the device. copy: even those that are there."""
    return _pytree.tree_map(lambda t: t.to(device, non_blocking=True, copy=copy), batch)


class Recorded:
    """Work on batches of always the same shapes; with `on`, recorded once for each kind of it, then
    replayed on the batch of the day.

    work: a function from a batch and its kind to scalar tensors. It reads no value back, and all
    that it remembers are tensors that it changes in place: Python runs it only while it is recorded.
    """

    def __init__(self, work: Callable[[T, Hashable], Terms], device: torch.device, on: bool):
        self.work, self.device, self.on = work, device, on
        self.replays: dict[Hashable, Callable[[], Terms]] = {}
        self.known: set[Hashable] = set()  # kinds that have run
        self.count = 0  # runs so far, to WARM_UP
        self.static = None  # the batch that every replay reads
        self.stream = torch.cuda.Stream(device) if on else None  # on which it is recorded

    def __call__(self, batch: T, kind: Hashable) -> Terms:
        if not self.on:
            return self.work(placed(batch, self.device), kind)
        self._show(batch)
        if kind not in self.replays and (self.count < WARM_UP or kind not in self.known):
            self.count += 1
            self.known.add(kind)
            return self._aside(lambda: self.work(self.static, kind))
        try:
            if kind not in self.replays:
                self.replays[kind] = self._record(kind)
        except RuntimeError as error:
            if setting() == "require":
                raise
            self.on = False
            self.replays.clear()
            why = str(error).strip().split("\n")[0]
            console.warn(
                f"going on slower, since the step cannot be recorded as a CUDA graph: {why}"
            )
            return self.work(self.static, kind)
        return {name: term.clone() for name, term in self.replays[kind]().items()}

    def _show(self, batch: T) -> None:
        """Copy the batch to where every replay reads it."""
        if self.static is None:
            self.static = placed(batch, self.device, copy=True)
        else:
            copy = partial(Tensor.copy_, non_blocking=True)
            _pytree.tree_map(copy, self.static, batch)

    def _aside(self, work: Callable[[], Terms]) -> Terms:
        """Run on the stream on which it will be recorded."""
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            terms = work()
        now.wait_stream(self.stream)
        return terms

    def _record(self, kind: Hashable) -> Callable[[], Terms]:
        """The graph of one kind of work, as a function that replays it. Recording runs nothing. What
        another thread does, as drawing the next batch, is none of its business."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            terms = self.work(self.static, kind)

        def replay() -> Terms:
            graph.replay()
            return terms

        return replay


class Ahead:
    """What a function makes of one thing after the other; with `on`, made in threads while the
    caller works on those before, in memory from which a GPU copies while it computes."""

    def __init__(self, make: Callable[..., T], on: bool):
        self.make, self.on = make, on
        self.workers = ThreadPoolExecutor(THREADS) if on else None
        self.waiting: dict[tuple, Future] = {}

    def __call__(self, arguments: tuple, *following: tuple) -> T:
        """What `make` gives for the arguments. following: those of the calls to come."""
        if not self.on:
            return self.make(*arguments)
        wanted = (arguments, *following)
        self.waiting = {w: self.waiting.get(w) or self._begin(w) for w in wanted}
        return self.waiting.pop(arguments).result()

    def _begin(self, arguments: tuple) -> Future:
        return self.workers.submit(self._pinned, arguments)

    def _pinned(self, arguments: tuple) -> T:
        return _pytree.tree_map(Tensor.pin_memory, self.make(*arguments))
