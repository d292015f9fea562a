"""The figures say what they are given: curve, marks, heat colours, and no text over the edge."""

from xml.etree import ElementTree

import imageio.v3 as imageio
import numpy as np
import pytest

from cxr import UsageError, canvas, film

FRAMES = np.random.default_rng(0).integers(40, 200, (5, 32, 32), dtype=np.uint8)
LAID = FRAMES[:, ::-1]
DOSES, RESPONSE = np.linspace(0, 1, 5), [(p, 1 - p) for p in (0.02, 0.1, 0.5, 0.9, 0.97)]
GREY = np.full((32, 32), 100, np.uint8)


def margin(figure, width=8):
    """The pixels within `width` of the edge, which belong to the background."""
    inside = np.zeros(figure.shape[:2], bool)
    inside[width:-width, width:-width] = True
    return figure[~inside]


def shot(drawn=FRAMES, laid=LAID, doses=DOSES, response=RESPONSE, **scene):
    heat = np.linspace(-1, 1, 32)[None].repeat(32, axis=0)
    return film.film(film.Scene(GREY, 0.9, heat, **scene), drawn, laid, doses, response)


LEFT, UPPER, RIGHT, LOWER = film.PLOT


def test_a_film_has_one_figure_per_frame_and_its_curve_grows():
    frames = shot()
    assert len(frames) == 5
    assert len({(figure.shape, figure.dtype) for figure in frames}) == 1
    plots = [figure[UPPER + 4 : LOWER - 4, LEFT + 2 : RIGHT - 2].astype(int) for figure in frames]
    reach = [np.flatnonzero((np.ptp(plot, axis=-1) > 30).any(axis=0)).max() for plot in plots]
    np.testing.assert_allclose(reach, DOSES * (RIGHT - LEFT - 4), atol=10)  # the dot's radius


def test_three_xrays_stand_in_each_frame_and_the_original_does_not_change():
    frames, tile = shot(), film.TILE
    for changed, drawn, figure in zip(LAID, FRAMES, frames, strict=True):
        for column, picture in ((1, changed), (2, drawn)):
            left = film.GAP + column * (tile + film.GAP)
            shown = figure[film.TOP : film.TOP + tile, left : left + tile, 0]
            small = shown.reshape(32, 7, 32, 7).mean(axis=(1, 3))
            assert np.corrcoef(small.ravel(), picture.ravel())[0, 1] > 0.95
        original = figure[film.TOP : film.TOP + tile, film.GAP : film.GAP + tile]
        assert (original == 100).all()
    below = slice(film.TOP + film.ROW, film.TOP + film.ROW + tile), slice(film.GAP, film.GAP + tile)
    assert all(np.array_equal(frames[0][below], figure[below]) for figure in frames)  # the heat map


def test_the_curve_is_blue_where_healthy_and_red_where_diseased():
    first, last = (shot()[index] for index in (0, -1))
    assert tuple(first[round(LOWER - 0.98 * (LOWER - UPPER)), LEFT]) == film._response_colour(0.98)
    assert tuple(last[round(LOWER - 0.03 * (LOWER - UPPER)), RIGHT]) == film._response_colour(0.03)
    assert film._response_colour(0) == film.HEALTHY
    assert film._response_colour(1) == film.DISEASED


def test_the_found_dose_is_marked_where_it_lies():
    one = FRAMES[:1], LAID[:1], [0.0], [(0.1, 0.1)]
    plain = shot(*one)[0].astype(int)
    for found in (0.25, 0.75, 1.3):  # beyond the axis: at its end
        marked = shot(*one, found=found)[0]
        rows = slice(UPPER + 10, LOWER - 10)
        columns = np.flatnonzero((marked != plain)[rows].any(axis=(0, 2)))
        assert columns.mean() == pytest.approx(LEFT + min(found, 1) * (RIGHT - LEFT), abs=1)


@pytest.mark.parametrize("positive", ["pneumonia", "COVID+PNEUMONIA", "W" * 80])
@pytest.mark.parametrize("dose", [0.0, 1.0])
def test_no_class_name_runs_over_a_films_edge(positive, dose):
    one = FRAMES[:1], LAID[:1], [dose], [(dose, dose)]
    figure = shot(*one, positive=positive, found=dose)[0]
    assert (margin(figure) == canvas.BACKGROUND).all()


