"""README and docs: short, linked to what exists, and about options that exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cxrgan import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md"]
for folder in ("docs", "weights", "benchmarks"):
    PAGES += sorted((ROOT / folder).glob("*.md"))


def test_readme_has_at_most_110_lines():
    assert len(README.splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\(\s*([^)#\s]+)", page.read_text())
    relative = [link for link in links if "://" not in link]
    assert [link for link in relative if not (page.parent / link).exists()] == []


def test_every_option_of_the_readme_exists():
    options = {o for c in cli.commands.values() for p in c.params for o in p.opts} | {"--help"}
    ours = "\n".join(line for line in README.splitlines() if "pytest" not in line)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours))
    assert named and named <= options


def test_every_command_of_the_readme_exists():
    named = set(re.findall(r"^\| `([a-z-]+)", README, re.MULTILINE))
    assert named == set(cli.commands)


def test_tables_are_what_the_script_makes_of_the_numbers():
    script = [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(script, env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_readme_tells_the_average_precision_that_the_protocol_measured():
    protocol = json.loads((ROOT / "benchmarks" / "phantoms-32.json").read_text())
    maps = protocol["phantoms"]["lesion"]["localisation"]
    ours, grad_cam = (f"{maps[name]['ap']['value']:.2f}" for name in ("latent_ig", "grad_cam"))
    assert f"average precision of {ours}, Grad-CAM with {grad_cam}" in " ".join(README.split())
