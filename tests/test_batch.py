import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_explain import bright  # noqa: F401 - a fixture

from cxr import CxrError, UsageError, batch, explain
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
