import os

import pytest
import torch

from cxr import UsageError, build, device


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cpu:cpu", ""])
def test_a_device_that_is_none_is_refused_in_words(name):
    with pytest.raises(UsageError, match="say auto, cpu, cuda or cuda:N"):
        device.find_device(name)


def test_finding_a_device_loads_nothing(monkeypatch):
    monkeypatch.setattr(build, "load", lambda: pytest.fail("the kernels are loaded"))
    assert device.find_device("cpu") == torch.device("cpu")


def test_preparing_a_device_loads_the_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "load", lambda: asked.append(1))
    assert device.prepare("cpu") == torch.device("cpu") and asked == [1]


def test_the_machine_is_told_in_lines():
    lines = dict(device.machine())
    assert lines["torch"] == torch.__version__ and "pneumonia" in lines["shipped models"]


@pytest.mark.parametrize(
    ("idle", "given", "threads"),
    [(4.0, None, 4), (2.9, None, 3), (0.1, None, 1), (0.1, "4", 4), (None, None, 4)],
)
def test_a_busy_machine_is_shared(idle, given, threads, monkeypatch, capsys):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(device, "_idle_cores", lambda seconds: idle)
    try:
        torch.set_num_threads(4)
        device.share_cores()
        assert torch.get_num_threads() == threads
        assert ("threads" in capsys.readouterr().err) == (threads < 4)
    finally:
        torch.set_num_threads(before)


def test_idle_cores_are_counted():
    assert 0 <= device._idle_cores(0.05) <= 1.5 * os.cpu_count()
