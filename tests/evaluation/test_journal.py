"""What an evaluation has measured is kept, found again, and never mixed."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from cxr import UsageError, datasets
from cxr.evaluation import journal
from cxr.evaluation.journal import FINISHED, Journal


@pytest.fixture(scope="module")
def data(xrays):
    return datasets.open_dataset(xrays, 32)


@pytest.fixture
def begun(data, tmp_path):
    """A folder with a journal of two images."""
    first = Journal(data, tmp_path, {"model": "a", "refine": 60})
    first.add("case", {0: {"figures": {"path/spearman": 0.1 + 0.2}}, 1: {"figures": {}}})
    return tmp_path


def resumed(data, folder, **subject):
    return Journal(data, folder, {"model": "a", "refine": 60} | subject, resume=True)


def test_what_was_added_is_found_again_to_the_last_bit(data, begun):
    again = resumed(data, begun)
    assert again.get("case", 0) == {"figures": {"path/spearman": 0.1 + 0.2}}
    assert again.get("case", 1) == {"figures": {}}
    assert again.get("case", 2) is again.get("tuning", 0) is None


def test_a_line_names_the_image_within_the_data(data, begun):
    _, line, _ = (begun / journal.NAME).read_text().splitlines()
    assert json.loads(line)["image"] == str(data.paths[0]).split(f"{data.name}/")[-1]


def test_entries_without_a_folder_are_kept_in_memory_alone(data, tmp_path):
    memory = Journal(data)
    memory.add("case", {0: 1})
    assert memory.get("case", 0) == 1 and memory.path is None


def test_what_is_made_once_is_not_made_again(data, begun):
    made = []
    for _ in range(2):
        assert resumed(data, begun).once("classifier", lambda: made.append(1) or {"n": 3}) == {
            "n": 3
        }
    assert made == [1]


def test_a_stopped_evaluation_is_not_overwritten(data, begun):
    before = (begun / journal.NAME).read_bytes()
    with pytest.raises(UsageError, match="was stopped: go on with --resume"):
        Journal(data, begun, {"model": "a", "refine": 60})
    assert (begun / journal.NAME).read_bytes() == before


def test_a_finished_evaluation_is_replaced_and_says_so(data, begun, monkeypatch):
    lines = []
    monkeypatch.setattr(journal.console, "say", lines.append)
    resumed(data, begun).finish()
    anew = Journal(data, begun, {"model": "b"})
    assert anew.get("case", 0) is None and anew.get(FINISHED) is None
    assert len(lines) == 1 and "replaced" in lines[0]


def test_nothing_to_resume_is_said(data, tmp_path):
    with pytest.raises(UsageError, match="no evaluation to resume: leave --resume out"):
        resumed(data, tmp_path)


def test_entries_of_another_subject_are_refused_and_kept(data, begun):
    before = (begun / journal.NAME).read_bytes()
    with pytest.raises(UsageError, match="is of another refine: resume with the same") as caught:
        resumed(data, begun, refine=10)
    assert "\n" not in str(caught.value) and (begun / journal.NAME).read_bytes() == before
    lines = before.splitlines(keepends=True)
    (begun / journal.NAME).write_bytes(b"".join(lines[1:]))  # without the line of the subject
    with pytest.raises(UsageError, match="is of another"):
        resumed(data, begun, refine=10)
    assert resumed(data, begun).get("case", 1) is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [*lines[:-1], lines[-1][: len(lines[-1]) // 2]],  # cut short by a crash
        lambda lines: [*lines[:-1], lines[-1].replace(b'"figures"', b'"figurez"')],
        lambda lines: [*lines[:-1], b"\x00" * 40],
        lambda lines: [*lines[:-1], b"[1, 2]\n"],
        lambda lines: [*lines[:-1], b"\xff\xfe{}\n"],
    ],
)
def test_a_damaged_line_is_dropped_with_a_word(data, begun, monkeypatch, damage):
    said = []
    monkeypatch.setattr(journal.console, "warn", said.append)
    file = begun / journal.NAME
    file.write_bytes(b"".join(damage(file.read_bytes().splitlines(keepends=True))))
    again = resumed(data, begun)
    assert again.get("case", 0) is not None and again.get("case", 1) is None
    assert len(said) == 1 and "1 damaged line dropped" in said[0]
    again.add("case", {1: 5})
    said.clear()
    assert resumed(data, begun).get("case", 1) == 5 and not said


def test_names_stay_when_the_data_move(data):
    paths = [str(path).replace(data.name, "elsewhere") for path in data.paths]
    moved = dataclasses.replace(data, paths=tuple(paths))
    assert journal.image_names(moved) == journal.image_names(data)
    assert journal.data_digest(moved) == journal.data_digest(data)


def test_a_digest_tells_other_data(data):
    before = journal.data_digest(data)
    labels = data.labels.copy()
    labels[3] = 1 - labels[3]
    pixels = np.array(data.images)
    pixels[5, 2, 2] ^= 1
    for changes in ({"labels": labels}, {"images": pixels}, {"paths": data.paths[::-1]}):
        assert journal.data_digest(dataclasses.replace(data, **changes)) != before


def test_a_digest_tells_other_weights_and_files(tmp_path):
    network = torch.nn.Linear(2, 1)
    before = journal.network_digest(network)
    assert journal.network_digest(network) == before
    with torch.no_grad():
        network.weight[0, 0] += 1e-3
    assert journal.network_digest(network) != before
    (tmp_path / "a.png").write_bytes(b"1")
    first = journal.files_digest([tmp_path / "a.png"])
    (tmp_path / "a.png").write_bytes(b"2")
    assert journal.files_digest([tmp_path / "a.png"]) != first
