import json
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import cxrgan
from cxr import CxrError, UsageError, checkpoints
from cxr.checkpoints import Model
from cxr.cnn import check, cost
from cxr.cnn.own import Own, read_input

CNNS = """
import argparse, sys
import torch, torch.nn as nn, torch.nn.functional as F
from cxr import adapt

class Net(nn.Module):
    def __init__(self, answers=1, channels=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(channels, 8, 3, 2, 1), nn.Linear(8, answers)
    def forward(self, x):
        y = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return y[:, 0] if y.shape[1] == 1 else y

def net(): return Net()
def stops(): sys.exit("no weights here")
def parses(): argparse.ArgumentParser(prog="theirs").parse_args(["--lr", "1"])
def needs(path): return Net()
def nothing(): pass
def state(): return Net().state_dict()
def function(): return lambda x: x.mean((1, 2, 3))
def chatty():
    print("loading the weights")
    return Net()
def colour(): return Net(channels=3)
def prefixed():
    net = Net()
    net.load_state_dict({"module." + k: v for k, v in net.state_dict().items()})
def lacking(): Net().load_state_dict({})
def badly(): return adapt(Net(3), target="COVID", classes=["A", "B", "C"])

def many():
    net = Net(3, 3)
    net.classes = ["NORMAL", "PNEUMONIA", "COVID"]
    return net
def findings():
    net = Net(3)
    net.pathologies = ["Edema", "Mass", "Hernia"]
    return net
def soft(): return nn.Sequential(Net(3), nn.Softmax(1))
def adapted(): return adapt(Net(3, 3), 64, output="logits", classes=["A", "B", "C"])

class Late(Net):
    def forward(self, x):
        if x.shape[-1] == 48:
            raise ValueError("no such size")
        return super().forward(x)
def late(): return Late()
"""


@pytest.fixture(scope="module")
def cnns(tmp_path_factory):
    path = tmp_path_factory.mktemp("cnns") / "own.py"
    path.write_text(CNNS)
    return path


def line_of(text):
    return 2 + CNNS[: CNNS.index(text)].count("\n") - 1


