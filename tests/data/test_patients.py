import pytest
from cxr.patients import PATIENT_PATHS, patient_of

from cxr.datasets import open_dataset


@pytest.mark.parametrize("name, _, example, patient", PATIENT_PATHS)
def test_the_patient_of_a_public_set_is_found_anywhere_in_the_path(name, _, example, patient):
    assert patient_of(example) == f"{name}:{patient}"


def test_several_views_of_a_chexpert_patient_are_one_patient():
    views = [f"train/patient00007/study{n}/view{n}_frontal.jpg" for n in (1, 2)]
    assert len({patient_of(view) for view in views}) == 1
    assert patient_of("train/patient00008/study1/view1_frontal.jpg") != patient_of(views[0])


@pytest.mark.parametrize(
    "column", ["patient", "Patient ID", "patient_id", "PatientID", "subject_id"]
)
def test_a_table_names_the_patient_under_the_usual_names(xrays, tmp_path, column):
    files = sorted(xrays.rglob("*.png"))
    lines = [f"{path},{path.parent.name},p{row // 4}" for row, path in enumerate(files)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([f"path,label,{column}", *lines]))
    assert set(open_dataset(table, 32).patients) == {f"p{row // 4}" for row in range(len(files))}
