import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cxr
from cxr import CxrError, UsageError, datasets, images
from cxr.data import cache as cache_module
from cxr.data.patients import split_of
from cxr.datasets import balanced_batch, open_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("CXRGAN_CACHE", str(folder))
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """The paths decoded so far; what is served from the cache does not appear."""
    paths, load = [], images.load

    def noted(path, size, fit):
        paths.append(path)
        return load(path, size, fit)

    monkeypatch.setattr(images, "load", noted)
    return paths


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_folder(root, **classes):
    """`classes`: the number of images of each; their names are their numbers."""
    for name, count in classes.items():
        for number in range(count):
            write_image(root / name / f"{name}{number}.png", seed=number)
    return root


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data", NORMAL=3, SICK=2)


def table(root, text):
    path = root / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


# Folders


def test_folder_gives_pixels_labels_and_paths_in_order(data):
    found = open_dataset(data, 16)
    assert (found.name, found.classes, len(found)) == ("data", ("NORMAL", "SICK"), 5)
    assert found.labels.tolist() == [0, 0, 0, 1, 1] and found.labels.dtype == np.int64
    assert found.images.shape == (5, 16, 16) and found.images.dtype == np.uint8
    assert isinstance(found.images, np.memmap) and not found.images.flags.writeable
    for path, pixels in zip(found.paths, found.images):
        np.testing.assert_array_equal(pixels, images.load(path, 16))


def test_folder_finds_nested_images_and_ignores_hidden_and_foreign_files(data):
    write_image(data / "SICK" / "deep" / "er" / "found.png")
    write_image(data / "SICK" / ".hidden.png")
    write_image(data / "SICK" / ".trash" / "old.png")
    write_image(data / ".git" / "logo.png")
    write_image(data / "loose.png")
    (data / "SICK" / "notes.txt").write_text("no image")
    (data / "__MACOSX").mkdir()
    found = open_dataset(data, 16)
    assert len(found) == 6 and "SICK/deep/er/found.png" in found.paths[5]


