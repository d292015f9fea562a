import numpy as np
import pytest
from PIL import Image

from cxr import CxrError, UsageError
from cxr.data.patients import LATE_SETS, PUBLIC_SETS, report, tell_patients
from cxr.datasets import open_dataset


def told(names, **options):
    return [t.patient for t in tell_patients(names, names, **options)]


SETS = [pytest.param(s, id=f"{s.name}-{s.patient}") for s in (*PUBLIC_SETS, *LATE_SETS)]


@pytest.mark.parametrize("public", SETS)
def test_the_patient_of_a_public_set_is_found_anywhere_in_the_path(public):
    names = [public.example, f"a/b/{public.example}", "person1_virus_6.jpeg"]
    assert told(names)[:2] == [public.patient] * 2


def test_several_views_of_a_chexpert_patient_are_one_patient():
    views = [f"train/patient00007/study{n}/view{n}_frontal.jpg" for n in (1, 2)]
    flat = "patient00007_study1_view1_frontal.jpg"
    other = "train/patient00008/study1/view1_frontal.jpg"
    assert told([*views, flat, other]) == ["CheXpert:00007"] * 3 + ["CheXpert:00008"]


ONE_PATIENT = [
    ("person123_bacteria_4.jpeg", "person123_virus_7.jpeg", "person123_virus_921_1.jpeg"),
    ("IM-0115-0001.jpeg", "NORMAL2-IM-0115-0001.jpeg", "IM-0115-0001-0002.jpeg"),
    ("00001280_004.png", "00001280_011.png"),
    ("atlas.pdf-000-fig1a.png", "atlas.pdf-000-fig1b.png", "atlas.pdf-003-fig4b.png"),
    ("1-s2.0-S16-main.pdf-002-a1.png", "1-s2.0-S16-main.pdf-003-b2.png"),
    ("1-s2.0-S09-gr2_lrg-a.png", "1-s2.0-S09-gr2_lrg-b.png", "1-s2.0-S09-fx1_lrg.png"),
    ("4159_2020_Fig1_HTML.webp-day10.png", "4159_2020_Fig1_HTML.webp-day5.png"),
    ("all14-fig-0001-m-b.png", "all14-fig-0002-m-f.png"),
    ("case-24-day12.png", "case-24-day6.png", "case-24-PA.png", "case-24.png"),
    ("week-1-day0-PA.png", "week-1-day3.png"),
    ("rapid-12-hours.png", "rapid-3-days.png", "rapid-admission.png"),
    ("jkms-35-e79-g001-l-a.png", "jkms-35-e79-g002-l-c.png"),
    ("lancet-case2a.png", "lancet-case2b.png"),
    ("nejmc20_f1a.png", "NEJMC20_F2B.PNG"),
    ("ryct.2020.fig2.png", "ryct.2020.fig5-day0.png"),
]


def test_names_of_one_patient_count_as_one():
    names = [name for group in ONE_PATIENT for name in group]
    patients = dict(zip(names, told(names)))
    for group in ONE_PATIENT:
        assert len({patients[name] for name in group}) == 1
    cohen = ["lancet-case2a.png", "lancet-case2b.png", "nejm1_f1.png", "nejm2_f1.png"]
    assert told(cohen)[:2] == ["document:lancet-case2"] * 2


def test_no_two_patients_are_taken_for_one():
    others = [
        *("person12_bacteria_4.jpeg", "IM-0012-0001.jpeg", "00000012_000.png", "12.png"),
        *("person1234_virus_1.jpeg", "IM-1150-0001.jpeg", "00012800_000.png"),
        *("covid-19-pneumonia-2.png", "covid-19-pneumonia-12.png", "covid-19-pneumonia-19.png"),
        *("jkms-35-e80-g001-l-a.png", "lancet-case3a.png", "rapider-3-days.png", "a.png", "b.png"),
        *("2B8649B2-00C4-4233-85D5-1CE240CF233B.png", "2B8649B2-00C4-4233-85D5-1CE240CF232B.png"),
        *("personal_1.png", "personal_2.png", "IMG-1.png", "IMG-2.png", "fig1.png", "fig2.png"),
    ]
    names = [group[0] for group in ONE_PATIENT] + others
    assert len(set(told(names))) == len(names)


