import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_explain import bright  # noqa: F401 - a fixture

from cxr import CxrError, Interrupted, UsageError, batch, explain, images, options
from cxr.checkpoints import Model

QUICK = {"frames": 5, "restarts": 2, "refine": 2}


@pytest.fixture
def pictures(tmp_path):
    """Five images of both verdicts, the third of which is none."""
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(paths):
        grey = np.random.default_rng(number).normal(100 + 40 * (number % 2), 20, (32, 32))
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(path)
    paths[2].write_text("no image")
    return paths


def run(paths, model, out, stopped=(), **options):
    return batch.explain_all(paths, model, out, stopped, True, "none", **QUICK | options)


def test_a_picture_that_fails_takes_none_of_its_group_with_it(bright, pictures, tmp_path):  # noqa: F811
    results = run(pictures, bright, tmp_path / "out")
    assert [Path(numbers["image"]) for numbers in results] == pictures
    assert [number for number, one in enumerate(results) if "error" in one] == [2]
    assert sorted(p.parent.name for p in (tmp_path / "out").glob("*/explanation.json")) == list(
        "0134"
    )


def test_a_group_ends_before_the_stop(bright, pictures, tmp_path, monkeypatch):  # noqa: F811
    asked, group = [], explain.explain_group

    def noted(paths, model, **options):
        asked.append(len(paths))
        return group(paths, model, **options)

    monkeypatch.setattr(explain, "explain_group", noted)
    monkeypatch.setattr(explain, "at_once", lambda model: 2)
    results = run(pictures, bright, tmp_path / "out", stopped=[signal.SIGINT])
    assert asked == [2] and len(results) == 2
    assert batch.conclude(results, 5, [signal.SIGINT], False) == 130


def test_what_all_images_would_say_is_said_once(bright, pictures, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="at least 2 frames"):
        run(pictures, bright, tmp_path / "out", frames=1)


def test_a_classifier_that_fails_on_every_picture_fails_each(bright, pictures, tmp_path):  # noqa: F811
    class Broken(type(bright.classifier)):
        def forward(self, x):
            raise CxrError("no answer")

    broken = Model({**bright.networks, "classifier": Broken()}, bright.info, bright.buffers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explain, "at_once", lambda model: 4)
        results = run(pictures, broken, tmp_path / "out")
    assert [one["error"] for one in results if one["image"] != str(pictures[2])] == [
        "no answer"
    ] * 4


def test_what_no_explanation_wrote_is_never_replaced(bright, pictures, tmp_path, capsys):  # noqa: F811
    ward, x = tmp_path / "ward", pictures[0].read_bytes()
    (ward / "p1").mkdir(parents=True)
    (ward / "index.html").write_text("my page")
    for name in ("p1.png", "notes.png", "p2.png"):
        (ward / "p1" / name).write_bytes(x)
    results = run(sorted((ward / "p1").glob("p?.png")), bright, ward)
    assert not any("error" in one for one in results)
    assert sorted(path.name for path in (ward / "p1").iterdir()) == [
        "notes.png",
        "p1.png",
        "p2.png",
    ]
    assert (ward / "index.html").read_text() == "my page"
    assert "is another page and stays" in " ".join(capsys.readouterr().err.split())
    made = {p.parent.name for p in ward.glob("*/explanation.json")}
    assert made == {"p1_p1", "p2"}
    found = explain.explain(pictures[0], bright, **QUICK)
    with pytest.raises(UsageError, match="p1 holds notes.png, which is of no explanation"):
        found.write(ward / "p1")
    (ward / "p2" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds diary.txt"):
        found.write(ward / "p2")


def test_each_image_keeps_its_folder_whatever_stands_beside_it(bright, pictures, tmp_path):  # noqa: F811
    x, out = pictures[0].read_bytes(), tmp_path / "out"
    paths = [tmp_path / "pacs" / f"1.2.840.{n}" for n in (1, 2)] + [
        tmp_path / folder / "scan.png" for folder in ("a", "b")
    ]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(x)
    for asked in (paths[:1], paths[1:], paths[3:], paths[2:3], paths):
        run(asked, bright, out)
    held = {p.parent.name: Path(json.loads(p.read_text())["image"]) for p in out.glob("*/*.json")}
    names = ("1.2.840.1", "1.2.840.2", "scan", "b_scan")
    assert held == dict(zip(names, paths))


def test_another_folders_file_is_another(bright, pictures, tmp_path, monkeypatch):  # noqa: F811
    for place in ("a", "b", "a"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "x.png").write_bytes(pictures[0].read_bytes())
        monkeypatch.chdir(tmp_path / place)
        run([Path("x.png")], bright, tmp_path / "out")
    told = [json.loads(p.read_text()) for p in sorted((tmp_path / "out").glob("*/*.json"))]
    assert [n["file"] for n in told] == [str(tmp_path / place / "x.png") for place in "ba"]


def test_explanations_are_not_explained(bright, pictures, tmp_path, capsys):  # noqa: F811
    run(pictures[:2], bright, tmp_path / "explanation")
    pictures[2].unlink()
    assert images.find_images(tmp_path) == [*pictures[:2], *pictures[3:]]
    assert "left out 2 explanations that cxrgan wrote, 1 .html" in capsys.readouterr().err


def test_a_second_ctrl_c_keeps_what_is_written(bright, pictures, tmp_path, monkeypatch):  # noqa: F811
    group = explain.explain_group

    def twice(paths, model, **options):
        if paths[0] == pictures[1]:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return group(paths, model, **options)

    monkeypatch.setattr(explain, "explain_group", twice)
    monkeypatch.setattr(explain, "at_once", lambda model: 1)
    with pytest.raises(Interrupted, match="stopped at once"), options.stopping("image") as stopped:
        run(pictures, bright, tmp_path / "out", stopped)
    assert [p.parent.name for p in (tmp_path / "out").glob("*/explanation.json")] == ["0"]


def test_a_stop_after_the_last_image_is_none(bright, pictures, tmp_path, capsys):  # noqa: F811
    stopped = [signal.SIGINT]
    results = run(pictures[:2], bright, tmp_path / "out", stopped)
    assert batch.conclude(results, 2, stopped, True) == 0
    assert (tmp_path / "out" / "index.html").exists()
    assert "interrupted" not in capsys.readouterr().err
