import os

import pytest

from cxr import CxrError, files


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