def test_all_other_classes_are_positive(tmp_path):
    root = write_folder(tmp_path / "d", virus=1, healthy=2, bacteria=3)
    found = open_dataset(root, 16, negative="healthy")
    assert found.classes == ("healthy", "bacteria+virus")
    assert found.labels.tolist() == [1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("name", ["Normal", "NEGATIVE", "No Finding", "no_finding", "Control", "0"])
def test_negative_class_is_known_by_its_name(tmp_path, name):
    assert open_dataset(write_folder(tmp_path / "d", **{name: 1, "1": 1}), 16).classes[0] == name


def test_negative_class_can_be_named(data):
    assert open_dataset(data, 16, negative="SICK").classes == ("SICK", "NORMAL")


def test_two_classes_of_which_none_is_known_are_listed(tmp_path):
    root = write_folder(tmp_path / "d", a=1, b=2)
    with pytest.raises(UsageError, match=r"which class is healthy.*--negative.*b \(2\), a \(1\)"):
        open_dataset(root, 16)


def test_more_than_two_classes_are_listed_with_what_to_type(tmp_path):
    root = write_folder(tmp_path / "d", normal=1, ill=2, sick=3)
    told = r"has 3 classes: sick \(3\), ill \(2\), normal \(1\); say --negative .* --positive"
    with pytest.raises(UsageError, match=told):
        open_dataset(root, 16)


def test_unknown_negative_class_lists_the_classes(data):
    with pytest.raises(UsageError, match=r"--negative FINE.*NORMAL \(3\), SICK \(2\)"):
        open_dataset(data, 16, negative="FINE")


def test_one_class_against_another_leaves_the_rest_out(tmp_path, capsys):
    root = write_folder(tmp_path / "d", normal=2, covid=3, other=4)
    found = open_dataset(root, 16, positive="covid", negative="normal")
    assert found.classes == ("normal", "covid") and len(found) == 5
    assert "left out 4 images of other classes: other (4)" in capsys.readouterr().err
    assert open_dataset(root, 16, positive="covid").classes == ("normal+other", "covid")


def test_many_classes_are_kept_apart_the_healthy_one_first(tmp_path):
    root = write_folder(tmp_path / "d", sick=3, ill=2, normal=4)
    data = open_dataset(root, 16, classes="many")
    assert data.classes == ("normal", "ill", "sick")
    assert [int((data.labels == place).sum()) for place in range(3)] == [4, 2, 3]
    assert sum(map(sum, data.counts().values())) == 9
    with pytest.raises(UsageError, match="each class for itself"):
        open_dataset(root, 16, classes="many", negative="ill")
    table = tmp_path / "t.csv"
    table.write_text("path,label\nd/ill/ill0.png,a\nd/ill/ill1.png,b\nd/sick/sick0.png,a|c\n")
    with pytest.raises(CxrError, match="sick0.png is of a and c; --classes many needs one"):
        open_dataset(table, 16, classes="many")


def test_fewer_than_two_classes_is_an_error(tmp_path):
    with pytest.raises(CxrError, match="two classes are needed.*NORMAL"):
        open_dataset(write_folder(tmp_path / "d", NORMAL=2), 16)


def test_missing_data_is_wrong_use(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset(tmp_path / "absent", 16)


# Bad files


def test_bad_files_are_named_counted_and_left_out(data, capsys):
    for number in range(11):
        (data / "NORMAL" / f"NORMAL0-bad{number}.png").write_bytes(b"")
    expected = "11 of 16 images"
    for _ in ("built", "from the cache"):
        found = open_dataset(data, 16)
        warning = capsys.readouterr().err
        assert expected in warning and "bad0.png" in warning and "and 1 more" in warning
        assert len(found) == len(found.images) == len(found.paths) == 5
        assert found.labels.tolist() == [0, 0, 0, 1, 1]
        for path, pixels in zip(found.paths, found.images):
            np.testing.assert_array_equal(pixels, images.load(path, 16))


def test_packed_array_survives_losing_a_digit_of_its_length(tmp_path):
    root = write_folder(tmp_path / "d", NORMAL=50, SICK=50)  # 100 files, 99 good ones
    (root / "SICK" / "SICK49.png").write_bytes(b"not an image")
    found = open_dataset(root, 16)
    np.testing.assert_array_equal(found.images[98], images.load(found.paths[98], 16))


def test_class_without_a_readable_image_stops(data):
    for path in (data / "SICK").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(CxrError, match="no readable image is left of class SICK"):
        open_dataset(data, 16)


def test_nothing_readable_stops(data):
    for path in data.rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(CxrError, match="none of the 5 images"):
        open_dataset(data, 16)


# CSV


def test_csv_paths_are_relative_and_its_patients_go_first(data):
    path = table(
        data,
        "\ufeffage, Label ,PATH,patient\n"
        "4,sick,SICK/SICK0.png,p1\n5,normal, NORMAL/NORMAL0.png ,\n\n6,sick,SICK/SICK1.png\n",
    )
    found = open_dataset(path, 16)
    assert found.classes == ("normal", "sick") and found.labels.tolist() == [1, 0, 1]
    assert found.patients == ("p1", "document:normal0", "document:sick1")
    assert found.name == "table"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "which column names an image's file.*--path-column.*no columns"),
        ("age,class\n", "--path-column; it has age, class"),
        ("path,age\na.png,x\n", "--label-column .or --positive NAME.*; it has path, age"),
        ("path,label\n,x\n", "line 2: the column path is empty"),
        ("path,label\na.png,\n", "two classes are needed; there are none"),
        ("path,label\na.png,x\na.png,normal\n", "a.png is of both classes, normal and x"),
        ("path,label\n", "two classes are needed; there are none"),
        ("path,path,label\n", "is the path in column path or path"),
        ("path,label,patient\na.png,x,1\na.png,x,2\n", "a.png is of patient 2, and of 1 above"),
    ],
)
def test_malformed_csv_is_explained(tmp_path, text, message):
    with pytest.raises(CxrError, match=message):
        open_dataset(table(tmp_path, text), 16)


def test_file_that_is_no_csv_is_an_error(data):
    with pytest.raises(CxrError, match="not a CSV table"):
        open_dataset(data / "SICK" / "SICK0.png", 16)


def test_csv_may_name_a_missing_file(data, capsys):
    path = table(data, "path,label\nNORMAL/NORMAL0.png,0\nSICK/SICK0.png,1\nSICK/gone.png,1\n")
    assert len(open_dataset(path, 16)) == 2
    assert "gone.png" in capsys.readouterr().err


# Cache


def test_second_opening_decodes_nothing(data, decoded):
    first = open_dataset(data, 16)
    assert len(decoded) == 5
    second = open_dataset(data, 16)
    assert len(decoded) == 5
    np.testing.assert_array_equal(first.images, second.images)


def test_size_fit_and_files_have_entries_of_their_own(data, decoded):
    assert open_dataset(data, 16).images.shape[1:] == (16, 16)
    assert open_dataset(data, 8).images.shape[1:] == (8, 8)
    open_dataset(data, 16, fit="pad")
    write_image(data / "SICK" / "new.png")
    assert len(open_dataset(data, 16)) == 6
    assert len(decoded) == 5 + 5 + 5 + 6


