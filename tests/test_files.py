"""Written whole or not at all, whatever fails and whoever else writes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training import read_state, write_state

from cxr import CxrError, checkpoints, files

ROOT = Path(__file__).parents[1]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with files.replacing_folder(target) as draft:
        (draft / "new").touch()
        assert os.listdir(target) == ["old"]
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    target, rename = tmp_path / "out", os.rename
    target.mkdir()
    (target / "old").touch()

    def refuse(source, to):
        if source.name == "new":
            raise OSError(28, "No space left on device")
        rename(source, to)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CxrError, match="No space"), files.replacing_folder(target) as draft:
        (draft / "new").touch()
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["out"]


# Loss of power


class PowerLoss(BaseException):
    """Nothing after it reaches the disk."""


class Disk:
    """`os` as `cxr.files` calls it, until the power fails in the n-th call that changes the disk.

    A file that was renamed before its content was flushed is torn afterwards.
    """

    CHANGES = ("replace", "rename", "link", "chmod", "fsync")

    def __init__(self, fails_at: int):
        self.left, self.lost, self.flushed, self.torn = fails_at, False, set(), []

    def __getattr__(self, name: str):
        function = getattr(os, name)
        return self.counted(function) if name in self.CHANGES else function

    def counted(self, function):
        def call(*args, **options):
            self.left -= 1
            if self.left == 0 or self.lost:
                self.lost = True
                raise PowerLoss
            self.note(function, args)
            return function(*args, **options)

        return call

    def note(self, function, args) -> None:
        if function is os.fsync:
            self.flushed.add(os.fstat(args[0]).st_ino)
        elif function is os.replace and os.stat(args[0]).st_ino not in self.flushed:
            self.torn.append(args[1])

    def written(self, function):
        """A function that writes the file `to`: half of it, if the power fails."""

        def call(first, to, *rest):
            path = first if isinstance(first, Path) else to
            result = function(first, to, *rest)
            size = os.path.getsize(path)
            try:
                self.counted(lambda: None)()
            except PowerLoss:
                os.truncate(path, size // 2)
                raise
            return result

        return call


@pytest.fixture
def until_power_fails(monkeypatch):
    """Calls a function with a disk whose power fails at its n-th change; whether it did."""

    def run(work, n: int) -> bool:
        disk = Disk(n)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            patch.setattr(files.shutil, "rmtree", disk.counted(files.shutil.rmtree))
            patch.setattr(checkpoints, "save_file", disk.written(checkpoints.save_file))
            patch.setattr(Path, "write_text", disk.written(Path.write_text))
            try:
                work()
            except PowerLoss:
                for path in disk.torn:
                    os.truncate(path, os.path.getsize(path) // 2)
        files._swept.clear()  # as in the next process
        return disk.lost

    return run


def write_tensors(folder, value):
    checkpoints.save(folder / "m", {"a": torch.full((9,), value)}, {"value": value})


def read_tensors(folder):
    tensors, info = checkpoints.load(folder / "m")
    assert (tensors["a"] == info["value"]).all()
    return info["value"]


KINDS = {
    "text": (
        lambda folder, value: files.write_text(folder / "t.json", json.dumps([value] * 99)),
        lambda folder: json.loads((folder / "t.json").read_text())[98],
    ),
    "model file": (write_tensors, read_tensors),
    "training state": (write_state, read_state),
}


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_loss_of_power_the_old_or_the_new_is_there(tmp_path, until_power_fails, kind):
    write, read = KINDS[kind]
    found = []
    for n in itertools.count(1):
        folder = tmp_path / str(n)
        folder.mkdir()
        if kind == "training state":
            write_state(folder, 1, resume=False)
        else:
            write(folder, 1)
        if not until_power_fails(lambda: write(folder, 2), n):  # noqa: B023
            break
        found.append(read(folder))
        write(folder, 3)  # goes on, and clears up
        assert read(folder) == 3 and not list(folder.glob(".*"))
    assert read(folder) == 2
    assert found[0] == 1 and found[-1] == 2 and set(found) == {1, 2} and len(found) >= 5


def test_the_loss_of_power_above_would_be_seen_without_a_flush(tmp_path, until_power_fails):
    def careless():
        new = tmp_path / "new"
        new.write_text("x" * 99)
        files.os.replace(new, tmp_path / "t")
        files.os.fsync(3)

    assert until_power_fails(careless, 3)
    assert (tmp_path / "t").read_text() != "x" * 99


# Other processes and other users


def test_drafts_of_dead_processes_are_removed_those_of_living_ones_are_not(tmp_path):
    code = (
        "import sys; from cxr import files\n"
        "with files.replacing(sys.argv[1]) as new:\n"
        "    new.write_text('half'); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, tmp_path / "t"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    (dead, living) = (subprocess.Popen(command, cwd=ROOT, **pipes) for _ in "12")
    with dead, living:
        for process in (dead, living):
            process.stdout.readline()
        dead.kill()
        dead.wait()
        assert len(list(tmp_path.glob(".*.draft"))) == 2
        files.write_text(tmp_path / "other", "x")
        assert len(list(tmp_path.glob(".*.draft"))) == 1
        living.communicate()
    assert sorted(os.listdir(tmp_path)) == ["other", "t"]


def test_a_folder_that_a_dead_process_moved_away_comes_back(tmp_path):
    left = tmp_path / ".abcdefgh.draft"
    (left / "old" / "out").mkdir(parents=True)
    (left / "old" / "out" / "mine").touch()
    files.write_text(tmp_path / "t", "x")
    assert os.listdir(tmp_path / "out") == ["mine"] and not left.exists()


def test_drafts_cannot_be_foreseen_nor_entered_by_others(tmp_path):
    names = set()
    for _ in range(2):
        with files.replacing(tmp_path / "t") as new:
            new.write_text("x")
            assert new.parent.stat().st_mode & 0o777 == 0o700
            names.add(new.parent.name)
    assert len(names) == 2


def test_permissions_follow_the_umask_or_are_this_users_alone(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "t", "x")
        with files.replacing(tmp_path / "p", private=True) as new:
            new.write_text("x")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in "tp"]
    assert modes == [0o640, 0o600]


def test_a_lock_is_held_by_one_and_says_by_whom(tmp_path):
    with files.locked(tmp_path / "lock") as holder:
        assert holder is None
        with files.locked(tmp_path / "lock") as second:
            assert f"process {os.getpid()} on" in second
    with files.locked(tmp_path / "lock") as holder:
        assert holder is None


def test_a_lock_does_not_follow_a_link(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), files.locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "precious").exists()


def test_what_others_may_write_or_own_is_not_trusted(tmp_path, monkeypatch):
    file = tmp_path / "inner" / "file"
    file.parent.mkdir()
    file.touch()
    assert files.distrusted(file) is None
    (tmp_path / "link").symlink_to(file.parent)
    assert files.distrusted(tmp_path / "link" / "file") is None
    assert "is a link" in files.distrusted(tmp_path / "link")
    file.parent.chmod(0o777)
    assert "others may write" in files.distrusted(file)
    assert "others may write" in files.distrusted(tmp_path / "link" / "file")
    file.parent.chmod(0o1777)  # sticky, as the temporary directory
    assert files.distrusted(file) is None
    monkeypatch.setattr(files, "ROOT", 12346)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert "belongs to another user" in files.distrusted(file)
