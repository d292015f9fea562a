"""What both training loops share: the device, the run folder, resuming, interrupts, processes.

Nothing random is kept between steps: every draw comes from a generator seeded by (seed, step), so
that a run resumed after a `kill -9` is the very run it would have been, and so that each of
several processes can take its share of one global draw.
"""

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cxr import CxrError, UsageError, checkpoints, console
from cxr.files import write_text


class World:
    """The processes that `torchrun` started, or the only one."""

    def __init__(self, device: torch.device) -> None:
        self.size, self.rank = (
            int(os.environ.get("WORLD_SIZE", "1")),
            int(os.environ.get("RANK", "0")),
        )
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        self.first = self.rank == 0

    def share(self, drawn: Tensor, blocks: int = 1) -> Tensor:
        """This process's rows of what is drawn for all: a share of each of so many blocks."""
        return torch.cat([block.chunk(self.size)[self.rank] for block in drawn.chunk(blocks)])

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients over the processes in one flat all-reduce."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a small tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in one of the processes at least."""
        if self.size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.mean(torch.tensor([float(flag)], device=device)) > 0)

    def close(self) -> None:
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move `average` towards `network`; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for a, b in zip(average.buffers(), network.buffers()):
        a.copy_(b)


class Run:
    """A run folder: `config.json`, `log.jsonl`, `state.safetensors`, the model file, samples."""

    def __init__(self, folder: str | Path, config, resume: bool, world: World):
        self.folder, self.world = Path(folder), world
        self.state = self.folder / "state.safetensors"
        self.model = self.folder / "model.safetensors"
        if resume:
            self._compare(asdict(config))
        elif self.state.exists() or self.model.exists():
            raise UsageError(f"{folder} holds a run: go on with --resume, or choose another --out")
        if world.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(
                self.folder / "config.json", json.dumps(asdict(config), indent=1, default=str)
            )
            if not resume:
                write_text(self.folder / "log.jsonl", "")
        world.any(False)  # nobody goes on, and writes a state, before all have looked for one

    def _compare(self, now: dict) -> None:
        """A run goes on as it began; only its length may change."""
        if not self.state.exists():
            raise UsageError(f"{self.folder} holds no run to resume: leave --resume out")
        try:
            before = json.loads((self.folder / "config.json").read_text())
        except ValueError:
            raise CxrError(f"{self.folder}/config.json is damaged: begin a new run") from None
        now = json.loads(json.dumps(now, default=str))
        for name in now:
            if name not in ("images", "device") and now[name] != before.get(name):
                raise UsageError(
                    f"{self.folder} was begun with {name} = {before.get(name)}, not {now[name]}: "
                    "resume with the same options"
                )

    def save(self, parts: dict, progress: dict) -> None:
        """Write the state; `progress` is what the loop needs besides tensors."""
        if self.world.first:
            checkpoints.save(self.state, checkpoints.pack(parts), progress)

    def restore(self, parts: dict) -> dict:
        """Put the state back, cut the log back to it, and return its progress."""
        tensors, progress = checkpoints.load(self.state)
        try:
            checkpoints.unpack(tensors, parts)
        except (RuntimeError, ValueError, KeyError):
            raise CxrError(f"{self.state} is another version's or damaged: begin anew") from None
        if self.world.first:
            rows = [row for row in self.rows() if row["images"] <= progress["images"]]
            write_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        return progress

    def log(self, row: dict) -> None:
        """Append a line to the log."""
        if self.world.first:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        """The log so far; a last line that a crash cut short is left out."""
        path, rows = self.folder / "log.jsonl", []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows


def loop(trainer, run: Run, title: str) -> None:
    """Step `trainer` to the end of its images; at every tick report, log and save.

    `trainer` has `config` (batch, images, tick), `progress` (images), `parts()`, `step()` that
    returns its terms, `report()` that returns more of them, `summary(row)`, and `done()`.
    Raises `Interrupted` after Ctrl-C, with the state saved, and CxrError at a loss that is not a
    number, with the last good state kept.
    """
    config, progress, world = trainer.config, trainer.progress, trainer.world
    bars = console.progress(title, config.images, progress["images"], quiet=not world.first)
    if not progress["images"]:
        run.save(trainer.parts(), progress)
    with interruptible() as caught, bars as bar:
        terms, began, start = [], time.perf_counter(), progress["images"]
        while progress["images"] < config.images and not trainer.done():
            before = progress["images"]
            terms.append(trainer.step())
            bar.advance(config.batch)
            finished = progress["images"] >= config.images
            stop = world.any(bool(caught)) and not finished
            ticked = progress["images"] // config.tick > before // config.tick
            if not (ticked or stop or finished):
                continue
            row = {"images": progress["images"], **_means(terms, world)}
            _refuse_divergence(row, run, start)
            if ticked or finished:
                speed = (progress["images"] - start) / (time.perf_counter() - began)
                row |= {"images_per_second": speed, **trainer.report()}
                _refuse_divergence(row, run, start)
                run.log(row)
                bar.note(trainer.summary(row))
                terms, began, start = [], time.perf_counter(), progress["images"]
            run.save(trainer.parts(), progress)
            if stop:
                raise Interrupted(
                    f"stopped after {progress['images']} images, saved in {run.folder}: "
                    "go on with the same command and --resume"
                )


def _refuse_divergence(row: dict[str, float], run: Run, start: int) -> None:
    if not all(math.isfinite(value) for value in row.values()):
        raise CxrError(
            f"training diverged before {row['images']} images: the last good state, of {start} "
            f"images, is kept in {run.folder}; begin again with another --seed and --out"
        )


def _means(terms: list[dict[str, Tensor]], world: World) -> dict[str, float]:
    """The mean of each term over the steps that had it, and over the processes."""
    names = {name: None for step in terms for name in step}
    means = [torch.stack([s[name] for s in terms if name in s]).float().mean() for name in names]
    return dict(zip(names, world.mean(torch.stack(means)).tolist()))


class Interrupted(CxrError):
    """Ctrl-C, after the state was saved."""

    status = 130


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Within it, Ctrl-C and SIGTERM only leave their number in the list that is yielded, so that
    the step under way ends; a second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
