"""The notebooks run as they stand, still say what was saved in them, and hold nothing of a machine."""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import pytest

import cxrgan

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in PATHS}
DECIMAL = r"-?\d+\.\d+"
AGAIN = "run docs/notebooks/run.py, and read what has changed"

each = pytest.mark.parametrize("name", NOTEBOOKS)


def code(name):
    """The code cells, in order: (source, outputs, tags)."""
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    return [("".join(c["source"]), c["outputs"], c["metadata"].get("tags", [])) for c in cells]


def said(outputs):
    """The text that a reader sees under a cell."""
    printed = [o["text"] for o in outputs if o["output_type"] == "stream"]
    shown = [o["data"]["text/plain"] for o in outputs if o["output_type"] == "execute_result"]
    return " ".join("".join(text) for text in printed + shown)


def execute(source, names):
    """What a cell prints and shows, as a notebook does: the value of its last expression."""
    *body, last = ast.parse(source).body
    tail = [last] if isinstance(last, ast.Expr) else []
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        body = ast.Module(body if tail else [*body, last], [])
        exec(compile(body, "cell", "exec"), names)  # noqa: S102
        if tail:
            value = eval(compile(ast.Expression(tail[0].value), "cell", "eval"), names)
    return f"{printed.getvalue()} {'' if value is None else shown(value)}"


def shown(value):
    if hasattr(value, "_repr_html_"):
        assert "<img" in value._repr_html_()
    return re.sub(r" at 0x\w+", "", repr(value))


def words(text):
    """The text, without how it is broken into lines, and its decimals apart."""
    decimals = [float(number) for number in re.findall(DECIMAL, text)]
    return re.sub(DECIMAL, "#", text).split(), decimals


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that lies to the weights as docs/notebooks does."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "docs" / "notebooks")


def test_there_are_notebooks():
    assert set(NOTEBOOKS) == {"explain", "own-cnn"}


@each
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_a_notebook_says_again_what_is_saved_in_it(name, folder, compiled_operators):
    pytest.importorskip("matplotlib").use("Agg")
    if "import torchvision" in "".join(source for source, _, _ in code(name)):
        pytest.importorskip("torchvision", exc_type=ImportError)
    names = {}
    for source, outputs, tags in code(name):
        (now, numbers), (then, saved) = words(execute(source, names)), words(said(outputs))
        assert now == then, f"{AGAIN}:\n{source}"
        if "random" not in tags:
            assert numbers == pytest.approx(saved, rel=0.1, abs=0.1), f"{AGAIN}:\n{source}"


@each
def test_a_notebook_was_run_from_top_to_bottom_without_an_error(name):
    cells = [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {o["output_type"] for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert {o.get("name", "stdout") for o in outputs} == {"stdout"}
    assert any("base64," in "".join(o.get("data", {}).get("text/html", "")) for o in outputs)


@each
def test_a_notebook_is_small_and_holds_nothing_of_a_machine(name):
    path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < 1_000_000
    text = re.sub(r"base64,[^\"\\]+|\"image/png\": \"[^\"]+", "", path.read_text())
    assert re.findall(r"(?<![\w.<*])/\w[^\s\"]*|\b[A-Z]:\\\\", text) == []
    assert all("execution" not in cell["metadata"] for cell in NOTEBOOKS[name]["cells"])


@each
def test_a_notebook_uses_only_what_import_cxrgan_offers(name):
    used = set()
    for node in ast.walk(ast.parse("\n".join(source for source, _, _ in code(name)))):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "cxrgan":
            used.add(node.attr)
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not [m for m in modules if m.split(".")[0] == "cxr" or m.startswith("cxrgan.")]
        if isinstance(node, ast.ImportFrom) and node.module == "cxrgan":
            used |= {alias.name for alias in node.names}
    assert used and used <= set(cxrgan.__all__)


@each
def test_the_links_of_a_notebook_lead_to_files_that_exist(name):
    cells = [c for c in NOTEBOOKS[name]["cells"] if c["cell_type"] == "markdown"]
    text = "".join("".join(cell["source"]) for cell in cells)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert links and [x for x in links if not (ROOT / "docs" / "notebooks" / x).exists()] == []
