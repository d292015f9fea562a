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
