import numpy as np
import pytest
from PIL import Image

from cxr import CxrError, UsageError, datasets
from cxr.datasets import open_dataset


@pytest.fixture
def root(tmp_path):
    """A folder with im/0.png ... im/7.png."""
    (tmp_path / "im").mkdir()
    for number in range(8):
        picture(tmp_path / "im" / f"{number}.png", number)
    return tmp_path


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def opened(root, text, encoding="utf-8", **options):
    table = root / "t.csv"
    table.write_bytes(text.encode(encoding))
    return open_dataset(table, 16, **options)


def lines(head, *rows):
    return "\n".join([head, *rows]) + "\n"


def pairs(found):
    """{file name: label} of a data set."""
    return {path.rsplit("/", 1)[1]: int(label) for path, label in zip(found.paths, found.labels)}


EIGHT = [f"im/{n}.png,{('normal', 'kränk')[n % 2]}" for n in range(8)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_delimiters_and_encodings_are_told(root, delimiter, encoding):
    text = lines("path,label", *EIGHT).replace(",", delimiter)
    found = opened(root, text, encoding)
    assert found.classes == ("normal", "kränk") and found.labels.tolist() == [0, 1] * 4


def test_excel_may_say_its_delimiter(root):
    assert len(opened(root, "sep=;\n" + lines("path,label", *EIGHT).replace(",", ";"))) == 8


@pytest.mark.parametrize(
    "path", ["Path", "Image Index", "filename", "image_id", "File Name", "image_path", "ImageID"]
)
@pytest.mark.parametrize("label", ["label", "Finding Labels", "finding", "Target", "class"])
def test_columns_are_known_by_their_usual_names(root, path, label):
    assert len(opened(root, lines(f"{path},{label}", *EIGHT))) == 8


def test_columns_can_be_named(root):
    text = lines("where,what,who", *(f"{line},p{n // 2}" for n, line in enumerate(EIGHT)))
    named = {"path_column": "where", "label_column": "what", "patient_column": "who"}
    assert set(opened(root, text, **named).patients) == {"p0", "p1", "p2", "p3"}
    with pytest.raises(UsageError, match="--patient-column whom: .* it has where, what, who"):
        opened(root, text, **{**named, "patient_column": "whom"})


@pytest.mark.parametrize(
    ("head", "option"),
    [
        ("filename,image_id,label", "--path-column"),
        ("path,finding,class", "--label-column"),
        ("path,label,patient_id,subject_id", "--patient-column"),
        ("path,age", "--label-column"),
        ("age,label", "--path-column"),
    ],
)
def test_what_cannot_be_told_is_asked_for_by_its_option(root, head, option):
    with pytest.raises(UsageError, match=f"Say {option}"):
        opened(root, lines(head, "im/0.png,normal,1,2"))


def test_lines_of_one_image_are_merged(root, capsys):
    boxes = [f"{line},{box}" for line in EIGHT for box in range(3)]
    found = opened(root, lines("path,label,x", *boxes))
    assert len(found) == 8
    assert "24 lines are of 8 images" in capsys.readouterr().err


def test_findings_of_several_lines_and_of_one_cell_are_united(root):
    text = lines(
        "image_id,class_name",
        *("im/0.png,No finding", "im/1.png,Mass|Nodule", "im/2.png,Mass", "im/2.png,Edema"),
        *("im/3.png,No finding", "im/4.png,Nodule", "im/5.png,\"['Mass', 'Edema']\""),
    )
    mass = {"0.png": 0, "1.png": 1, "2.png": 1, "3.png": 0, "4.png": 0, "5.png": 1}
    found = opened(root, text, positive="Mass")
    assert pairs(found) == mass and found.classes == ("No finding+Nodule", "Mass")
    found = opened(root, text, positive="Mass", negative="No finding")
    assert pairs(found) == {k: v for k, v in mass.items() if k != "4.png"}
    found = opened(root, text, negative="No finding")
    assert pairs(found) == {**mass, "4.png": 1}
    assert found.classes == ("No finding", "Edema+Mass+Nodule")
    with pytest.raises(UsageError, match=r"4 classes: Mass \(3\), .*--negative"):
        opened(root, text)


def test_a_pattern_that_is_given_goes_before_a_column_that_is_found(root):
    text = lines("path,label,patient", *(f"{line},one" for line in EIGHT))
    assert len(set(opened(root, text, patient_pattern=r"(\d)\.png").patients)) == 8
    with pytest.raises(UsageError, match="give one"):
        opened(root, text, patient_pattern=r"(\d)", patient_column="patient")


def test_uncertain_labels_are_left_out_and_counted(root, capsys):
    cells = ["0", "1", "-1", "NA", "0.0", "1.0", "-1.0", "nan"]
    text = lines("path,label", *(f"im/{n}.png,{cell}" for n, cell in enumerate(cells)))
    found = opened(root, text)
    assert pairs(found) == {"0.png": 0, "1.png": 1, "4.png": 0, "5.png": 1}
    assert "left out 4 images whose label is uncertain" in capsys.readouterr().err


def test_a_patient_that_is_missing_is_no_patient(root):
    names = ["a", "nan", "NA", "", "b", "null", "#N/A", "c"]
    text = lines("path,label,patient", *(f"{l},{n}" for l, n in zip(EIGHT, names)))
    assert len(set(opened(root, text).patients)) == 8


def test_classes_that_differ_in_case_alone_are_one(root, capsys):
    classes = ["NORMAL", "Covid", "Normal", "COVID", "NORMAL", "COVID", "NORMAL", "COVID"]
    text = lines("path,label", *(f"im/{n}.png,{name}" for n, name in enumerate(classes)))
    for asked in ({}, {"negative": "Normal"}, {"positive": "covid"}):
        found = opened(root, text, **asked)
        assert found.classes == ("NORMAL", "COVID") and found.labels.tolist() == [0, 1] * 4
        told = " ".join(capsys.readouterr().err.split())
        assert "COVID (3), Covid (1) differ in case alone: taken for one class, COVID" in told
        assert "NORMAL (3), Normal (1) differ" in told


def test_a_column_of_0_and_1_is_a_finding(root, capsys):
    rows = ["1.0,", ",1.0", "0.0,1.0", ",-1.0", "1.0,0.0", "0.0,0.0", "0.0,1", "1,0"]
    text = lines("Path,No Finding,Edema", *(f"im/{n}.png,{row}" for n, row in enumerate(rows)))
    found = opened(root, text, positive="Edema")
    assert pairs(found) == {"1.png": 1, "2.png": 1, "4.png": 0, "5.png": 0, "6.png": 1, "7.png": 0}
    assert "left out 2 images whose label is uncertain" in capsys.readouterr().err
    found = opened(root, text, positive="Edema", negative="No Finding")
    assert pairs(found) == {
        "0.png": 0,
        "1.png": 1,
        "2.png": 1,
        "4.png": 0,
        "6.png": 1,
        "7.png": 0,
    }
    assert found.classes == ("No Finding", "Edema")
    with pytest.raises(CxrError, match="line 2: the column Edema holds 'maybe'"):
        opened(root, lines("Path,Edema", "im/0.png,maybe"), positive="Edema")


def test_leaving_a_class_out_moves_nobody_to_another_split(root):
    for place in range(8):
        picture(root / "other" / f"{place}.png", 50 + place)
    rows = [f"other/{n}.png,{('kränk', 'third')[n % 2]}" for n in range(8)]
    text = lines("path,label", *EIGHT, *rows)
    some = opened(root, text, positive="kränk", negative="normal")
    every = opened(root, text, negative="normal")
    patients = dict(zip(every.paths, every.patients))
    assert len(some) == 12 and all(patients[p] == q for p, q in zip(some.paths, some.patients))


def test_backslashes_and_folders_above_the_table_are_no_hindrance(root):
    rows = [f"C:\\data\\set\\{line}".replace("/", "\\") for line in EIGHT[:4]] + [
        f"some-set-v1/train/{line}" for line in EIGHT[4:]
    ]
    assert len(opened(root, lines("path,label", *rows))) == 8


def test_bare_names_and_ids_are_found_anywhere_below(root):
    rows = [line.removeprefix("im/") for line in EIGHT]
    assert len(opened(root, lines("path,label", *rows))) == 8
    rows = [row.replace(".png", "") for row in rows]
    assert len(opened(root, lines("image_id,label", *rows))) == 8
    picture(root / "other" / "3.png", 3)
    with pytest.raises(CxrError, match="3 may be .*3.png or .*3.png; give the path"):
        opened(root, lines("image_id,label", *rows))


def test_an_image_may_be_called_by_its_patient(root):
    rows = [line.removeprefix("im/").replace(".png", "") for line in EIGHT]
    found = opened(root, lines("patientId,Target", *rows))
    assert sorted(found.patients) == [str(n) for n in range(8)]
    rows = [f"{row},{n // 2}" for n, row in enumerate(rows)]
    found = opened(root, lines("patientid,Target,subject", *rows), patient_column="subject")
    assert len(found) == 8 and len({*found.patients}) == 4


def test_a_column_of_splits_is_used(root, capsys):
    names = ["train", "training", "valid", "val", "validation", "test", "test", "train"]
    rows = [f"{line},{name},{n // 2}" for n, (line, name) in enumerate(zip(EIGHT, names))]
    found = opened(root, lines("path,label,split,patient", *rows))
    assert found.splits.tolist() == [
        *("train", "train", "val", "val", "val", "test", "test", "train")
    ]
    told = capsys.readouterr().err
    assert "comes with its own splits: train 3, val 3, test 2" in told
    assert "2 patients stand in two splits (the first: 2, in val and test)" in told
    rows = [row.replace("valid,", "holdout,") for row in rows]
    found = opened(root, lines("path,label,split,patient", *rows))
    assert "the column split is not used: it holds holdout" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--fold 3"):
        opened(root, lines("path,label,split", *(f"{r},{s}" for r, s in zip(EIGHT, names))), fold=3)


def with_sources():
    sources = ("A", "A", "B", "", "B", "A", "A", "A")
    rows = (f"{row},{patient},{source}" for patient, row, source in zip("abcdbfgh", EIGHT, sources))
    return lines("path,label,patient,source", *rows)


def test_a_source_that_is_left_out_is_tested_with_all_of_its_patients(root, capsys):
    plain = opened(root, with_sources())
    assert plain.sources == ("A", "A", "B", None, "B", "A", "A", "A")
    assert set(plain.scanners) == {None}
    found = opened(root, with_sources(), leave_out="source=B")
    left = [patient in "bc" for patient in found.patients]
    assert sum(left) == 3  # of patient b, the image of source A, too
    assert all(split == "test" for split, out in zip(found.splits, left) if out)
    kept = [split for split, out in zip(found.splits, left) if not out]
    assert kept == [split for split, out in zip(plain.splits, left) if not out]
    assert "the 3 images of the 2 patients of source B are left out" in capsys.readouterr().err
    assert found.rule.endswith("; source=B: test")


def test_a_patient_is_no_image(root):
    """But RSNA's, whose patientId is the name of a file."""
    rows = [f"{path},{n}" for n, path in enumerate(EIGHT)]
    with pytest.raises(UsageError, match="which column names an image's file.*--path-column"):
        opened(root, lines("Datei,label,Patient", *rows))
    found = opened(root, lines("Datei,label,Patient", *rows), path_column="Datei")
    assert len(found) == 8


def test_a_column_may_say_yes_and_no(root):
    rows = [f"im/{n}.png,{('No', 'yes', 'FALSE', 'True')[n % 4]}" for n in range(8)]
    found = opened(root, lines("path,ill", *rows), positive="ill")
    assert found.labels.tolist() == [0, 1] * 4


def test_what_a_model_left_out_is_left_out_of_its_data_and_said(root, capsys):
    opened(root, with_sources())
    info = {"leave_out": "source=B", "provenance": {"data": "t"}}
    assert datasets.left_out(info, root / "t.csv") == {"leave_out": "source=B"}
    assert "--leave-out source=B, as in the training of the model" in capsys.readouterr().err
    assert datasets.left_out(info, root / "other.csv") == {}
    assert opened(root, with_sources(), leave_out="").rule == datasets.SPLIT_RULE


@pytest.mark.parametrize(
    "named, words",
    [
        ("B", "say source=NAME or scanner=NAME"),
        ("source=C", "has no such source; there are A"),
        ("scanner=B", "has no column scanner"),
    ],
)
def test_a_source_that_is_not_there_is_refused(root, named, words):
    with pytest.raises(UsageError, match=words):
        opened(root, with_sources(), leave_out=named)