@pytest.mark.parametrize(
    "names",
    [
        ("ward/mueller/IM-0001-0001.dcm", "ward/schmidt/IM-0001-0001.dcm"),
        ("site-a.png", "site-b.png"),
        ("x/1.png", "y/1.png"),
        ("siteA/patient1/x.png", "siteB/patient1/x.png"),
        ("one/sub-01/ses-1/x.png", "two/sub-01/ses-1/x.png"),
        ("scan_2020-01-01-day1.png", "scan_2020-01-01-day2.png"),
        ("20200131_001.png", "20200131_002.png"),
        ("p1234567/x.png", "p12345678x/x.png"),
    ],
)
def test_a_rule_of_one_collection_is_not_used_for_others(names):
    assert len(set(told(names))) == 2


def test_a_patients_folder_is_one_patient_whatever_it_holds():
    assert len(set(told(["a/patient1/s1/x.png", "a/patient1/s2/x.png", "a/patient1_b.png"]))) == 1
    assert len(set(told(["sub-7/ses-1/x.png", "sub-7/ses-2/x.png"]))) == 1


def test_a_dicom_header_is_asked_where_the_path_says_nothing():
    names = ["x/1.dcm", "y/1.dcm", "patient3/1.dcm"]
    assert told(names, header=lambda place: "77") == ["DICOM:77", "DICOM:77", "patient:3"]


def test_pattern_gives_its_first_group_from_the_name_or_else_from_the_path():
    assert told(["SICK/pat07_3.png"], pattern=r"^pat(\d+)_(\d)") == ["07"]
    assert told(["SICK/patient5/study1/frontal.png"], pattern=r"patient(\d+)") == ["5"]


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        (r"pat(\d+", UsageError, "not a regular expression"),
        (r"pat\d+", UsageError, "in parentheses"),
        (r"id(\d+)", CxrError, "SICK/pat07.png.*finds no patient"),
        (r"pat(x)?", CxrError, "finds no patient"),
    ],
)
def test_unfit_pattern_is_explained(pattern, error, message):
    with pytest.raises(error, match=message):
        told(["SICK/pat07.png"], pattern=pattern)


def said(capsys, names, **options):
    report(names, tell_patients(names, names, **options))
    return capsys.readouterr().err


def test_how_patients_were_told_is_said_with_an_example(capsys):
    names = ["person1000_bacteria_2931.jpeg", "person1000_virus_1681.jpeg", "person2_virus_1.jpeg"]
    assert said(capsys, names) == (
        "3 images of 2 patients, told by the names of Kermany: person1000_bacteria_2931.jpeg is "
        "patient person1000\n"
    )


@pytest.mark.parametrize("public", [pytest.param(s, id=s.name) for s in LATE_SETS])
def test_names_that_hold_no_patient_are_warned_of(public, capsys):
    told_so = said(capsys, [public.example])
    assert f"tell apart the {public.holds}, not the patient: 1 images" in told_so


def test_what_looks_wrong_is_warned_of(capsys):
    assert "2 images count as a patient each" in said(capsys, ["a.png", "b.png"])
    names = [f"x{n}/a.png" for n in range(30)]
    warning = said(capsys, names, header=lambda place: "ANON" if place < 20 else str(place))
    assert "patient DICOMANON has 20 of 30 images" in warning
    names = [f"ward{n}/p1_x.png" for n in range(9)]
    assert "lies in 9 folders" in said(capsys, names, pattern=r"(p\d)_")


@pytest.mark.parametrize(
    "column", ["patient", "Patient ID", "patient_id", "PatientID", "subject_id", "patientid", "sub"]
)
def test_a_table_names_the_patient_under_the_usual_names(xrays, tmp_path, column):
    files = sorted(xrays.rglob("*.png"))
    lines = [f"{path},{path.parent.name},p{row // 4}" for row, path in enumerate(files)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([f"path,label,{column}", *lines]))
    assert set(open_dataset(table, 32).patients) == {f"p{row // 4}" for row in range(len(files))}


def test_pictures_in_two_classes_or_splits_are_warned_of(tmp_path, capsys):
    for split in ("train", "test"):
        for number, label in enumerate(("NORMAL", "SICK")):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number}.png")
    open_dataset(tmp_path, 16)
    warning = capsys.readouterr().err
    assert "2 identical pictures stand in two splits" in warning
    assert "two classes" not in warning
    (tmp_path / "test" / "SICK" / "again.png").write_bytes(
        (tmp_path / "test" / "NORMAL" / "test0.png").read_bytes()
    )
    open_dataset(tmp_path, 16)
    assert "1 identical pictures stand in two classes" in capsys.readouterr().err


def test_a_dicom_header_goes_before_a_name_that_holds_an_image(capsys):
    names = [s.example for s in LATE_SETS if s.holds == "image"]
    assert told(names, header=lambda place: "7") == ["DICOM:7", "DICOM:7"]
