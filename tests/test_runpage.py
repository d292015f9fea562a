"""The page of a training: what is in it, and in a browser, what it does."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from cxr import CxrError, datasets, film, runpage, train_cnn, train_gan, training

EVIL = "<img src=x onerror=document.title='broken'>"
CONFIG = {"data": f"$DATA {EVIL}", "images": 96, "tick": 32, "start": None}
ROWS = [
    {"images": 32, "auroc": 0.5, "loss": 0.7, EVIL: 3},
    {"images": 64, "auroc": float("nan"), "loss": float("-inf"), EVIL: None},
    {"images": 96, "auroc": 0.90000049, "loss": "0.2", EVIL: True, "late": 1.5},
]


@pytest.fixture
def folder(tmp_path):
    """A run with three reports and four sheets, the last of which a resumed run has yet to draw."""
    run = tmp_path / "run #1"
    (run / "samples").mkdir(parents=True)
    for number in (32, 64, 96, 128):
        sheet = np.full((8, 8), number, np.uint8)
        film.write_png(run / "samples" / f"{number:08d}.png", sheet)
    (run / "samples" / "notes.png").write_text("")
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return run


def told(html):
    return json.loads(re.search(r'"application/json">(.*?)</script>', html)[1])


def charts(html):
    return {c["name"]: c["values"] for g in told(html)["groups"] for c in g["charts"]}


def test_every_column_has_its_curve_and_what_is_no_number_is_a_gap(folder):
    html = runpage.page(folder, "train-cnn", CONFIG)
    assert charts(html) == {
        "auroc": [0.5, None, 0.9],
        "loss": [0.7, None, None],
        EVIL: [3, None, None],
        "late": [None, None, 1.5],
    }
    assert told(html)["images"] == [32, 64, 96] and told(html)["share"] == 1


def test_names_stay_text_and_are_no_part_of_the_template(folder):
    html = runpage.page(folder, "train-gan", CONFIG)
    assert "<img src=x" not in html and html.count("innerHTML") == 0
    assert told(html)["options"] == [["data", CONFIG["data"]], ["images", "96"], ["tick", "32"]]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)


def test_sheets_are_those_of_the_log_in_order(folder):
    sheets = told(runpage.page(folder, "train-gan", CONFIG))["sheets"]
    assert [sheet["file"] for sheet in sheets] == [f"samples/{n:08d}.png" for n in (32, 64, 96)]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"3", b"{}", b'{"images": "x"}', b"\xff", b"[" * 9999]
)
def test_a_damaged_line_is_counted(folder, line):
    path = folder / "log.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    found = told(runpage.page(folder, "train-cnn", CONFIG))
    assert found["warnings"] == ["1 line of log.jsonl cannot be read"]
    assert found["images"] == [32, 64, 96]


def test_a_run_without_a_report_says_when_the_first_one_comes(tmp_path):
    found = told(runpage.page(tmp_path, "train-gan", {"images": 40, "tick": 4096}))
    assert found["groups"] == found["sheets"] == [] and found["first"] == "40"


@pytest.fixture(scope="module", params=["cnn", "gan"])
def trained(request, xrays, own_classifier, tmp_path_factory):
    """The lines that a short training said, and its folder."""
    module = {"cnn": train_cnn, "gan": train_gan}[request.param]
    own = {"classifier": f"{own_classifier}:bright"} if request.param == "gan" else {}
    options = {"preset": "tiny", "batch": 16, "images": 64, "tick": 32, "device": "cpu"}
    out, lines = tmp_path_factory.mktemp("run") / request.param, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.console, "say", lines.append)
        module.train(module.Config(data=str(xrays), **options, **own), str(out))
    return lines, out


def test_a_training_says_where_its_page_is_and_writes_it_at_every_report(trained):
    lines, out = trained
    assert f"page: {out}/index.html" in lines
    html = (out / "index.html").read_text()
    assert told(html)["images"] == [32, 64]
    assert len(told(html)["sheets"]) == len(list(out.glob("samples/*.png")))


def test_a_resumed_training_goes_on_with_its_page(xrays, tmp_path):
    options = {"preset": "tiny", "batch": 16, "tick": 32, "device": "cpu", "data": str(xrays)}
    out = tmp_path / "run"
    train_cnn.train(train_cnn.Config(images=64, **options), str(out))
    (out / "index.html").unlink()
    train_cnn.train(train_cnn.Config(images=96, **options), str(out), resume=True)
    found = told((out / "index.html").read_text())
    assert found["images"] == [32, 64, 96] and found["sentence"].endswith("96 of 96 images seen")


def test_of_several_processes_only_the_first_writes_the_page(xrays, tmp_path):
    config, data = train_cnn.Config(data=str(xrays)), datasets.open_dataset(xrays, 32)
    for first in (False, True):
        run = training.Run(tmp_path, config, data, False, SimpleNamespace(first=first))
        run.show("train-cnn")
        assert run.page.exists() == first


def test_no_column_of_a_log_is_without_a_title(trained):
    html = (trained[1] / "index.html").read_text()
    rows = map(json.loads, (trained[1] / "log.jsonl").read_text().splitlines())
    assert set(charts(html)) == {name for row in rows for name in row} - {"images"}
    assert all(group["heading"] != runpage.OTHER for group in told(html)["groups"])


@pytest.mark.parametrize("error", [CxrError("no space left on device"), OSError("gone")])
def test_a_page_that_cannot_be_written_ends_no_training(
    xrays, tmp_path, monkeypatch, capsys, error
):
    def full(*_):
        raise error

    monkeypatch.setattr(training.runpage, "page", full)
    options = {"preset": "tiny", "batch": 16, "images": 32, "tick": 32, "device": "cpu"}
    train_cnn.train(train_cnn.Config(data=str(xrays), **options), str(tmp_path / "run"))
    assert f"warning: the page was not written: {error}" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "index.html").exists()


def test_in_a_browser_slider_and_keys_walk_the_sheets_and_the_curves(visit, folder):
    (folder / "index.html").write_text(runpage.page(folder, "train-gan", CONFIG))
    browser = visit(folder / "index.html")
    seen, sheet = (browser.find_element("id", name) for name in ("seen", "sheet"))
    assert seen.text == "96"
    places = "return [...document.querySelectorAll('.now')].map((l) => l.getAttribute('x1'))"
    before = browser.execute_script(places)
    browser.find_element("tag name", "body").send_keys("\ue012")  # left
    assert seen.text == "64" and sheet.get_attribute("src").endswith("samples/00000064.png")
    assert len(before) == 4 and not set(browser.execute_script(places)) & set(before)
    browser.find_element("id", "when").send_keys("\ue011")  # home
    assert seen.text == "32"
    width = "const i = document.getElementById('sheet'); await i.decode(); return i.naturalWidth"
    assert browser.execute_script(width) == 8
    assert browser.find_element("id", "film").is_displayed()
    assert EVIL in browser.find_element("id", "groups").text
    assert not browser.find_element("id", "more").is_displayed()  # it has ended
    assert browser.title == "cxrgan: a training" and browser.get_log("browser") == []


def test_in_a_browser_a_gap_is_no_line_and_all_numbers_are_there(visit, folder):
    for sheet in folder.glob("samples/*.png"):
        sheet.unlink()
    (folder / "index.html").write_text(runpage.page(folder, "train-cnn", CONFIG))
    browser = visit(folder / "index.html")
    assert not browser.find_element("id", "film").is_displayed()
    drawn = browser.find_elements("css selector", ".chart polyline, .chart .dot")
    assert [mark.tag_name for mark in drawn] == ["circle"] * 5  # two of the AUROC's three
    assert "1 of 3 reports have no number here" in browser.find_element("id", "groups").text
    browser.find_element("css selector", "#all summary").click()
    cells = browser.find_elements("css selector", "#rows tr:nth-child(2) td")
    assert [cell.text for cell in cells] == ["64", "-", "-", "-", "-"]
    assert browser.get_log("browser") == []


def figures(**values):
    figure = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 40}
    return {name: figure | values.get(name, {}) for name in runpage.TESTED}


def test_the_classifiers_figures_stand_on_its_page_when_it_is_trained(folder):
    assert told(runpage.page(folder, "train-cnn", CONFIG))["tested"] is None
    useless = figures(auroc={"value": 0.55, "low": 0.4})
    html = runpage.page(folder, "train-cnn", CONFIG, {"SICK": figures(), EVIL: useless})
    table = told(html)["tested"]
    assert table["heads"] == ["40 images", "SICK", EVIL, "what it is"]
    assert table["rows"][0][:3] == ["AUROC", "0.900 (0.800 to 0.950)", "0.550 (0.400 to 0.950)"]
    assert len(table["rows"]) == len(runpage.TESTED)
    (warning,) = told(html)["warnings"]
    assert "this classifier is useless: its AUROC of 0.55 may be chance" in warning


def test_train_cnn_ends_with_its_figures_on_the_page(tmp_path, xrays):
    config = train_cnn.Config(str(xrays), "tiny", batch=16, images=32, tick=32, device="cpu")
    model = train_cnn.train(config, tmp_path / "run")
    table = told((tmp_path / "run" / "index.html").read_text())["tested"]
    value = model.info["metrics"]["classifier"]["auroc"]["value"]
    assert table["heads"][1] == "SICK" and table["rows"][0][1].startswith(f"{value:.3f} (")