def test_a_banner_is_red_along_the_upper_edge():
    plain, warned = shot()[0], shot(banner="do not believe")[0]
    assert (plain[:16] == canvas.BACKGROUND).all()
    assert ((warned[2:16] == canvas.ALARM).all(axis=-1)).mean() > 0.7
    assert np.array_equal(plain[film.TOP :], warned[film.TOP :])


def test_a_film_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError):
        shot(response=RESPONSE[:-1])


def test_a_film_of_another_kind_or_without_its_tool_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="a film is gif, webp, mp4, none"):
        film.check_film("avi")
    monkeypatch.setattr(film, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--film mp4 needs ffmpeg"):
        film.check_film("mp4")


def test_an_mp4_plays_forth_and_back(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    film.write_film(tmp_path / "x.mp4", shot(), 10)
    frames = imageio.imread(tmp_path / "x.mp4", plugin="FFMPEG")
    assert len(frames) == 8 + 2 * (film.REST - 1)
    assert np.abs(frames[0].astype(int) - shot()[0][: len(frames[0])]).mean() < 8


def sheet(small=4, heat=None, **more):
    title = "a title far too long for one tile " * 3
    tiles = [(title, GREY, heat)] * max(small, 3)
    sentence, lines = "a sentence that is long " * 12, ["<b> & a line " * 30, ""]
    return film.Sheet(sentence, tiles[:3], tiles[:small], lines, **more)


@pytest.mark.parametrize("small", [1, 4, 7, 8, 15])
def test_a_panel_holds_all_of_its_tiles_and_nothing_runs_over_its_edge(small):
    shown = film.panel(sheet(small))
    side = (shown.shape[1] - film.GAP) // 7 - film.GAP
    expected = 3 * film.SIDE**2 + small * side**2
    assert (shown == 100).all(axis=2).sum() == pytest.approx(expected, rel=0.02)
    assert (margin(shown) == canvas.BACKGROUND).all()


def test_a_panels_banner_is_red_above_all():
    shown = film.panel(sheet(banner="do not believe"))
    assert (shown[2:40] == canvas.ALARM).all(axis=2).mean() > 0.7


def test_the_vector_panel_has_the_same_places_and_its_words_as_text():
    asked = sheet(5, np.linspace(-1, 1, 32)[None].repeat(32, axis=0), banner="<do not believe>")
    tree = ElementTree.fromstring(film.panel_svg(asked))
    height, width = film.panel(asked).shape[:2]
    assert (float(tree.get("width")), float(tree.get("height"))) == (width, height)
    words = " ".join(node.text or "" for node in tree if node.tag.endswith("text"))
    assert "<DO NOT BELIEVE>" in words and "<b> & a line" in words
    images = [node for node in tree if node.tag.endswith("image")]
    assert len(images) == 3 + 5 + 2  # and two scales
    for node in images:
        x, y, w, h = (float(node.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x and x + w <= width and 0 <= y and y + h <= height
        assert node.get("href").startswith("data:image/png;base64,")


def test_signed_heat_is_blue_below_and_red_above_and_clear_at_zero():
    heat = np.zeros((32, 32))
    heat[:, :8], heat[:, -8:] = -2, 2
    left, middle, right = film.overlay(GREY, heat, True, 32)[16, [2, 16, 29]].astype(int)
    assert left[2] > left[0] + 80
    assert right[0] > right[2] + 80
    assert (middle == 100).all()


def test_unsigned_heat_ignores_what_is_negative():
    heat = np.zeros((32, 32))
    heat[:, :8], heat[:, -8:] = -2, 2
    left, right = film.overlay(GREY, heat, False, 32)[16, [2, 29]].astype(int)
    assert (left == 100).all()
    assert right[0] > 200 and right[1] > 150 and right[2] < 100


def test_heat_that_is_zero_everywhere_changes_nothing():
    assert (film.overlay(GREY, np.zeros((32, 32)), True, 64) == 100).all()
