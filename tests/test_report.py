"""The page of an explanation: what is in it, and in a browser, what it does."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil

import pytest
import torch

from cxr import canvas, explain, film, report

EVIL = "</script><img src=x onerror=document.title='broken'>.png"
NAME = EVIL.rpartition("/")[2]


@pytest.fixture(scope="module")
def explained(model_file, xrays):
    """An image with a name that would be code where it were not kept as text."""
    image = next((xrays / "SICK").iterdir())
    options = {"frames": 5, "restarts": 2, "refine": 1, "device": "cpu"}
    found = explain.explain(image, str(model_file), **options)
    found.numbers["image"] = EVIL
    found.numbers["warnings"].append(EVIL)
    return found


@pytest.fixture(scope="module")
def page(explained, tmp_path_factory):
    """Its page."""
    folder = tmp_path_factory.mktemp("page") / "explanation"
    explained.write(folder)
    return folder / "index.html"


def test_what_was_misread_is_said(page):
    """Which class it is not, that 0.7 is a floor, and that a brighter place is no disease."""
    html = page.read_text()
    facts = json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', html)[1]
    )
    both = ("NORMAL", "SICK")
    assert any(f"this image {a}, not {b}:" in facts["sentence"] for a, b in (both, both[::-1]))
    lows = {m["name"]: m["low"] for m in facts["maps"]}
    assert lows["difference"].startswith("darker with disease")
    assert lows["latent IG"].startswith("less SICK")
    assert "no measure of how ill" in html.lower()


def part(html, name):
    return re.search(rf"<{name}>(.*?)</{name}>", html, re.DOTALL)[1]


def test_the_policy_allows_nothing_but_the_one_script_and_the_one_style(page):
    html = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    for name in ("style", "script"):
        digest = hashlib.sha256(part(html, name).encode()).digest()
        assert f"{name}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert "innerHTML" not in html and len(html) < 3e6


def test_names_from_files_stay_text(page):
    html = page.read_text()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', html)[1]
    assert "<" not in data
    facts = json.loads(data)
    assert EVIL in facts["warnings"] and facts["file"].endswith(
        "onerror=document.title='broken'>.png"
    )
    assert len(facts["doses"]) == len(facts["drawn_p"]) == 5 and facts["spread"]


@pytest.mark.parametrize(
    ("probabilities", "doses"),
    [
        ([0.1, 0.4, 0.6, 0.9], [1.5]),
        ([0.9, 0.1], [0.5]),
        ([0.6, 0.7], []),
        ([0.2, 0.5], []),
        ([0.0, 1.0, 0.0, 1.0], [0.5, 1.5, 2.5]),
    ],
)
def test_the_verdict_turns_wherever_the_probability_passes_a_half(probabilities, doses):
    places = [0.0, 1.0, 2.0, 3.0][: len(probabilities)]
    assert report.turnings(places, probabilities) == pytest.approx(doses)


SPOILT = {
    "no JSON": lambda n: "{",
    "no dictionary": lambda n: "[]",
    "a missing number": lambda n: json.dumps({**n, "reconstruction": {}}),
    "NaN": lambda n: json.dumps({**n, "found_dose": float("nan")}),
    "a text for a number": lambda n: json.dumps({**n, "found_dose": "0.5"}),
    "a text for a list": lambda n: json.dumps({**n, "warnings": "far"}),
    "a number for a warning": lambda n: json.dumps({**n, "warnings": [1]}),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_explanation_is_counted_and_ends_no_table(kind, page, tmp_path):
    sound = json.loads((page.parent / "explanation.json").read_text())
    for name, text in (("a", json.dumps(sound)), ("b", SPOILT[kind](sound))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "explanation.json").write_text(text)
    data = re.search(r'"application/json">(.*?)</script>', report.index(tmp_path))[1]
    told = json.loads(data)
    assert [row["folder"] for row in told["rows"]] == ["a"] and told["unreadable"] == 1


@pytest.fixture
def browser(visit, page):
    return visit(page)


def shown(browser, name):
    return browser.find_element("id", name).text


def pixels(browser, name):
    return browser.execute_script(f"return document.getElementById('{name}').toDataURL()")


def test_keys_and_slider_walk_the_dose(browser):
    body = browser.find_element("tag name", "body")
    browser.find_element("id", "dose").send_keys("\ue011")  # home
    browser.execute_script("document.activeElement.blur()")
    assert shown(browser, "amount") == "0.00"
    before = pixels(browser, "overlaid")
    for _ in range(2):
        body.send_keys("\ue014")  # right
    assert shown(browser, "amount") == "0.50" and pixels(browser, "overlaid") != before
    browser.find_element("id", "dose").send_keys("\ue010")  # end
    assert shown(browser, "amount") == "1.00"
    for _ in range(9):
        body.send_keys("\ue012")  # left, and no further than 0
    assert shown(browser, "amount") == "0.00" and pixels(browser, "overlaid") == before


def test_the_curve_says_where_this_image_stands(browser, page):
    """A healthy one is at 0, whatever the encoder found in it: there the path is the original."""
    numbers = json.loads((page.parent / "explanation.json").read_text())
    found = numbers["found_dose"] if numbers["original"]["logit"] > 0 else 0
    mark = browser.find_element("css selector", "#curve .found")
    assert float(mark.get_attribute("x1")) == pytest.approx(40 + min(found, 1) * 585)
    assert shown(browser, "found") == f"{found:.2f}"
    assert "this image" in browser.find_element("id", "curve").text


def test_wipe_and_maps_follow_their_controls(browser):
    whole = pixels(browser, "overlaid")
    browser.find_element("css selector", "#compare option[value=wipe]").click()
    assert pixels(browser, "overlaid") != whole
    first = shown(browser, "about"), pixels(browser, "heat")
    browser.find_element("css selector", "#map option:last-child").click()
    assert shown(browser, "about") != first[0] and pixels(browser, "heat") != first[1]


def test_nothing_runs_that_should_not_and_nothing_fails(browser):
    assert browser.title == "cxrgan: an explanation" and EVIL in shown(browser, "warnings")
    assert browser.get_log("browser") == []


@pytest.fixture(scope="module")
def many(page, tmp_path_factory):
    """A folder of 30 explanations, of which every third has a warning."""
    folder = tmp_path_factory.mktemp("many")
    numbers = json.loads((page.parent / "explanation.json").read_text())
    for n in range(30):
        case = folder / f"case {n:02d}#"
        case.mkdir()
        numbers |= {"image": f"{n:02d}{EVIL}", "found_dose": (n * 7 % 30) / 30}
        numbers["warnings"] = ["too far"] if n % 3 == 0 else []
        (case / "explanation.json").write_text(json.dumps(numbers))
        shutil.copy(page.parent / "thumbnail.png", case)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "explanation.json").write_text("{")
    (folder / "index.html").write_text(report.index(folder))
    return folder / "index.html"


def column(browser, number):
    return [c.text for c in browser.find_elements("css selector", f"tbody td:nth-child({number})")]


def test_the_table_of_all_sorts_filters_and_is_walked_by_keys(visit, many):
    browser = visit(many)
    assert (
        shown(browser, "count") == "30 of 30; 1 more cannot be read"
        and NAME in column(browser, 1)[0]
    )
    browser.find_element("css selector", "th:nth-child(5) button").click()
    doses = [float(text) for text in column(browser, 5)]
    assert doses == sorted(doses) and doses[0] < doses[-1]
    browser.find_element("css selector", "th:nth-child(5) button").click()
    assert [float(text) for text in column(browser, 5)] == doses[::-1]
    browser.find_element("tag name", "body").send_keys("\ue015\ue015")  # down, twice
    assert browser.switch_to.active_element.text.endswith(NAME)
    browser.find_element("id", "odd").click()
    assert shown(browser, "count").startswith("10 of 30")
    browser.find_element("id", "filter").send_keys("too far")
    assert shown(browser, "count").startswith("10 of 30")
    browser.find_element("id", "filter").send_keys(" away")
    assert shown(browser, "count").startswith("0 of 30")
    browser.find_element("id", "filter").clear()
    browser.find_element("id", "filter").send_keys("s")
    widths = browser.execute_script("return [...document.images].map((i) => i.naturalWidth)")
    assert set(widths) == {192} and browser.get_log("browser") == []


def luminance(colour):
    """The relative luminance of an RGB colour of 0 to 255 (WCAG 2.2)."""
    shares = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def schemes():
    """The colours of the pages' style by name: in light, in the dark, and in print."""
    found = []
    for block in re.findall(r":root \{([^}]*)\}", (report.PAGES / "style.css").read_text()):
        pairs = re.findall(r"--(\w+): #([0-9a-f]{3,6});", block)
        wide = {
            name: "".join(c * (2 if len(hex_) == 3 else 1) for c in hex_) for name, hex_ in pairs
        }
        found.append({n: tuple(bytes.fromhex(h)) for n, h in wide.items()})
    return found


