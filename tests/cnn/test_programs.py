import json
import pickle
import shutil
import zipfile

import pytest
import torch
from torch import nn

from cxr import CxrError, UsageError, checkpoints, explain
from cxr.cnn import own


def network(channels=3, answers=1):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, answers)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network in every kind of file."""
    folder, net = tmp_path_factory.mktemp("programs"), network()
    x = torch.zeros(2, 3, 48, 48)
    torch.export.save(torch.export.export(net, (x,)), folder / "fixed.pt2")
    sizes = ({0: torch.export.Dim("n", min=1, max=1024)},)
    free = torch.export.export(net, (x,), dynamic_shapes=sizes)
    note = {"cxrgan-input": "48,3,0,1"}
    torch.export.save(free, folder / "free.pt2", extra_files=note)
    torch.export.save(torch.export.export(network(3, 3), (x,)), folder / "many.pt2")
    traced = torch.jit.trace(net, x)
    torch.jit.save(traced, folder / "traced.pt")
    torch.jit.save(torch.jit.script(net), folder / "scripted.pt", _extra_files=note)
    torch.save(net, folder / "module.pt")
    torch.save(net.state_dict(), folder / "state.pth")
    (folder / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    (folder / "cut.pt2").write_bytes((folder / "fixed.pt2").read_bytes()[:-99])
    (folder / "net.onnx").write_bytes(b"onnx")
    return folder


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("fixed.pt2", "48,3,0,1"),
        ("free.pt2", None),
        ("traced.pt", "48,3,0,1"),
        ("scripted.pt", None),
    ],
)
def test_a_program_answers_as_the_network_it_was_made_from(files, name, given):
    spec = str(files / name)
    found = checkpoints.load_classifier(spec, 32, classifier_input=given).classifier
    x = (2 * torch.rand(5, 1, 32, 32) - 1).requires_grad_()
    larger = nn.functional.interpolate(x, (48, 48), mode="bilinear", antialias=True)
    expected = network()((larger.expand(-1, 3, -1, -1) + 1) / 2)[:, 0]
    torch.testing.assert_close(found(x), expected)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found(x), expected)]
    torch.testing.assert_close(*slopes)


def test_several_answers_of_a_program_need_a_target(files):
    spec, given = str(files / "many.pt2"), "48,3,0,1"
    with pytest.raises(CxrError, match="3 answers for an image: say which is the target"):
        checkpoints.load_classifier(spec, 32, classifier_input=given)
    found = checkpoints.load_classifier(spec, 32, target="2", classifier_input=given).classifier
    assert found(torch.rand(3, 1, 32, 32)).shape == (3,)


@pytest.mark.parametrize("name", ["fixed.pt2", "traced.pt"])
def test_what_a_program_does_not_say_is_asked_for(files, name):
    with pytest.raises(UsageError, match="give --classifier-input SIZE,CHANNELS,LOW,HIGH"):
        checkpoints.load_classifier(str(files / name), 32)


def test_an_input_that_contradicts_the_program_is_refused(files):
    with pytest.raises(UsageError, match="takes 48 pixels and 3 channels: begin with 48,3"):
        checkpoints.load_classifier(str(files / "fixed.pt2"), 32, classifier_input="imagenet")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("module.pt", "is a pickle, which may run any code"),
        ("state.pth", "is a pickle, which may run any code"),
        ("plain.pkl", "Pickles are not read"),
        ("cut.pt2", "is it whole"),
        ("net.onnx", "only PyTorch's networks"),
        ("absent.pt2", "there is no file"),
    ],
)
def test_other_files_are_refused_in_one_line(files, name, words):
    with pytest.raises(CxrError, match=words) as caught:
        checkpoints.load_classifier(str(files / name), 32, classifier_input="imagenet")
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return open, (Bomb.path, "w")


def spoiled(source, target, part, change):
    """A copy of an archive in which the members whose name ends with `part` are changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(part) else content)
    return target


@pytest.mark.parametrize("part", ["weights", "sample", "expression"])
def test_a_program_that_would_run_code_is_refused_before_it_does(files, tmp_path, part):
    Bomb.path = str(tmp_path / "ran")
    if part == "weights":

        def change(content):
            config = json.loads(content)
            for entry in config["config"].values():
                entry["use_pickle"] = True
            return json.dumps(config).encode()

        member = "model_weights_config.json"
    elif part == "sample":
        member = "sample_inputs/model.pt"
        torch.save(Bomb(), tmp_path / "bomb")
        change = lambda _: (tmp_path / "bomb").read_bytes()
    else:
        member = "models/model.json"
        code = f'"expr_str": "open({Bomb.path!r}, chr(119))"'.encode()
        change = lambda content: content[:-1] + b", " + code + b"}"
    path = spoiled(files / "fixed.pt2", tmp_path / "bad.pt2", member, change)
    with pytest.raises(CxrError, match="pickled objects or code|cannot be read"):
        checkpoints.load_classifier(str(path), 32, classifier_input="48,3,0,1")
    assert not (tmp_path / "ran").exists()


def test_each_form_says_whether_its_authors_code_runs(files):
    assert "none of its author's code" in own.form(str(files / "fixed.pt2"))
    assert "no Python" in own.form(str(files / "traced.pt"))
    assert "may do whatever you may" in own.form("own.py:net")


def test_a_program_may_be_called_by_any_name(files, tmp_path):
    path = shutil.copy(files / "free.pt2", tmp_path / "net.zip")
    assert checkpoints.load_classifier(str(path), 32).classifier is not None


@pytest.mark.parametrize("name", ["free.pt2", "traced.pt", "scripted.pt"])
def test_a_program_is_explained(files, model_file, name):
    given = "48,3,0,1"
    options = {"restarts": 1, "refine": 1, "frames": 2, "device": "cpu"}
    if name == "free.pt2":
        given = None
    found = explain.explain(
        torch.zeros(1, 1, 32, 32) + torch.linspace(-1, 1, 32),
        model_file,
        classifier=str(files / name),
        classifier_input=given,
        **options,
    )
    assert found.maps["latent_ig"].shape == (32, 32)
    assert found.numbers["classifier"] == str(files / name)
