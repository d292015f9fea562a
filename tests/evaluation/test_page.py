"""The page of an evaluation: what fails is first, names stay text, figures are clean; in a browser,
what it does."""

import json
import re
from xml.etree import ElementTree

import pytest

from cxr.evaluation import page
from cxr.evaluation.registry import MEASURES, METHODS, find

EVIL = "<img src=x onerror=document.title='broken'>$SCRIPT"


def figure(value, low=None, high=None, n=9):
    return {"value": value, "low": low, "high": high, "n": n}


def case(name, **figures):
    whole = {"reconstruction/ssim": 0.9, "reconstruction/probability_gap": 0.01}
    good = {"counterfactual/validity": 1.0, "counterfactual/validity_overlaid": 1.0}
    named = {key.replace("__", "/"): value for key, value in figures.items()}
    return {"class": name, "figures": whole | good | {"reconstruction/rejected": 0.0} | named}


@pytest.fixture
def numbers():
    methods = {m: figure(0.9) | {"magnitude": figure(None), "cascade": [1, 0.9]} for m in METHODS}
    return {
        "classifier": {"auroc": figure(0.52, 0.4, 0.6), "ece": figure(None)},
        "counterfactual": {"validity": figure(0.5, 0.4, 0.6), "sparsity": figure(0.1, 0, 0.2)},
        "path": {"spearman": figure(0.99, 0.95, 1)},
        "randomisation": methods,
        "about": {
            "model": f"/x/{EVIL}.safetensors",
            "images": [5, 4],
            "patients": 7,
            "notes": ["it was trained on these very patients", "not measured: generator (no)"],
            "versions": {"cxrgan": "0"},
        },
    }


@pytest.fixture
def cases():
    return {
        "a.png": case("NORMAL"),
        EVIL: case("SICK", reconstruction__rejected=1.0, counterfactual__validity=0.0),
        "b.png": case("SICK", counterfactual__validity_overlaid=0.0, path__logit_gap=0.3),
        "c.png": {"class": "SICK", "figures": {}},  # nothing is defined
    }


SVG = f"""<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "x" "http://elsewhere/svg11.dtd">
<svg xmlns="{page.SVG}" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt" viewBox="0 0 9 9">
<metadata><a href="https://elsewhere"/></metadata><style>@import url(https://elsewhere)</style>
<script>alert(1)</script><defs><path id="m1" d="M0 0"/><clipPath id="p"><rect/></clipPath></defs>
<g id="g" clip-path="url(#p)" onclick="alert(1)" style="fill: none; stroke: #123456; mask: url(https://elsewhere)">
<use xlink:href="#m1" x="3"/><use xlink:href="https://elsewhere/a.svg#m1"/><image href="http://elsewhere/a.png"/>
<image xlink:href="data:image/png;base64,AAAA"/><image href="data:image/svg+xml;base64,AAAA"/>
<text style="font: 6.5px 'DejaVu Sans'; text-anchor: middle" fill="url(https://elsewhere)">&lt;b&gt;</text>
<foreignObject><p>x</p></foreignObject></g></svg>"""


def told(html):
    return json.loads(re.search(r'"application/json">(.*?)</script>', html)[1])


def test_what_fails_is_told_with_its_bar_the_certain_first(numbers):
    rows = sorted(page.missed(numbers), key=lambda row: row[2])
    assert [row[:3] for row in rows] == [
        ("validity", "0.500 (0.400 to 0.600)", "missed"),
        ("latent IG, correlation, CNN randomised", "0.900", "missed"),
        ("AUROC", "0.520 (0.400 to 0.600)", "not certain"),
    ]
    assert rows[0][3] == "above 0.9: nine in ten" and rows[1][3].startswith("below 0.5: ")


def test_a_bar_may_be_another_figure_and_must_be_passed(numbers):
    part = numbers["counterfactual"]
    part["outside_lung"], part["outside_area"] = figure(0.5, 0.45, 0.55), figure(0.4)
    titles = {row[0]: row[2:4] for row in page.missed(numbers)}
    own = titles["change outside lungs, of the change"]
    assert own == ("missed", "below 0.4: a change spread evenly")
    part["outside_lung"] = figure(0.3, 0.2, 0.39)
    assert not any("lungs" in row[0] for row in page.missed(numbers))
    part["outside_lung"], part["outside_area"] = figure(0.3), figure(None)
    assert not any("lungs" in row[0] for row in page.missed(numbers))
    numbers["classifier"]["auroc"] = figure(0.5, 0.5, 0.5)  # equal to its bar
    assert ("AUROC", "missed") in [(row[0], row[2]) for row in page.missed(numbers)]


