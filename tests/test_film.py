"""The figures say what they are given: curve, marks, heat colours, and no text over the edge."""

import numpy as np
import pytest

from cxr import film

FRAMES = np.random.default_rng(0).integers(40, 200, (5, 32, 32), dtype=np.uint8)
LAID = FRAMES[:, ::-1]
DOSES, RESPONSE = np.linspace(0, 1, 5), [(p, 1 - p) for p in (0.02, 0.1, 0.5, 0.9, 0.97)]
GREY = np.full((32, 32), 100, np.uint8)


def margin(figure, width=8):
    """The pixels within `width` of the edge, which belong to the background."""
    inside = np.zeros(figure.shape[:2], bool)
    inside[width:-width, width:-width] = True
    return figure[~inside]


def test_a_film_has_one_figure_per_frame_and_its_curve_grows():
    frames = film.film(FRAMES, LAID, DOSES, RESPONSE)
    assert len(frames) == 5
    assert {(figure.shape, figure.dtype) for figure in frames} == {((404, 1056, 3), np.dtype("u1"))}
    plots = [figure[120:314, 740:1024].astype(int) for figure in frames]
    reach = [np.flatnonzero((np.ptp(plot, axis=-1) > 30).any(axis=0)).max() for plot in plots]
    np.testing.assert_allclose(reach, DOSES * 284, atol=10)  # the dot's radius, and the crop


def test_both_xrays_stand_in_their_own_frame():
    frames = film.film(FRAMES, LAID, DOSES, RESPONSE)
    for pair, figure in zip(zip(FRAMES, LAID), frames, strict=True):
        for frame, left in zip(pair, (20, 356)):
            shown = figure[20:340, left : left + 320, 0].reshape(32, 10, 32, 10).mean(axis=(1, 3))
            assert np.corrcoef(shown.ravel(), frame.ravel())[0, 1] > 0.95


def test_the_curve_is_blue_where_healthy_and_red_where_diseased():
    first, last = (film.film(FRAMES, LAID, DOSES, RESPONSE)[index] for index in (0, -1))
    assert tuple(first[314, 738]) == film._response_colour(0.02)
    assert tuple(last[122, 1026]) == film._response_colour(0.97)
    assert film._response_colour(0) == film.HEALTHY
    assert film._response_colour(1) == film.DISEASED


def test_the_found_dose_is_marked_where_it_lies():
    plain = film.film(FRAMES[:1], LAID[:1], [0.0], [(0.1, 0.1)])[0].astype(int)
    for found in (0.25, 0.75, 1.3):  # beyond the axis: at its end
        marked = film.film(FRAMES[:1], LAID[:1], [0.0], [(0.1, 0.1)], found=found)[0]
        columns = np.flatnonzero((marked != plain)[130:300].any(axis=(0, 2)))
        assert columns.mean() == pytest.approx(738 + min(found, 1) * 288, abs=1)


@pytest.mark.parametrize("positive", ["pneumonia", "COVID+PNEUMONIA", "W" * 80])
@pytest.mark.parametrize("dose", [0.0, 1.0])
def test_no_class_name_runs_over_a_films_edge(positive, dose):
    figure = film.film(FRAMES[:1], LAID[:1], [dose], [(dose, dose)], positive, found=dose)[0]
    assert (margin(figure) == film.BACKGROUND).all()
    assert (figure[56:90, 962:1046] != film.BACKGROUND).any() or positive == "pneumonia"


def test_a_film_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError):
        film.film(FRAMES, LAID, DOSES, RESPONSE[:-1])


@pytest.mark.parametrize("count, columns, rows", [(1, 1, 1), (5, 5, 1), (6, 5, 2), (11, 5, 3)])
def test_a_panel_lays_five_tiles_to_a_row(count, columns, rows):
    tiles = [("a title far too long for one tile " * 2, GREY, None, False)] * count
    sheet = film.panel(tiles, "a caption that is long " * 20)
    assert sheet.shape[1] == 16 + columns * 272
    assert (margin(sheet) == film.BACKGROUND).all()
    assert ((sheet == 100).all(axis=2)).sum() == pytest.approx(count * 256**2, rel=0.01)


def test_a_panel_has_a_legend_only_for_the_heat_it_shows():
    ramp = np.linspace(-1, 1, 32)[None].repeat(32, axis=0)
    plain = film.panel([("a", GREY, None, True)], "caption")
    heated = film.panel([("a", GREY, ramp, True)], "caption")
    assert len(heated) == len(plain) + film.LINE


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
