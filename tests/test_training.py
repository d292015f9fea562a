import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cxr import CxrError, UsageError, checkpoints, device, train_cnn, train_gan, training

ROOT = Path(__file__).parent.parent
QUICK = {
    "cnn": (train_cnn, {"batch": 16, "images": 96, "tick": 32, "patience": 99}),
    "gan": (train_gan, {"batch": 16, "images": 96, "tick": 32}),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cnn", "gan"])
def job(request, xrays, own_classifier):
    """A training module and a config of it that takes seconds."""
    module, options = QUICK[request.param]
    if request.param == "gan":
        options = {**options, "classifier": f"{own_classifier}:bright"}
    return module, module.Config(data=str(xrays), preset="tiny", device="cpu", **options)


def state(folder):
    return checkpoints.load(folder / "state.safetensors")


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(
        torch.equal(a[0][key], b[0][key]) for key in a[0]
    )  # fmt: skip


def test_a_killed_run_resumed_is_the_very_same_run(job, tmp_path):
    """SIGKILL between two saved states: the steps since the last one are done again."""
    module, config = job
    module.train(config, tmp_path / "straight")
    script = f"""
import os, signal, torch
from cxr import {module.__name__.split(".")[1]} as module
torch.set_num_threads(1)
step = module.Trainer.step
def killed(self):
    if self.progress["images"] == 80:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
module.Trainer.step = killed
module.train(module.{config!r}, {str(tmp_path / "killed")!r})
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state(tmp_path / "killed")[1]["images"] == 64
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"images": 80, "half a li')  # what a crash may leave
    module.train(config, tmp_path / "killed", resume=True)
    assert same(state(tmp_path / "straight"), state(tmp_path / "killed"))
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").open()]
    assert [row["images"] for row in rows] == [32, 64, 96]


def test_another_seed_is_another_run(job, tmp_path):
    """The comparison above can fail."""
    module, config = job
    other = type(config)(**{**config.__dict__, "seed": 1})
    module.train(config, tmp_path / "a")
    module.train(other, tmp_path / "b")
    assert not same(state(tmp_path / "a"), state(tmp_path / "b"))


def test_ctrl_c_saves_and_says_how_to_go_on(job, tmp_path, monkeypatch):
    module, config = job
    step = module.Trainer.step

    def interrupted(self):
        if self.progress["images"] == 48:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module.Trainer, "step", interrupted)
    with pytest.raises(training.Interrupted, match="stopped after 64 images.*--resume"):
        module.train(config, tmp_path / "run")
    assert state(tmp_path / "run")[1]["images"] == 64
    monkeypatch.setattr(module.Trainer, "step", step)
    module.train(config, tmp_path / "run", resume=True)
    module.train(config, tmp_path / "straight")
    assert same(state(tmp_path / "straight"), state(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before


def test_divergence_stops_with_the_last_good_state_kept(job, tmp_path, monkeypatch):
    module, config = job
    step = module.Trainer.step

    def poisoned(self):
        terms = step(self)
        bad = self.progress["images"] > 48
        return {name: value * float("nan") if bad else value for name, value in terms.items()}

    monkeypatch.setattr(module.Trainer, "step", poisoned)
    with pytest.raises(CxrError, match="diverged before 64 images.*good state, of 32 images"):
        module.train(config, tmp_path / "run")
    assert state(tmp_path / "run")[1]["images"] == 32


def test_a_run_is_never_overwritten_nor_resumed_as_another(job, tmp_path):
    module, config = job
    with pytest.raises(UsageError, match="holds no run to resume"):
        module.train(config, tmp_path / "run", resume=True)
    module.train(config, tmp_path / "run")
    with pytest.raises(UsageError, match="holds a run: go on with --resume"):
        module.train(config, tmp_path / "run")
    other = type(config)(**{**config.__dict__, "seed": 7})
    with pytest.raises(UsageError, match="begun with seed = 0, not 7"):
        module.train(other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "nonsense:1", "meta"])
def test_an_absent_device_is_refused(name):
    with pytest.raises(UsageError, match=f"--device {name}"):
        device.find_device(name)


def test_seeds_that_differ_in_one_number_draw_differently():
    draws = [torch.randn(4, generator=device.rng(*s)) for s in [(0, 1), (1, 0), (0, 2), (0,)]]
    assert len({tuple(d.tolist()) for d in draws}) == 4
    assert torch.equal(draws[0], torch.randn(4, generator=device.rng(0, 1)))


def test_ema_moves_by_its_decay_and_copies_buffers():
    a, b = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        b.weight.fill_(3)
        b.running_mean.fill_(5)
    training.update_ema(a, b, 0.75)
    assert a.weight.tolist() == [1.5, 1.5] and a.running_mean.tolist() == [5, 5]


@pytest.mark.parametrize("blocks", [1, 2])
def test_processes_share_each_block_without_gap_or_overlap(blocks):
    drawn = torch.arange(12)
    worlds = [SimpleNamespace(size=3, rank=rank) for rank in range(3)]
    shares = [training.World.share(world, drawn, blocks).chunk(blocks) for world in worlds]
    for i, block in enumerate(drawn.chunk(blocks)):
        assert torch.equal(torch.cat([share[i] for share in shares]), block)