def test_the_contrast_is_known_where_it_is_known():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark", "print"])
@pytest.mark.parametrize("name", ["ink", "soft", "blue", "alarm"])
def test_words_and_curves_stand_out_from_the_page(scheme, name):
    assert contrast(scheme[name], scheme["paper"]) >= 4.5  # WCAG AA; curves would need 3


def test_words_and_curves_stand_out_in_film_panel_and_sheet():
    for ground in (canvas.BACKGROUND, canvas.SURFACE):
        assert all(contrast(words, ground) >= 4.5 for words in (canvas.TEXT, canvas.MUTED))
        assert all(contrast(c, ground) >= 3 for c in (film.HEALTHY, film.DISEASED, film.GLOW))
    assert contrast((255, 255, 255), canvas.ALARM) >= 4.5
    banner = re.search(r"#banner \{ background: #(\w+);", (report.PAGES / "style.css").read_text())
    assert contrast((255, 255, 255), bytes.fromhex("".join(c * 2 for c in banner[1]))) >= 4.5


def test_images_called_alike_are_told_apart_with_what_explained_them(page, tmp_path):
    numbers = json.loads((page.parent / "explanation.json").read_text())
    for n, (image, model) in enumerate((("a/x.png", "pneumonia"), ("b/x.png", "covid"))):
        (tmp_path / str(n)).mkdir()
        told = {**numbers, "image": image, "model": f"weights/{model}-128.safetensors"}
        (tmp_path / str(n) / "explanation.json").write_text(json.dumps(told))
    data = re.search(r'type="application/json">(.*?)</script>', report.index(tmp_path))[1]
    rows = json.loads(data)["rows"]
    assert [row["name"] for row in rows] == ["a/x.png", "b/x.png"]
    assert [row["made"] for row in rows] == ["pneumonia-128", "covid-128"]
    assert {row["disease"] for row in rows} == {numbers["classes"][1]}
    alone = {**numbers, "classifier": "own.py:net"}
    assert report.made(alone).endswith(", own.py:net")


def test_an_empty_map_says_so(explained):
    maps = {name: torch.zeros_like(value) for name, value in explained.maps.items()}
    empty = dataclasses.replace(explained, maps=maps)
    assert {m["high"] for m in report.facts(empty)["maps"]} == {"no place speaks for it"}
    titles = [tile[0] for tile in empty.sheet().small]
    assert sum("no place speaks for it" in title for title in titles) == len(maps) - 1
