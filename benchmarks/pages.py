"""How fast the table of 1, 50 and 1,000 explanations opens and sorts in Debian's chromium.

    python benchmarks/pages.py EXPLANATION

EXPLANATION is a folder that `cxrgan explain` wrote for one image; its copies have other names and
probabilities. Needs selenium, chromium and chromedriver.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from cxr import report


def main(source: Path) -> None:
    for name in ("index.html", "explanation.gif", "panel.png", "panel.svg"):
        print(f"{name}: {(source / name).stat().st_size / 2**20:.2f} MB")
    for count in (1, 50, 1000):
        with tempfile.TemporaryDirectory() as folder:
            copies(source, Path(folder), count)
            page = Path(folder) / "index.html"
            page.write_text(report.index(folder))
            opened, sorted_, rows = visit(page)
            size = page.stat().st_size / 2**20
            print(f"{rows} rows, {size:.2f} MB: open in {opened:.2f} s, sorted in {sorted_:.2f} s")


def copies(source: Path, folder: Path, count: int) -> None:
    numbers = json.loads((source / "explanation.json").read_text())
    for i in range(count):
        case = folder / f"case-{i:04d}"
        case.mkdir()
        numbers["image"] = f"ward/case-{i:04d}.png"
        numbers["original"]["probability"] = (i * 37 % 1000) / 1000
        (case / "explanation.json").write_text(json.dumps(numbers))
        for name in ("thumbnail.png", "index.html"):
            os.symlink(source.resolve() / name, case / name)


def visit(page: Path) -> tuple[float, float, int]:
    """Seconds until the page has begun and until its fourth column is sorted, and its rows."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(word)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        start = time.perf_counter()
        driver.get(page.as_uri())
        body = driver.find_element("tag name", "body")
        WebDriverWait(driver, 30).until(lambda _: body.get_attribute("data-ready"))
        opened = time.perf_counter() - start
        start = time.perf_counter()
        driver.find_element("css selector", "th:nth-child(4) button").click()
        rows = len(driver.find_elements("css selector", "#rows tr"))
        return opened, time.perf_counter() - start, rows
    finally:
        driver.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
