import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cxr import (
    CxrError,
    Interrupted,
    UsageError,
    checkpoints,
    device,
    files,
    options,
    train_cnn,
    train_gan,
    training,
)

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
    config = replace(config, images=32)
    other = replace(config, seed=1)
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
    with pytest.raises(Interrupted, match="stopped after 64 images.*--resume"):
        module.train(config, tmp_path / "run")
    assert state(tmp_path / "run")[1]["images"] == 64
    monkeypatch.setattr(module.Trainer, "step", step)
    with pytest.raises(UsageError, match="--images 32: .*run has seen 64 already"):
        module.train(replace(config, images=32), tmp_path / "run", resume=True)
    module.train(config, tmp_path / "run", resume=True)
    module.train(config, tmp_path / "straight")
    assert same(state(tmp_path / "straight"), state(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_stopped_before_its_first_report_gets_it_when_it_is_over(job, tmp_path, monkeypatch):
    module, config = job
    step, config = module.Trainer.step, replace(config, tick=96)

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(module.Trainer, "step", interrupted)
    with pytest.raises(Interrupted, match="stopped after 16 images"):
        module.train(config, tmp_path / "run")
    module.train(replace(config, images=16), tmp_path / "run", resume=True)
    written, _ = checkpoints.load(tmp_path / "run" / "model.safetensors")
    kept, _ = state(tmp_path / "run")
    name, average = ("classifier", "ema") if module is train_cnn else ("encoder", "E_ema")
    weights = {key: value for key, value in written.items() if key.startswith(name)}
    weights.pop("classifier.temperature", None)
    assert all(torch.equal(weights[key], kept[key.replace(name, average)]) for key in weights)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [row["images"] for row in rows] == [16]


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


# The run folder, without the training


@dataclass(frozen=True)
class Options:
    data: str
    batch: int = 4
    images: int = 100
    boxes: str | None = None


DATA = SimpleNamespace(
    images=np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4),
    labels=np.array([0, 0, 0, 1, 1, 1]),
    splits=np.array(["train"] * 6),
    paths=tuple(f"folder/{name}.png" for name in "abcdef"),
    classes=("NORMAL", "SICK"),
    name="x",
)


def run_of(folder, resume, data=DATA):
    world = SimpleNamespace(first=True, any=bool)
    return training.Run(folder, Options(data.name), data, resume, world)


def write_state(folder, value, resume=True):
    part = torch.nn.Linear(1, 1)
    with run_of(folder, resume) as run:
        if resume:
            run.restore({"part": part}, {"images": 0})
        torch.nn.init.constant_(part.weight, value)
        run.save({"part": part}, {"images": 4 * value})
        run.log({"images": 4 * value})


def read_state(folder, data=DATA):
    part = torch.nn.Linear(1, 1)
    with run_of(folder, True, data) as run:
        progress = run.restore({"part": part}, {"images": 0})
    assert progress["images"] == 4 * part.weight.item()
    return part.weight.item()


def other(**changes):
    return SimpleNamespace(**{**vars(DATA), **changes})


@pytest.fixture
def folder(tmp_path):
    """A run with a state of 4 images and one before it, of 0."""
    write_state(tmp_path / "run", 0, resume=False)
    write_state(tmp_path / "run", 1)
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


def edit(path, change):
    tensors, told = checkpoints.load(path)
    change(tensors, told)
    checkpoints.save(path, tensors, told)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "byte": flip_a_byte,
    "no checksum": lambda path: edit(path, lambda t, told: told.pop("checksum")),
    "nan": lambda path: edit(path, lambda t, told: t["part.weight"].fill_(float("nan"))),
    "count a text": lambda path: edit(path, lambda t, told: told.update(images="x")),
    "count too large": lambda path: edit(path, lambda t, told: told.update(images=10**18)),
    "no count": lambda path: edit(path, lambda t, told: told.pop("images")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_gives_way_to_the_one_before(folder, capsys, damage):
    DAMAGE[damage](folder / "state.safetensors")
    assert read_state(folder) == 0
    warning = capsys.readouterr().err
    assert "going on from the one before, of 0 images" in warning
    assert training.Run.rows(SimpleNamespace(folder=folder)) == [{"images": 0}]
    write_state(folder, 2)
    DAMAGE[damage](folder / "state.safetensors")
    assert read_state(folder) == 0  # the damaged one never takes the place of the sound one


@pytest.mark.parametrize("damage", DAMAGE)
def test_without_a_sound_state_nothing_is_overwritten(folder, damage):
    for name in ("state.safetensors", "state.previous.safetensors"):
        DAMAGE[damage](folder / name)
    before = contents(folder)
    with pytest.raises(CxrError) as caught:
        read_state(folder)
    assert "\n" not in str(caught.value)
    assert {**contents(folder), "run.lock": 0} == {**before, "run.lock": 0}


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
@pytest.mark.parametrize(
    "rubbish", [b"[]\n", b"\xff\n", b'{"images": "x"}\n', b"{\n", b"[" * 10**5]
)
def test_a_damaged_log_or_config_is_named_and_left(folder, name, rubbish):
    (folder / name).write_bytes(rubbish + b"5\n")
    before = contents(folder)
    with pytest.raises((CxrError, UsageError), match=f"{name}.* is damaged"):
        read_state(folder)
    assert {**contents(folder), "run.lock": 0} == {**before, "run.lock": 0}


def test_a_missing_log_is_said(folder, capsys):
    (folder / "log.jsonl").unlink()
    assert read_state(folder) == 1
    assert "log.jsonl is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.array([1, 1, 1, 0, 1, 1])}, "labels of 4 images differ .the first: a.png"),
        ({"splits": np.array(["train"] * 5 + ["val"])}, "splits of 1 images differ .*f.png"),
        ({"images": DATA.images // 80}, "pixels of 6 images differ"),
        ({"images": DATA.images[::-1], "labels": DATA.labels[::-1]}, "same, in another order"),
        ({"images": DATA.images[::-1]}, "labels of 6 images differ"),
        (
            {name: getattr(DATA, name)[:4] for name in ("images", "labels", "splits", "paths")},
            "2 images fewer than the 6",
        ),
    ],
)
def test_a_resume_with_other_data_says_what_differs(folder, change, said):
    before = contents(folder)
    with pytest.raises(UsageError, match=said):
        read_state(folder, other(**change))
    assert contents(folder)["state.safetensors"] == before["state.safetensors"]


def test_the_same_data_in_a_folder_of_another_name_go_on(folder):
    moved = other(name="y", paths=tuple("elsewhere/" + path for path in DATA.paths))
    assert read_state(folder, moved) == 1


def test_a_state_of_before_the_digests_goes_on_with_a_warning(folder, capsys):
    path = folder / "state.safetensors"
    tensors, told = checkpoints.load(path)
    old = {name: value for name, value in tensors.items() if not name.startswith("data.")}
    checkpoints.save(path, old, {"images": told["images"]})
    assert read_state(folder) == 1
    assert "of an older cxrgan" in capsys.readouterr().err


def test_a_run_goes_on_where_its_files_lie_elsewhere_but_not_with_other_marks(folder, tmp_path):
    marks = np.zeros((6, 2, 2), np.uint8), np.full(6, True)
    mine, part = tmp_path / "mine", torch.nn.Linear(1, 1)

    def run(boxes, resume=True, marks=marks):
        world = SimpleNamespace(first=True, any=bool)
        return training.Run(mine, Options("x", boxes=boxes), DATA, resume, world, marks)

    with run("data/b.csv", False) as begun:
        begun.save({"part": part}, {"images": 0})
    with run(str(tmp_path / "b.csv")) as there:
        there.restore({"part": part}, {"images": 0})
    with pytest.raises(UsageError, match="begun with boxes = .*b.csv, not c.csv"), run("c.csv"):
        pass
    with pytest.raises(UsageError, match="begun with boxes = .*b.csv, not None"), run(None):
        pass
    other = marks[0].copy()
    other[3, 1, 1] = 255
    said = pytest.raises(UsageError, match="marks of 1 images differ .the first: d.png")
    with run("b.csv", marks=(other, marks[1])) as changed, said:
        changed.restore({"part": part}, {"images": 0})


def test_a_resumed_run_keeps_its_length_unless_another_is_given(folder, tmp_path, capsys):
    asked = {"images": None, "seed": 0}
    assert training.same_length(asked, folder, True) == {"images": 100, "seed": 0}
    assert training.same_length(asked, folder, False) == {"seed": 0}
    assert training.same_length(asked, tmp_path / "nowhere", True) == {"seed": 0}
    assert training.same_length({"images": 7}, folder, True) == {"images": 7}
    world = SimpleNamespace(first=True, any=bool)
    with training.Run(folder, Options("x", images=200), DATA, True, world):
        pass
    assert "to 200 images, where it was begun with 100" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "index.html", "samples"])
