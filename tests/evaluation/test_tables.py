"""The tables that commands print."""

from cxr import console
from cxr.evaluation import tables


def figure(value, low=0.0, high=1.0, n=9):
    return {"value": value, "low": low, "high": high, "n": n}


NUMBERS = {
    "reconstruction": {"psnr": figure(30.5, 29, 32), "rejected": figure(None, None, None, 0)},
    "localisation": {
        "latent_ig": {"ap": figure(0.6), "pointing": figure(1.0)},
        "edges": {"ap": figure(0.1)},
    },
    "randomisation": {
        "edges": figure(1.0) | {"magnitude": figure(0.5), "cascade": [1.0, 1.0]},
    },
    "about": {"model": "m"},
}


def test_a_figure_has_title_unit_and_direction_from_the_registry():
    lines = tables.markdown("data, test", NUMBERS).splitlines()
    assert lines[0] == "data, test"
    assert "| reconstruction | PSNR, dB | more | 30.5000 | 29.0000 to 32.0000 | 9 |" in lines
    assert "| reconstruction | rejected | less | - | - to - | 0 |" in lines
    assert not any("about" in line for line in lines)


def test_parts_that_compare_methods_have_a_row_for_each():
    lines = tables.markdown("data, test", NUMBERS).splitlines()
    start = lines.index("localisation")
    header = "| method | average precision; more is better | pointing game; more is better |"
    assert lines[start + 2] == header
    assert lines[start + 4] == "| latent IG | 0.60 (0.00 to 1.00) | 1.00 (0.00 to 1.00) |"
    assert lines[start + 5] == "| edges | 0.10 (0.00 to 1.00) | - |"
    start = lines.index("randomisation")
    assert "correlation of magnitudes" in lines[start + 2]
    assert lines[start + 4] == "| edges | 1.00 (0.00 to 1.00) | 0.50 (0.00 to 1.00) |"


def test_the_protocol_has_a_column_for_each_arm_and_control(monkeypatch):
    shown = []
    monkeypatch.setattr(console, "table", lambda *table: shown.append(table))
    marker = {"chance": {"mass": figure(0.01)}, "latent_ig": {"mass": figure(0.3)}}
    arm = {"twin": {"original": {"psnr": figure(20.0)}}, "marker": marker}
    control = {"twin": {"original": {"psnr": figure(21.0)}}, "cnn": {"auroc": figure(0.5)}}
    tables.protocol({"phantoms": {"lesion": arm}, "controls": {"no_cnn": control}})
    (title, header, rows), (_, arms, cells) = shown
    assert title == "marker, lesion" and header[1] == "mass on the marker, of the map"
    assert [row[0] for row in rows] == ["chance", "latent IG"]
    assert arms == ("figure", "lesion", "control: no_cnn")
    assert cells[0] == ("twin.original.psnr", "20.00 (0.00 to 1.00)", "21.00 (0.00 to 1.00)")
    assert cells[1] == ("cnn.auroc", "-", "0.50 (0.00 to 1.00)")
