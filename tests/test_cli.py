"""The commands as they are typed: what they print, write and answer to bad input."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import cxr
import cxrgan
from cxr import console, networks, options, train_cnn, train_gan
from cxr.checkpoints import Model, load_model
from cxr.explain import explain

JOBS = {"train-cnn": train_cnn.Config, "train-gan": train_gan.Config}


def run(*words):
    return CliRunner().invoke(cxrgan.cli, [str(word) for word in words])


def succeed(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(result, status, words):
    """The line on stderr that says what is wrong: the last, and the only error."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (status, "")
    *said, line = result.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert not any(other.startswith(("error", "Traceback")) for other in said)
    return line


def python(*words, **environment):
    """Run in a process of its own, from a folder without the sources."""
    found = os.pathsep.join([str(Path(cxrgan.__file__).parent), str(Path(cxr.__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": found, **environment}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def cnn_run(xrays, tmp_path_factory):
    """A run folder of `train-cnn` and what the command printed."""
    out = tmp_path_factory.mktemp("runs") / "cnn"
    result = succeed("train-cnn", xrays, "--preset", "tiny", "--images", 512, "--out", out)
    return out, result


@pytest.fixture(scope="module")
def gan_run(xrays, own_classifier, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gan"
    words = ("--preset", "tiny", "--images", 32, "--out", out)
    result = succeed("train-gan", xrays, "--classifier", f"{own_classifier}:bright", *words)
    return out, result


@pytest.fixture
def inputs(tmp_path, xrays, model_file, monkeypatch):
    """The current folder, with malformed files of every kind in it."""
    monkeypatch.chdir(tmp_path)
    whole = next((xrays / "SICK").iterdir()).read_bytes()
    files = {
        "empty.png": b"",
        "cut.png": whole[: len(whole) // 2],
        "text.png": b"these are no pixels",
        "text.safetensors": b"these are no weights",
        "pickle.safetensors": pickle.dumps({"classifier.weight": [1.0]}),
        "cut.safetensors": model_file.read_bytes()[:-1000],
        "columns.csv": b"who,when\na.png,1\n",
        "binary.csv": b"path,label\n\xff\xfe\x00\n",
        "twice.csv": b"path,label\nbad/NORMAL/a.png,NORMAL\nbad/NORMAL/a.png,SICK\n",
        "thesis.txt": b"mine",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (64, 64), 128).save(tmp_path / "constant.png")
    Image.effect_noise((9, 9), 50).save(tmp_path / "tiny.png")
    pages = [Image.effect_noise((64, 64), 50) for _ in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    pixels = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    pixels[3, 3] = np.nan
    Image.fromarray(pixels).save(tmp_path / "nan.tif")
    for folder in ("nothing", "one/NORMAL", "two/cats", "two/dogs", "bad/NORMAL", "bad/SICK"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("one/NORMAL", "two/cats", "two/dogs", "bad/NORMAL"):
        (tmp_path / folder / "a.png").write_bytes(whole)
    (tmp_path / "bad" / "SICK" / "b.png").write_bytes(files["cut.png"])
    return tmp_path


# The front door


def test_help_comes_without_any_heavy_import():
    code = """
import runpy, sys
sys.argv = ["cxrgan", "--help"]
try:
    runpy.run_module("cxrgan", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print(sorted({"torch", "numpy", "rich", "PIL"} & set(sys.modules)))
"""
    done = python("-c", code)
    assert "Usage: cxrgan" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_runs_as_a_module_and_as_a_script(tmp_path):
    module = python("-m", "cxrgan", "--version")
    script = python(cxrgan.__file__, "info", "--model", tmp_path / "none")
    assert module.stdout == f"cxrgan, version {cxr.__version__}\n"
    assert (script.returncode, script.stderr.count("\n")) == (1, 1)
    assert script.stderr.startswith("error: no model file at ")


def test_without_a_command_the_help_is_shown():
    assert succeed().stdout == succeed("--help").stdout


def test_every_help_ends_with_an_example_that_names_its_command():
    for name in cxrgan.cli.commands:
        text = succeed(name, "--help").stdout
        examples = text.partition("Example:\n")[2].splitlines()
        assert examples and all(line.startswith(f"    cxrgan {name}") for line in examples)


def test_presets_are_those_of_the_networks():
    assert options.PRESETS == tuple(networks.PRESETS)
    assert options.SIZES == tuple(sorted({preset.size for preset in networks.PRESETS.values()}))


@pytest.mark.parametrize("name", JOBS)
def test_options_and_their_defaults_are_the_configs_own(name):
    config = {field.name: field.default for field in fields(JOBS[name])}
    own = {p.name: p for p in cxrgan.cli.commands[name].params}
    for extra in ("out", "resume"):
        del own[extra]
    assert set(own) <= set(config)
    for option in own.values():
        if option.name == "images":  # without it, a resumed run keeps its own
            assert option.show_default.startswith(f"{config['images']};")
        elif not option.required:
            assert option.to_info_dict()["default"] == config[option.name], option.name


def test_explains_defaults_are_the_functions_own():
    defaults = explain.__kwdefaults__
    for option in cxrgan.cli.commands["explain"].params:
        if option.name in defaults:
            assert option.to_info_dict()["default"] == defaults[option.name], option.name


def test_an_error_of_the_file_system_is_one_line(monkeypatch, tmp_path):
    line = refused(run("phantoms", "/proc/none/phantoms", "--images", 2), 1, "/proc/none")
    assert "Errno" not in line
    (tmp_path / "file").write_text("")
    words = ("--preset", "tiny", "--images", 2)
    monkeypatch.setattr(train_cnn, "train", lambda *_: (tmp_path / "file" / "run").mkdir())
    refused(run("train-cnn", "x", *words), 1, "file/run: Not a directory")


def test_ctrl_c_has_its_own_status_and_no_traceback(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cnn, "train", interrupted)
    result = run("train-cnn", "x")
    assert result.exit_code == 130 and result.output.strip() == "interrupted"


def test_a_defect_is_not_passed_off_as_bad_input(monkeypatch):
    def defect(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(train_cnn, "train", defect)
    assert isinstance(run("train-cnn", "x").exception, RuntimeError)


# The commands


def test_train_cnn_ends_with_its_metrics_the_file_and_what_comes_next(cnn_run, xrays):
    out, result = cnn_run
    for name in ("auroc", "accuracy", "sensitivity", "specificity", "ece", "auroc_noise"):
        assert f"│ {name} " in result.stdout
    path = out / "model.safetensors"
    assert f"model: {path}" in result.stderr.splitlines()
    assert load_model(path).info["classes"] == ["NORMAL", "SICK"]
    assert "warning: this classifier is useless" in result.stderr and "next:" not in result.stderr


def test_after_a_good_classifier_the_next_command_is_proposed(model, monkeypatch):
    good = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 9}
    metrics = {"classifier": {name: good for name in ("auroc", "sensitivity", "specificity")}}
    trained = Model(model.networks, {**model.info, "metrics": metrics})
    monkeypatch.setattr(train_cnn, "train", lambda config, out, resume: trained)
    result = succeed("train-cnn", "DATA", "--preset", "tiny", "--positive", "SICK", "--out", "x")
    wanted = "next:  cxrgan train-gan DATA --classifier x/model.safetensors --preset tiny"
    assert f"{wanted} --positive SICK" in result.stderr


def test_train_gan_ends_with_its_metrics_the_file_and_what_comes_next(gan_run):
    out, result = gan_run
    for name in ("healthy_at_zero", "diseased_at_full", "logit_gap", "ssim"):
        assert f"│ {name} " in result.stdout
    path = out / "model.safetensors"
    assert f"next:  cxrgan explain XRAY.png --model {path}" in result.stderr


def test_resuming_a_finished_run_tells_its_end_again(gan_run, xrays, own_classifier):
    out, result = gan_run
    words = ("--preset", "tiny", "--images", 32, "--out", out, "--resume")
    again = succeed("train-gan", xrays, "--classifier", f"{own_classifier}:bright", *words)
    assert again.stdout == result.stdout


def test_of_several_processes_only_the_first_prints(monkeypatch, tmp_path):
    for stream in (console.out, console.err):
        monkeypatch.setattr(stream, "quiet", False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(train_gan, "train", lambda *_: console.warn("of this process"))
    assert succeed("train-gan", "x", "--classifier", "y").output == ""


def test_explain_writes_a_folder_for_each_image_and_none_over_another(model_file, xrays, tmp_path):
    picture = next((xrays / "SICK").iterdir()).read_bytes()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lung.png").write_bytes(picture)
    (tmp_path / "b" / "lung.jpg").write_bytes(picture)
    words = ("--refine", 1, "--restarts", 1, "--frames", 3, "--out", tmp_path / "out")
    words = (*words, "--force")
    result = succeed("explain", tmp_path / "a", tmp_path / "b", "--model", model_file, *words)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "b_lung",
        "index.html",
        "lung",
        "lung_2",
    ]
    for folder in (tmp_path / "out" / name for name in ("b_lung", "lung", "lung_2")):
        assert {"explanation.gif", "explanation.json"} < {path.name for path in folder.iterdir()}
    assert result.stdout.count("completeness error") == 3


def test_explain_goes_on_after_a_bad_image_and_fails_at_the_end(model_file, xrays, inputs):
    good = next((xrays / "SICK").iterdir())
    words = ("--refine", 1, "--restarts", 1, "--frames", 3, "--out", inputs / "out", "--json")
    images = (inputs / "cut.png", inputs / "absent.png", good)
    result = run("explain", *images, "--model", model_file, *words)
    assert result.exit_code == 1
    failed, numbers = json.loads(result.stdout)
    assert failed["image"] == str(inputs / "cut.png") and failed["error"]
    assert "1 of 2 explained; 1 failed: cut.png (" in result.stderr
    assert numbers["image"] == str(good) and len(numbers["probability"]) == 3
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    kept = json.loads((inputs / "out" / good.stem / "explanation.json").read_text())
    assert len(errors) == 2 and kept == numbers and kept["warnings"]


def test_json_is_all_that_evaluate_prints_on_stdout(model_file, xrays, tmp_path):
    words = ("--model", model_file, "--limit", 1, "--refine", 0, "--out", tmp_path)
    printed = json.loads(succeed("evaluate", xrays, *words, "--json").stdout)
    assert printed == json.loads((tmp_path / "evaluation.json").read_text())
    table = succeed("evaluate", xrays, *words).stdout
    assert "│ AUROC " in table and "│ dose and logit " in table and "randomisation" in table


def test_evaluate_measures_a_gan_of_ones_own_classifier(gan_run, xrays, own_classifier, tmp_path):
    words = (
        "--model",
        gan_run[0] / "model.safetensors",
        "--classifier",
        f"{own_classifier}:bright",
    )
    words += ("--limit", 2, "--refine", 1, "--out", tmp_path, "--json")
    numbers = json.loads(succeed("evaluate", xrays, *words).stdout)
    assert numbers["about"]["classifier"] == "the model's own"
    assert numbers["counterfactual"]["validity"]["n"] == numbers["path"]["logit_gap"]["n"] == 2


def test_sample_draws_a_row_for_each_pair_of_lungs(model_file, tmp_path):
    out = tmp_path / "sheet.png"
    succeed("sample", "--model", model_file, "--images", 3, "--out", out)
    assert Image.open(out).size == (5 * 130 - 2, 24 + 3 * 130 - 2)
    first = out.read_bytes()
    succeed("sample", "--model", model_file, "--images", 3, "--out", out, "--seed", 1)
    assert out.read_bytes() != first
    (tmp_path / "list.txt").write_text("mine")
    words = ("sample", "--model", model_file, "--out", tmp_path / "list.txt")
    refused(run(*words), 2, "is no name of a .png file")
    assert (tmp_path / "list.txt").read_text() == "mine"


def test_phantoms_are_made_and_the_training_command_named(tmp_path):
    result = succeed("phantoms", tmp_path / "out", "--images", 4, "--size", 32, "--shortcut", 0.9)
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == 4
    assert f"next:  cxrgan train-cnn {tmp_path}/out/images --preset cxr32" in result.stderr


def test_info_shows_machine_and_model(model_file):
    text = succeed("info", model_file).stdout
    assert succeed("info", "--model", model_file).stdout == text
    for words in ("device", "kernels", "cache", "generator", "parameters", "NORMAL, SICK", "-3, 3"):
        assert words in text
    assert "0.5 (0.4 to 0.6)" in text


# Malformed input: name -> (status, words of the message, the command)

BAD_DATA = {
    "no such folder": (2, "no such folder or CSV file", "{dir}/absent"),
    "an empty folder": (1, "two classes are needed; there are none", "{dir}/nothing"),
    "one class": (1, "two classes are needed; there are NORMAL (1)", "{dir}/one"),
    "no class is known as healthy": (
        2,
        "Say --negative CLASS; there are cats (1), dogs (1)",
        "{dir}/two",
    ),
    "unknown --negative": (
        2,
        "has no such class; there are cats (1), dogs (1)",
        "{dir}/two --negative fox",
    ),
    "a picture as DATA": (1, "not a CSV table, but a binary file", "{dir}/constant.png"),
    "a CSV without the columns": (2, "Say --path-column", "{dir}/columns.csv"),
    "a binary CSV": (1, "not a CSV table, but a binary file", "{dir}/binary.csv"),
    "a CSV with a file in both classes": (1, "a.png is of both classes", "{dir}/twice.csv"),
    "--patient-pattern is no regex": (2, "not a regular expression", "{xrays} --patient-pattern ("),
    "--patient-pattern has no group": (2, "parentheses", "{xrays} --patient-pattern x"),
    "--patient-pattern finds nobody": (1, "finds no patient", "{xrays} --patient-pattern (q+)"),
    "unknown device": (2, "say auto, cpu, cuda or cuda:N", "{xrays} --device bogus"),
    "a device of another kind": (2, "say auto, cpu, cuda or cuda:N", "{xrays} --device mps"),
    "a GPU that is not there": (2, "no such GPU here", "{xrays} --device cuda:99"),
    "no image to train on": (2, "0 is not in the range x>=1", "{xrays} --images 0"),
    "a batch of one": (2, "1 is not in the range x>=2", "{xrays} --batch 1"),
    "unknown preset": (2, "'cxr65' is not one of", "{xrays} --preset cxr65"),
    "odd size": (2, "'100' is not one of", "{xrays} --size 100"),
    "unknown fit": (2, "'squash' is not one of", "{xrays} --fit squash"),
    "negative seed": (2, "-1 is not in the range", "{xrays} --seed -1"),
    "seed is a word": (2, "'one' is not a valid integer", "{xrays} --seed one"),
    "unknown option": (2, "No such option", "{xrays} --epochs 3"),
    "no DATA": (2, "Missing argument 'DATA'", ""),
    "a run without --resume": (2, "holds a run: go on with --resume", "{xrays} --out {cnn}"),
    "--resume without a run": (2, "no run to resume", "{xrays} --out {dir}/new --resume"),
    "--resume with another seed": (
        2,
        "was begun with seed = 0, not 1",
        "{xrays} --out {cnn} --resume --seed 1",
    ),
    "--out is a file": (1, "thesis.txt", "{xrays} --out {dir}/thesis.txt"),
}
BAD_MODEL = {
    "no such model": (1, "no model file at", "{dir}/absent.safetensors"),
    "a folder as model": (1, "no model file at", "{dir}"),
    "text as model": (1, "is it whole?", "{dir}/text.safetensors"),
    "a pickle as model": (1, "is it whole?", "{dir}/pickle.safetensors"),
    "a truncated model": (1, "is it whole?", "{dir}/cut.safetensors"),
    "a training state as model": (1, "not a cxrgan model file", "{cnn}/state.safetensors"),
}
BAD_IMAGE = {
    "no such image": (1, "no such file", "{dir}/absent.png"),
    "a folder without images": (1, "holds no image", "{dir}/nothing"),
    "zero bytes": (1, "the file is empty", "{dir}/empty.png"),
    "a truncated PNG": (1, "damaged or cut short", "{dir}/cut.png"),
    "text as image": (1, "not an image", "{dir}/text.png"),
    "a constant image": (1, "every pixel has the same value", "{dir}/constant.png"),
    "a tiny image": (1, "only 9 x 9 pixels", "{dir}/tiny.png"),
    "several pages": (1, "holds 2 frames or pages", "{dir}/pages.tif"),
    "NaN in a TIFF": (1, "contains NaN", "{dir}/nan.tif"),
}
BAD_CLASSIFIER = {
    "no such Python file": (2, "there is no file", "{dir}/absent.py:f"),
    "no such function": (1, "has no attribute 'absent'", "{own}:absent"),
    "a function that raises": (1, "failed: ValueError: no such weights", "{own}:fails"),
    "a function of another shape": (1, "not a logit [2]", "{own}:wrong_shape"),
    "a classifier file that is none": (1, "is it whole?", "{dir}/text.safetensors"),
    "a classifier that tells nothing apart": (1, "hardly tells the classes apart", "{classifier}"),
}
TINY = "--preset tiny --images 2"
MALFORMED = {
    **{k: (s, w, f"train-cnn {TINY} {more}") for k, (s, w, more) in BAD_DATA.items()},
    **{k: (s, w, f"info {more}") for k, (s, w, more) in BAD_MODEL.items()},
    **{k: (s, w, f"explain --model {{model}} {more}") for k, (s, w, more) in BAD_IMAGE.items()},
    **{
        k: (s, w, f"train-gan {TINY} --out {{dir}}/run {{xrays}} --classifier {more}")
        for k, (s, w, more) in BAD_CLASSIFIER.items()
    },
    "no such command": (2, "No such command 'train'", "train"),
    "no --classifier": (2, "Missing option '--classifier'", "train-gan {xrays}"),
    "a batch that does not divide": (
        2,
        "a multiple of 16",
        "train-gan {xrays} --preset tiny --batch 24 --classifier {own}:bright",
    ),
    "a classifier of another size": (
        2,
        "the classifier sees 32 pixels",
        "train-gan {xrays} --classifier {classifier}",
    ),
    "explain without a generator": (
        1,
        "made by `cxrgan train-gan`",
        "explain {xrays}/SICK --model {classifier}",
    ),
    "one frame": (2, "1 is not in the range", "explain --frames 1 --model {model}"),
    "sample without a generator": (1, "holds no generator", "sample --model {classifier}"),
    "sample into no folder": (
        1,
        "cannot be written",
        "sample --model {model} --images 1 --out {dir}/absent/sheet.png",
    ),
    "DATA of other classes": (
        2,
        "there are cats (1), dogs (1)",
        "evaluate {dir}/two --model {model}",
    ),
    "evaluate without a classifier": (
        1,
        "holds no classifier",
        "evaluate {xrays} --model {gan}/model.safetensors",
    ),
    "unknown split": (2, "'half' is not one of", "evaluate {xrays} --model {model} --split half"),
    "data for the phantoms": (2, "extra argument", "evaluate-phantoms {xrays}"),
    "evaluate without a model": (2, "Missing option '--model'", "evaluate {xrays}"),
    "bench into a folder": (2, "is a folder: name a file", "bench kernels --out {dir}"),
    "a batch no step can take": (2, "needs a multiple of 16", "bench step --batch 20"),
    "no --model": (2, "Missing option", "evaluate {xrays}"),
    "phantoms over a thesis": (2, "is not empty", "phantoms {dir}"),
    "phantoms into a file": (2, "is a file", "phantoms {dir}/thesis.txt"),
    "one phantom": (2, "1 is not in the range x>=2", "phantoms {dir}/new --images 1"),
    "--shortcut is no probability": (2, "not in the range", "phantoms {dir}/new --shortcut 1.5"),
    "--shortcut is a word": (2, "not a valid float", "phantoms {dir}/new --shortcut often"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_input_is_one_clear_line(
    case, inputs, xrays, cnn_run, gan_run, model_file, classifier_file, own_classifier
):
    status, words, command = MALFORMED[case]
    places = {
        "dir": inputs,
        "xrays": xrays,
        "cnn": cnn_run[0],
        "gan": gan_run[0],
        "model": model_file,
        "classifier": classifier_file,
        "own": own_classifier,
    }
    refused(run(*command.format(**places).split()), status, words)


def test_a_class_without_readable_images_stops_the_training(inputs):
    result = run("train-cnn", inputs / "bad", "--preset", "tiny", "--out", inputs / "run")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    *_, warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: 1 of 2 images cannot be read") and "b.png" in warning
    assert error == "error: no readable image is left of class SICK"