def test_every_bar_is_of_a_measure_that_has_a_better_direction():
    for key in page.BARS:
        assert find(*key.split(".")).better, key
    assert all(page._meaning(m).startswith("The same") is False for m in MEASURES.values())


def test_images_that_failed_come_first_with_why(numbers, cases):
    rows = told(page.page("set, test", numbers, cases, None))["images"]
    assert [(row["name"], row["failed"]) for row in rows] == [
        (EVIL, ["the verdict does not flip", "reconstruction rejected"]),
        ("b.png", ["the overlay does not flip it"]),
        ("a.png", []),
        ("c.png", []),
    ]
    assert rows[1]["path.logit_gap"] == 0.3 and rows[3]["reconstruction.ssim"] is None


def test_names_stay_text_and_the_policy_allows_one_script(numbers, cases):
    html = page.page(EVIL, numbers, cases, {"classifier": SVG})
    assert "<img" not in html and "innerHTML" not in html
    assert html.count("<script") == 2 and told(html)["model"] == f"{EVIL}.safetensors"
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in html
    assert told(html)["warnings"] == ["it was trained on these very patients"]
    assert told(html)["lacking"] == ["not measured: generator (no)"]


def test_without_matplotlib_the_page_says_why_it_has_no_figures(numbers, cases):
    assert "matplotlib is missing" in page.page("set", numbers, cases, None)
    assert "matplotlib is missing" not in page.page("set", numbers, cases, {})


def test_of_a_figure_only_what_draws_is_kept():
    drawn = page.inline("one", SVG, 'a "title"')
    for word in ("elsewhere", "script", "style", "onclick", "foreignObject", "xlink", "<b>"):
        assert word not in drawn, word
    root = ElementTree.fromstring(drawn)
    assert root.attrib["aria-label"] == 'a "title"' and "width" not in root.attrib
    group = root.find(f"{{{page.SVG}}}g")
    assert group.attrib == {
        "id": "one-g",
        "clip-path": "url(#one-p)",
        "fill": "none",
        "stroke": "#123456",
    }
    uses = [use.get("href") for use in group if use.tag.endswith("use")]
    images = [image.get("href") for image in group if image.tag.endswith("image")]
    assert uses == ["#one-m1", None] and images == [None, "data:image/png;base64,AAAA", None]
    text = group.find(f"{{{page.SVG}}}text")
    assert text.attrib == {"font-size": "6.5", "text-anchor": "middle"} and text.text == "<b>"


def test_ids_of_two_figures_do_not_clash():
    ids = [set(re.findall(r' id="([^"]*)"', page.inline(name, SVG, ""))) for name in ("one", "two")]
    assert len(ids[0]) == len(ids[1]) == 3 and not ids[0] & ids[1]


def names(browser):
    return [c.text for c in browser.find_elements("css selector", "#rows td:first-child")]


def test_in_a_browser_the_images_sort_and_filter(visit, numbers, cases, tmp_path):
    cases |= {f"d{n}": case("NORMAL", path__logit_gap=(n * 7 % 10) / 10) for n in range(10)}
    plots = {"classifier": SVG, "response": SVG}
    (tmp_path / "index.html").write_text(page.page("set", numbers, cases, plots))
    browser = visit(tmp_path / "index.html")
    assert names(browser) == [EVIL, "b.png"]
    assert browser.find_element("id", "count").text == "2 of 14"
    assert browser.find_element("css selector", "#missedbox td.missed").text == "missed"
    browser.find_element("id", "odd").send_keys(" ")
    assert len(names(browser)) == 14
    browser.find_element("xpath", "//th/button[text()='logit gap']").send_keys("\ue007")  # enter
    assert names(browser)[:3] == ["d0", "d3", "d6"]
    head = browser.find_element("css selector", "th[aria-sort=ascending]")
    assert head.text.startswith("logit gap")
    browser.find_element("id", "filter").send_keys("FLIP")
    assert set(names(browser)) == {EVIL, "b.png"}
    assert browser.title == "cxrgan: an evaluation"
    strokes = [
        g.value_of_css_property("stroke")
        for g in browser.find_elements("css selector", "svg.plot > g")
    ]
    assert strokes == ["rgb(18, 52, 86)"] * 2
    assert [m for m in browser.get_log("browser") if "ERR_INVALID_URL" not in m["message"]] == []


def test_in_a_browser_the_page_of_a_classifier_alone_has_no_list(visit, numbers, tmp_path):
    alone = {"classifier": {"auroc": figure(0.9, 0.8, 1)}, "about": numbers["about"]}
    (tmp_path / "index.html").write_text(page.page("set", alone, {}, None))
    browser = visit(tmp_path / "index.html")
    assert not browser.find_element("id", "images").is_displayed()
    assert browser.find_element("id", "reached").is_displayed()
    assert browser.get_log("browser") == []
