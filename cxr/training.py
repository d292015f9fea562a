"""What both training loops share: the device, the run folder, resuming, interrupts, processes.

Nothing random is kept between steps: every draw comes from a generator seeded by (seed, step), so
that a run resumed after a `kill -9` is the very run it would have been, and so that each of
several processes can take its share of one global draw.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cxr import CxrError, Interrupted, UsageError, checkpoints, console, runpage
from cxr.data import identity
from cxr.datasets import Dataset
from cxr.files import append_text, keep, only_writer, write_text
from cxr.options import stopping
from cxr.schema import Misfit, check_classes

SAVE_EVERY = 300  # seconds, and at every tick
FREE = ("images", "device", "data")  # options that may change when a run goes on
FILES = ("masks", "boxes", "start", "classifier")  # those of which the folder may
WRITTEN = ("config.json", "log.jsonl", "index.html", "samples")  # what a run writes over


def same_length(options: dict, out: str | Path, resume: bool) -> dict:
    """A command's options. Without `images`, a resumed run keeps its own number, and a new one has
    the default."""
    if options["images"] is not None:
        return options
    kept = {name: value for name, value in options.items() if name != "images"}
    if resume:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            kept["images"] = int(json.loads((Path(out) / "config.json").read_text())["images"])
    return kept  # `Run` says what is wrong with a config.json


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
    """A run folder, written by one process at a time: `config.json`, `log.jsonl`, the page, the
    model file, samples, and the state with the one before it.

    Within its context the folder is locked. `data` is what the run trains on, `marks` of
    `places.marked` with it: a digest of both is kept in the state, so that a run goes on with the
    same images, wherever they lie by then.
    """

    def __init__(
        self,
        folder: str | Path,
        config,
        data: Dataset,
        resume: bool,
        world: World,
        marks: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.folder, self.world, self.config = Path(folder), world, config
        self.state = self.folder / "state.safetensors"
        self.previous = self.folder / "state.previous.safetensors"
        self.model = self.folder / "model.safetensors"
        self.page = self.folder / "index.html"
        self.data, self.resume = data, resume
        self.digests = identity.of_rows(data, marks)
        self.sound = False  # whether `state` is one to go back to
        self.saved = 0  # images that the last state has seen
        self._open = contextlib.ExitStack()

    def __enter__(self):
        with contextlib.ExitStack() as opened:
            if self.resume and not self._has_state():
                raise UsageError(f"{self.folder} holds no run to resume: leave --resume out")
            if self.world.first:
                if foreign := self._foreign():
                    raise UsageError(
                        f"{self.folder} holds {foreign}, which is of no run: choose another --out"
                    )
                opened.enter_context(only_writer(self.folder))
            if self.resume:
                self._compare(asdict(self.config))
            elif self._has_state() or self.model.exists():
                raise UsageError(
                    f"{self.folder} holds a run: go on with --resume, or choose another --out"
                )
            try:
                check_classes(self.data.classes)
            except Misfit as misfit:  # the model file could not be read
                raise CxrError(f"{self.data.name}: {misfit}") from None
            if not self.resume:
                self._begin([])
            self.world.any(False)  # nobody writes a state before all have looked for one
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    def _has_state(self) -> bool:
        return self.state.exists() or self.previous.exists()

    def _foreign(self) -> str | None:
        """What the folder holds that a run would write over, where there has been no run."""
        known = all((self.folder / name).exists() for name in ("run.lock", "log.jsonl"))
        known = known or self._has_state() or self.model.exists()  # which is told otherwise
        return None if known else next((n for n in WRITTEN if (self.folder / n).exists()), None)

    def _begin(self, rows: list[dict]) -> None:
        """Write the options of now, and the log so far."""
        if self.world.first:
            text = json.dumps(asdict(self.config), indent=1, default=str)
            write_text(self.folder / "config.json", text)
            write_text(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def _compare(self, now: dict) -> None:
        """A run goes on as it began; only its length, and where its data and files lie, may
        change. What is in them is compared elsewhere: by the digests, and by the classifier's
        answers."""
        try:
            before = json.loads((self.folder / "config.json").read_text())
            before.items()
        except (OSError, ValueError, RecursionError, AttributeError):
            raise CxrError(
                f"{self.folder}/config.json is damaged or gone: put it back, or begin a new run"
            ) from None
        now = json.loads(json.dumps(now, default=str))
        for name in (name for name in now if name not in FREE):
            then, file = before.get(name), name in FILES and now[name] and before.get(name)
            same = Path(now[name]).name == Path(str(then)).name if file else now[name] == then
            if not same:
                raise UsageError(
                    f"{self.folder} was begun with {name} = {then}, not {now[name]}: "
                    "resume with the same options"
                )
        if (then := before.get("images")) != now["images"] and self.world.first:
            console.say(
                f"{self.folder}: to {now['images']:,} images, where it was begun with {then}"
            )

    def save(self, parts: dict, progress: dict) -> None:
        """Write the state, and keep the one before; `progress` is what the loop needs besides
        tensors."""
        if not self.world.first:
            return
        tensors = {k: v.detach().cpu() for k, v in checkpoints.pack(parts).items()} | self.digests
        told = {**progress, "checksum": checkpoints.checksum(tensors, progress)}
        draft = self.folder / "state.new.safetensors"
        checkpoints.save(draft, tensors, told)
        if self.sound:
            keep(self.state, self.previous)
        draft.replace(self.state)
        self.sound, self.saved = True, progress["images"]

    def restore(self, parts: dict, begun: dict) -> dict:
        """Put the state back, cut the log back to it, and return its progress; `begun` is the
        progress of a new run. If the state is damaged, the one before it serves.

        Raises CxrError if both are, UsageError if the data are others."""
        rows = self.rows()
        try:
            tensors, progress = self._read(self.state, begun)
            self.sound = True
        except CxrError as damage:
            if self.state.is_dir() or not self.previous.exists():
                raise
            tensors, progress = self._read(self.previous, begun)
            console.warn(f"{damage}; going on from the one before, of {progress['images']} images")
        held = {name: tensors.pop(name) for name in self.digests if name in tensors}
        if unlike := held and identity.differences(held, self.digests, self.data):
            raise UsageError(f"{self.folder} was begun with other data: {unlike}")
        if progress["images"] >= self.config.images + self.config.batch:
            raise UsageError(
                f"--images {self.config.images}: {self.folder} has seen {progress['images']} already"
            )
        try:
            checkpoints.unpack(tensors, parts)
        except (RuntimeError, ValueError, KeyError):
            raise CxrError(f"{self.state} is of another version of cxrgan: begin anew") from None
        self.saved = progress["images"]
        self._begin([row for row in rows if row["images"] <= self.saved])
        return progress

    def _read(self, path: Path, begun: dict) -> tuple[dict[str, Tensor], dict]:
        """The tensors and the progress of a state. Raises CxrError if it is damaged."""
        tensors, progress = checkpoints.load(path)
        found = progress.pop("checksum", None)
        older = found is None and not self.digests.keys() & tensors.keys()
        sound = older or found == checkpoints.checksum(tensors, progress)
        if not (sound and _alike(progress, begun) and _is_place(progress, self.config.batch)):
            raise CxrError(f"{path} is damaged")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise CxrError(f"{path} is damaged: it holds weights that are not numbers")
        if older:
            console.warn(f"{path} is of an older cxrgan: that its data are these is not checked")
        return tensors, progress

    def log(self, row: dict) -> None:
        """Append a line to the log."""
        if self.world.first:
            append_text(self.folder / "log.jsonl", json.dumps(row) + "\n")

    def show(self, command: str, tested: dict[str, dict] | None = None) -> None:
        """Write the page of the run; tested: what `runpage.page` shows at the end. If it cannot be
        written, as on a full disk, a warning says so, and training goes on."""
        if self.world.first:
            try:
                html = runpage.page(self.folder, command, asdict(self.config), tested)
                write_text(self.page, html)
            except (CxrError, OSError) as error:
                console.warn(f"the page was not written: {error}")

    def rows(self) -> list[dict]:
        """The log so far, without a last line that a crash cut short. Raises CxrError if another
        line is damaged."""
        path = self.folder / "log.jsonl"
        if not path.exists():
            console.warn(f"{path} is missing: the log begins anew")
            return []
        lines, rows = path.read_bytes().split(b"\n"), []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                row["images"] + 0  # a number
                rows.append(row)
            except (ValueError, TypeError, KeyError, RecursionError):
                if number < len(lines):
                    raise CxrError(
                        f"{path}, line {number} is damaged: mend or remove the file, and resume"
                    ) from None
        return rows


def _alike(progress: dict, begun: dict) -> bool:
    """Whether all that a new run counts is there, as finite numbers or lists of as many."""
    for name, start in begun.items():
        values = progress.get(name)
        starts = start if isinstance(start, list) else [start]
        values = values if isinstance(start, list) else [values]
        if not isinstance(values, list) or len(values) != len(starts):
            return False
        if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            return False
    return True


def _is_place(progress: dict, batch: int) -> bool:
    """Whether a run can have seen so many images."""
    images = progress["images"]
    return type(images) is int and 0 <= images < 10**12 and images % batch == 0


def loop(trainer, run: Run, title: str) -> None:
    """Step `trainer` to the end of its images; at every tick report, log and save.

    `trainer` has `config` (batch, images, tick), `progress` (images), `parts()`, `step()` that
    returns its terms, `report()` that returns more of them, `summary(row)`, and `done()`, why it
    ends early.
    Raises `Interrupted` after Ctrl-C, with the state saved, and CxrError at a loss that is not a
    number, with the last good state kept.
    """
    config, progress, world = trainer.config, trainer.progress, trainer.world
    run.show(title)
    if world.first:
        console.say(f"page: {run.page}")
    if progress["images"]:
        _catch_up(trainer, run, title)
    else:
        run.save(trainer.parts(), progress)
    bars = console.progress(title, config.images, progress["images"], quiet=not world.first)
    with stopping("step") as caught, bars as bar:
        terms, began, start = [], time.perf_counter(), progress["images"]
        saved = began
        while not _over(trainer):
            before = progress["images"]
            terms.append(trainer.step())
            bar.advance(config.batch)
            finished = progress["images"] >= config.images
            pause = world.any(bool(caught) or time.perf_counter() - saved > SAVE_EVERY)
            stop = pause and not finished and world.any(bool(caught))
            ticked = progress["images"] // config.tick > before // config.tick
            if not (ticked or pause or finished):
                continue
            row = {"images": progress["images"], **_means(terms, world)}
            _refuse_divergence(row, run)
            if ticked or finished:
                speed = (progress["images"] - start) / (time.perf_counter() - began)
                row |= {"images_per_second": speed, **trainer.report()}
                _refuse_divergence(row, run)
                run.log(row)
                run.show(title)
                bar.note(trainer.summary(row))
                terms, began, start = [], time.perf_counter(), progress["images"]
            run.save(trainer.parts(), progress)
            saved = time.perf_counter()
            if stop:
                raise Interrupted(
                    f"stopped after {progress['images']} images, saved in {run.folder}: "
                    "go on with the same command and --resume"
                )
    if world.first and progress["images"] < config.images:
        console.say(f"ended after {progress['images']:,} images: {trainer.done()}")


def _over(trainer) -> bool:
    return trainer.progress["images"] >= trainer.config.images or bool(trainer.done())


def _catch_up(trainer, run: Run, title: str) -> None:
    """Give a resumed run that has seen all of its images the report that it still lacks: it was
    stopped before that, or its model file is gone."""
    images, rows = trainer.progress["images"], run.rows()
    logged = bool(rows) and rows[-1]["images"] == images
    if not _over(trainer) or (logged and run.model.exists()):
        return
    row = {"images": images, **trainer.report()}
    if not logged:
        run.log(row)
        run.show(title)
    run.save(trainer.parts(), trainer.progress)


def _refuse_divergence(row: dict[str, float], run: Run) -> None:
    if not all(math.isfinite(value) for value in row.values()):
        raise CxrError(
            f"training diverged before {row['images']} images: the last good state, of "
            f"{run.saved} images, is kept in {run.folder}; begin again with another --seed and --out"
        )


def _means(terms: list[dict[str, Tensor]], world: World) -> dict[str, float]:
    """The mean of each term over the steps that had it, and over the processes."""
    names = {name: None for step in terms for name in step}
    means = [torch.stack([s[name] for s in terms if name in s]).float().mean() for name in names]
    return dict(zip(names, world.mean(torch.stack(means)).tolist()))