def test_files_of_ones_own_are_not_written_over(tmp_path, name):
    (tmp_path / name).mkdir() if name == "samples" else (tmp_path / name).write_text("mine")
    for _ in range(2):
        with pytest.raises(UsageError, match=f"holds {name}, which is of no run"):
            run_of(tmp_path, False).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / "run.lock").touch()  # as of an evaluation
    if name != "log.jsonl":
        with pytest.raises(UsageError, match="which is of no run"):
            run_of(tmp_path, False).__enter__()


def test_a_failed_save_keeps_the_last_two_states(folder, monkeypatch):
    before = contents(folder)
    part = torch.nn.Linear(1, 1)
    with run_of(folder, True) as run:
        run.restore({"part": part}, {"images": 0})
        monkeypatch.setattr(checkpoints, "save_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.save({"part": part}, {"images": 8})
    assert contents(folder) == before


def test_a_state_is_saved_every_few_minutes_between_ticks(job, tmp_path, monkeypatch):
    module, config = job
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    saved = []
    save = training.Run.save
    monkeypatch.setattr(
        training.Run, "save", lambda self, *a: saved.append(a[1]["images"]) or save(self, *a)
    )
    module.train(replace(config, images=32), tmp_path / "run")
    assert saved == [0, 16, 32]
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


def test_a_second_ctrl_c_stops_at_once_and_says_what_is_kept(capfd):
    said = pytest.raises(Interrupted, match="stopped at once.*is kept")
    with said, options.stopping("step") as caught:
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    assert "stopping after this step; once more stops at once" in capfd.readouterr().err


def test_a_second_run_in_the_folder_is_told_who_holds_it(folder):
    before = contents(folder)
    with run_of(folder, True), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        read_state(folder)
    assert {**contents(folder), "run.lock": 0} == {**before, "run.lock": 0}
    assert read_state(folder) == 1


def test_a_class_that_no_model_file_may_hold_is_refused_before_training(tmp_path):
    with pytest.raises(CxrError, match="a class's name must be"):
        run_of(tmp_path / "run", False, other(classes=("a", "b\x1b"))).__enter__()
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_began_and_ended_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    lock = files.locked

    def late(path):
        (path.parent / "state.safetensors").write_bytes(b"another's")
        return lock(path)

    monkeypatch.setattr(files, "locked", late)
    with pytest.raises(UsageError, match="holds a run"):
        run_of(tmp_path / "run", False).__enter__()
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == b"another's"
