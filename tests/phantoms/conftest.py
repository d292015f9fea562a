"""Phantoms that several tests read."""

import pytest

from cxr.phantoms.arm import Arm, Plan


@pytest.fixture(scope="session")
def arm(tmp_path_factory):
    """Phantoms with a marker on every diseased one; nothing is trained."""
    arm = Arm(tmp_path_factory.mktemp("arm"), Plan(phantoms=160), seed=3, shortcut=1.0)
    arm.make()
    return arm