FAILURES = {
    "stops": r"it ended the program \(sys.exit, status no weights here\) \(own.py, line {}\)",
    "parses": r"it ended the program \(sys.exit, status 2\) \(own.py, line {}\)",
    "needs": "missing 1 required positional argument: 'path'",
    "nothing": "returns a NoneType, not a torch.nn.Module",
    "state": "returns a dict: build the module and load_state_dict it",
    "function": "returns a function, not a torch.nn.Module",
    "colour": r"expected input.* to have 3 channels, but got 1 .*cxrgan.adapt\(module, channels=...\)",
    "prefixed": r"missing keys: conv.weight, .*begin with `module.`, as DataParallel saves them",
    "lacking": r"missing keys: conv.weight, conv.bias, fc.weight, fc.bias \(own.py, line {}\)",
    "badly": r"own.py, line {}: target COVID: no such class; there are A, B, C",
    "many": r"returns \[2, 3\] for 2 images|to have 3 channels",
    "absent": "has no attribute 'absent' that makes a network; it has Net, net, stops",
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_users_code_raises_is_told_with_the_line_of_its_file(cnns, name):
    line = line_of("Net().load_state_dict({})") if name == "lacking" else None
    line = line or (line_of(f"def {name}(") if name != "absent" else 0)
    with pytest.raises(CxrError, match=FAILURES[name].format(line)) as caught:
        checkpoints.load_classifier(f"{cnns}:{name}", 32)
    assert "\n" not in str(caught.value)


def test_syntax_errors_and_failing_imports_are_told_with_their_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ndef net(:\n")
    (tmp_path / "importing.py").write_text("\nimport no_such_package\n")
    for name, words in (("broken", "SyntaxError"), ("importing", "ModuleNotFoundError")):
        with pytest.raises(CxrError, match=rf"{words}: .*\({name}.py, line 2\)"):
            checkpoints.load_classifier(f"{tmp_path / name}.py:net", 32)


def test_what_a_users_code_prints_comes_under_its_name(cnns, capsys):
    checkpoints.load_classifier(f"{cnns}:chatty", 32)
    assert capsys.readouterr() == ("", "own.py: loading the weights\n")


def test_the_users_code_does_not_see_cxrgans_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cxrgan", "explain", "--restarts", "3"])
    path = tmp_path / "own.py"
    parse = "import argparse\nwords = argparse.ArgumentParser().parse_args()\n"
    path.write_text(CNNS.replace("import argparse, sys", parse + "import sys"))
    checkpoints.load_classifier(f"{path}:net", 32)
    assert sys.argv[1] == "explain"


def test_a_file_without_a_function_is_told_which_it_has(cnns):
    with pytest.raises(UsageError, match="say which function makes the network, as .*own.py:net"):
        checkpoints.load_classifier(str(cnns), 32)


def test_a_failure_while_explaining_is_the_users_own_too(cnns):
    network = checkpoints.load_classifier(f"{cnns}:late", 32).classifier
    with pytest.raises(CxrError, match=r"ValueError: no such size \(own.py, line \d+\)"):
        network(torch.zeros(1, 1, 48, 48))


def test_target_and_input_make_a_logit_of_several_answers(cnns):
    x = 2 * torch.rand(2, 1, 32, 32) - 1
    options = {"target": "COVID", "classifier_input": "48,3,0,255"}
    many = checkpoints.load_classifier(f"{cnns}:many", 32, **options).classifier
    raw = many.network.module(many.network.before(x))
    p = raw.softmax(1)[:, 2]
    torch.testing.assert_close(many(x), (p / (1 - p)).log(), atol=1e-4, rtol=1e-4)
    findings = checkpoints.load_classifier(f"{cnns}:findings", 32, target="Mass").classifier
    torch.testing.assert_close(findings(x), findings.network.module(x)[:, 1])
    soft = checkpoints.load_classifier(f"{cnns}:soft", 32, target="1").classifier
    p = soft.network.module(x)[:, 1]
    torch.testing.assert_close(soft(x), (p / (1 - p)).log(), atol=1e-4, rtol=1e-4)


def test_the_target_of_an_adapted_cnn_is_named_on_the_command_line(cnns):
    x, spec = torch.rand(2, 1, 32, 32), f"{cnns}:adapted"
    logits = [checkpoints.load_classifier(spec, 32, target=t).classifier(x) for t in "ABC"]
    p = torch.stack(logits).sigmoid().sum(0)
    torch.testing.assert_close(p, torch.ones(2))
    with pytest.raises(CxrError, match="say which is the target, one of A, B, C"):
        checkpoints.load_classifier(spec, 32)
    with pytest.raises(UsageError, match="says already what it takes"):
        checkpoints.load_classifier(spec, 32, classifier_input="imagenet")


@pytest.mark.parametrize(
    "spec, target, told",
    [
        ("many", "COVID", ("NORMAL+PNEUMONIA", "COVID")),
        ("many", "2", ("NORMAL+PNEUMONIA", "COVID")),
        ("findings", "Mass", ("no Mass", "Mass")),
        ("adapted", "B", ("A+C", "B")),
        ("soft", "1", ("another answer", "answer 1")),
    ],
)
def test_a_cnn_tells_what_its_answer_speaks_for(cnns, spec, target, told):
    takes = {"classifier_input": "48,3,0,255"} if spec == "many" else {}
    loaded = checkpoints.load_classifier(f"{cnns}:{spec}", 32, target=target, **takes)
    assert loaded.classifier.told == told


@pytest.mark.parametrize("text", ["224", "224,3,0", "a,b,c,d", "224,3,0,1,2", ""])
def test_an_input_that_cannot_be_read_says_how_it_is_written(text):
    with pytest.raises(UsageError, match="say SIZE,CHANNELS,LOW,HIGH, as 224,3,0,1, or imagenet"):
        read_input(text)


def test_options_of_a_users_own_are_refused_for_a_model_file(model_file):
    with pytest.raises(UsageError, match="is for a CNN of your own"):
        checkpoints.load_classifier(str(model_file), 32, classifier_input="imagenet")
    with pytest.raises(UsageError, match="tells NORMAL from SICK, no more"):
        checkpoints.load_classifier(str(model_file), 32, target="COVID")


class Wide(nn.Module):
    """Keeps 1 MB for each image of 32 x 32 pixels."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def forward(self, x):
        self.shown.append(len(x))
        return x.expand(-1, 256, -1, -1).sigmoid().mean((1, 2, 3))


def test_no_more_images_are_shown_at_once_than_memory_allows(monkeypatch, tmp_path):
    wide, x = Wide(), torch.rand(10, 1, 32, 32)
    whole = wide(x)
    assert cost.at_once(wide, x[:1], 2**24) == 16
    monkeypatch.setattr(cost, "BYTES_AT_ONCE", 2**21)  # half of what is kept
    network, wide.shown = Own(wide, tmp_path / "own.py", "own.py:net"), []
    with torch.no_grad():
        torch.testing.assert_close(network(x), whole)
    assert wide.shown[1:] == [4, 4, 2]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x)
    (expected,) = torch.autograd.grad(wide(x).sum(), x)
    torch.testing.assert_close(slope, expected)


def test_check_cnn_shows_a_model_file_the_pictures_it_was_trained_on(
    model, xrays, tmp_path, monkeypatch
):
    asked, unchanged = [], check.open_dataset
    monkeypatch.setattr(
        check, "open_dataset", lambda *a, **k: asked.append(a) or unchanged(*a, **k)
    )
    path = str(tmp_path / "model")
    Model({"classifier": model.classifier}, {**model.info, "fit": "pad"}).save(path)
    check.check_cnn(path, str(xrays))
    assert asked == [(str(xrays), 32, "pad")]
    with pytest.raises(UsageError, match="sees 32 pixels: leave --size out"):
        check.check_cnn(path, size=64)


def test_check_cnn_says_yes_or_names_what_to_change(cnns, xrays, own_classifier):
    def run(*words):
        words = ("check-cnn", *words, "--size", "32")
        return CliRunner().invoke(cxrgan.cli, [str(word) for word in words])

    good = run(f"{own_classifier}:bright", xrays, "--json")
    numbers = json.loads(good.stdout)
    assert good.exit_code == 0 and numbers["failed"] == 0 and numbers["auroc"]["value"] > 0.9
    assert "its author's code" in numbers["form"]
    blind = run(f"{cnns}:findings", xrays, "--target", "Mass")
    assert "AUROC on 120 images" in blind.stdout
    several = run(f"{cnns}:findings", xrays)
    assert several.exit_code == 1
    line = several.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "--target NAME" in line