def test_changed_file_is_decoded_again(data):
    path = data / "NORMAL" / "NORMAL0.png"
    before, stamp = open_dataset(data, 16).images[0].copy(), path.stat().st_mtime_ns
    write_image(path, seed=99)
    os.utime(path, ns=(stamp + 1, stamp + 1))
    after = open_dataset(data, 16).images[0]
    assert (before != after).any()
    np.testing.assert_array_equal(after, images.load(path, 16))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        (".npy", lambda path: path.write_bytes(b"")),
        (".npy", lambda path: path.write_bytes(b"garbage")),
        (".npy", lambda path: np.save(path, np.zeros((4, 16, 16), np.uint8))),
        (".npy", lambda path: path.unlink()),
        (".json", lambda path: path.write_bytes(b"[[")),
        (".json", lambda path: path.write_bytes(b"[1]")),
        (".json", lambda path: path.write_bytes(b"\xff")),
        (".json", lambda path: path.unlink()),
    ],
)
def test_damaged_cache_entry_is_rebuilt(data, cache, decoded, suffix, damage):
    expected = open_dataset(data, 16).images.copy()
    (entry,) = cache.glob(f"*{suffix}")
    damage(entry)
    np.testing.assert_array_equal(open_dataset(data, 16).images, expected)
    assert len(decoded) == 10
    open_dataset(data, 16)
    assert len(decoded) == 10


def test_interrupted_build_leaves_nothing_behind(data, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(images, "load", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_dataset(data, 16)
    assert list(cache.iterdir()) == []
    assert len(open_dataset(data, 16)) == 5


def test_entry_finished_by_another_process_during_the_build_does_no_harm(data, cache, monkeypatch):
    load, inner = images.load, []

    def overtaken(path, size, fit):
        if path.endswith("SICK1.png") and not inner:
            inner.append(None)  # the opening below must not start a third one
            inner[0] = open_dataset(data, 16)
        return load(path, size, fit)

    monkeypatch.setattr(images, "load", overtaken)
    outer = open_dataset(data, 16)
    np.testing.assert_array_equal(outer.images, inner[0].images)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_two_processes_may_build_at_once(tmp_path, cache):
    root = write_folder(tmp_path / "many", NORMAL=40, SICK=40)
    (root / "SICK" / "SICK7.png").write_bytes(b"not an image")
    code = (
        "import sys, hashlib; from cxr.datasets import open_dataset; print('ready', flush=True);"
        "sys.stdin.readline(); images = open_dataset(sys.argv[1], 16).images;"
        "print(images.shape, hashlib.sha256(images.tobytes()).hexdigest())"
    )
    home = str(Path(cxr.__file__).parents[1])
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(root)],
            env={**os.environ, "PYTHONPATH": home},
            text=True,
            **pipes,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    printed = [child.communicate(timeout=60)[0] for child in children]
    assert printed[0] == printed[1] and printed[0].startswith("(79, 16, 16)")
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_cache_lies_where_the_environment_says(data, tmp_path, monkeypatch):
    monkeypatch.delenv("CXRGAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_dataset(data, 16)
    assert len(list((tmp_path / "xdg" / "cxrgan").glob("*.npy"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_dataset(data, 16)
    assert len(list((tmp_path / "home" / ".cache" / "cxrgan").glob("*.npy"))) == 1


def test_unwritable_home_falls_back_to_the_temporary_folder(data, tmp_path, monkeypatch, decoded):
    (tmp_path / "file").write_text("no folder can be made below a file, even by root")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("CXRGAN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    open_dataset(data, 16)
    open_dataset(data, 16)
    assert len(decoded) == 5
    assert len(list((tmp_path / "tmp" / f"cxrgan-{os.getuid()}").glob("*.npy"))) == 1
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    cache_module._own_folder.cache_clear()  # of an earlier test
    with pytest.raises(CxrError, match="set CXRGAN_CACHE"):
        open_dataset(data, 8)


# Patients and splits


def test_patients_fall_into_splits_in_the_promised_shares():
    count = Counter(split_of(f"person:{number}") for number in range(20_000))
    assert abs(count["train"] / 20_000 - 0.8) < 0.01
    assert abs(count["val"] / 20_000 - 0.1) < 0.01
    assert abs(count["test"] / 20_000 - 0.1) < 0.01


def test_split_rule_never_changes():
    fixed = {"person:1": "train", "person:2": "test", "person:20": "val", "é": "train"}
    assert {patient: split_of(patient) for patient in fixed} == fixed


@pytest.fixture
def thirty(tmp_path):
    return open_dataset(write_folder(tmp_path / "thirty", NORMAL=30, SICK=30), 16)


def test_rows_and_counts_agree_with_the_splits(thirty):
    splits = {split: thirty.rows(split) for split in ("train", "val", "test")}
    assert sorted(np.concatenate(list(splits.values()))) == thirty.rows("all").tolist()
    for split, rows in splits.items():
        assert {split_of(thirty.patients[row]) for row in rows} == {split}
        negative, positive = thirty.by_class(split)
        assert set(thirty.labels[negative]) == {0} and set(thirty.labels[positive]) == {1}
        assert thirty.counts()[split] == (len(negative), len(positive))
        assert rows.tolist() == sorted([*negative, *positive]) and rows.dtype == np.int64


def test_unknown_split_is_wrong_use(thirty):
    with pytest.raises(UsageError, match="'valid'.*train, val, test or all"):
        thirty.rows("valid")


@pytest.mark.parametrize("given", [".", "covid.2020", "../x/covid.2020/", "t.a.csv"])
def test_a_data_set_is_called_as_its_folder_or_table(tmp_path, monkeypatch, given):
    (tmp_path / "x" / "covid.2020").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "x")
    expected = {".": "x", "t.a.csv": "t.a"}.get(given, "covid.2020")
    assert datasets.name_of(given) == expected


def test_split_that_lacks_a_class_says_how_many_there_are(data):
    path = table(data, "path,label,patient\nNORMAL/NORMAL0.png,normal,a\nSICK/SICK0.png,sick,b\n")
    found = open_dataset(path, 16)
    empty = next(split for split in ("train", "val", "test") if split not in found.splits)
    with pytest.raises(CxrError, match=rf"1 images \(1 patients\).*normal.*{empty} split"):
        found.rows(empty)
    assert found.rows("all").tolist() == [0, 1]


# Batches

ROWS = (np.arange(7), np.arange(100, 123))


def test_batches_are_half_and_half_and_shuffled():
    batches = [balanced_batch(ROWS, 8, seed=1, step=step) for step in range(50)]
    assert all(np.sum(batch < 100) == 4 and len(batch) == 8 for batch in batches)
    assert batches[0].dtype == np.int64
    first_place = Counter(int(batch[0] < 100) for batch in batches)
    assert min(first_place.values()) > 10


def test_three_classes_share_a_batch():
    rows = (np.arange(10), np.arange(10, 40), np.arange(40, 47))
    drawn = np.concatenate([balanced_batch(rows, 16, 1, step) for step in range(21 * 30)])
    counts = np.bincount(drawn, minlength=47)
    for own in rows:
        assert counts[own].sum() == len(drawn) / 3 and np.ptp(counts[own]) <= 1


def test_odd_batches_give_the_larger_half_in_turn():
    sizes = [int(np.sum(balanced_batch(ROWS, 5, 1, step) < 100)) for step in range(4)]
    assert sizes == [3, 2, 3, 2]


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 64])
def test_each_pass_over_a_class_shows_every_image_once(batch):
    drawn = np.concatenate([balanced_batch(ROWS, batch, 3, step) for step in range(2 * 7 * 23)])
    for rows in ROWS:  # batch * 7 * 23 draws of each class: a whole number of passes
        times = Counter(drawn[np.isin(drawn, rows)].tolist())
        assert times == dict.fromkeys(rows.tolist(), batch * 7 * 23 // len(rows))


def test_passes_have_different_orders():
    drawn = np.concatenate([balanced_batch(ROWS, 2, 3, step) for step in range(46)])
    passes = drawn[drawn >= 100].reshape(2, 23)
    assert sorted(passes[0]) == sorted(passes[1]) == ROWS[1].tolist()
    assert (passes[0] != passes[1]).any()


def test_a_batch_depends_on_nothing_but_seed_and_step():
    straight = [balanced_batch(ROWS, 6, 3, step) for step in range(10)]
    np.random.seed(5)
    resumed = [balanced_batch(ROWS, 6, 3, step) for step in range(6, 10)]
    np.testing.assert_array_equal(straight[6:], resumed)
    assert any((balanced_batch(ROWS, 6, 4, step) != straight[step]).any() for step in range(10))


# The data this was developed on


@pytest.mark.skipif("CXRGAN_DATA" not in os.environ, reason="CXRGAN_DATA names no folder")
@pytest.mark.parametrize(
    ("name", "images", "patients"), [("pneumonia", (1341, 3875), 2635), ("covid", (426, 107), 351)]
)
def test_real_data_is_split_by_patient_in_fair_shares(name, images, patients, tmp_path):
    found = open_dataset(Path(os.environ["CXRGAN_DATA"]) / name, 32)
    assert found.classes[0] == "NORMAL" and tuple(np.bincount(found.labels)) == images
    assert len(set(found.patients)) == patients
    assert len(set(zip(found.patients, found.splits))) == patients
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        for label in (0, 1):
            assert abs(found.counts()[split][label] / images[label] - share) < 0.05


def test_each_patient_is_tested_in_one_of_ten_folds():
    tested = [[fold for fold in range(10) if split_of(f"p{i}", fold) == "test"] for i in range(200)]
    assert {len(folds) for folds in tested} == {1}
    assert {fold for (fold,) in tested} == set(range(10))
