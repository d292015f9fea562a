"""The recipes of docs/own-cnn.md as a user meets them: lines to write, what `check-cnn` says, seconds
and memory of an explanation with the GAN that ships. Random weights, so not to be believed.

    python benchmarks/recipes.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CXRGAN = [sys.executable, str(ROOT / "cxrgan.py")]


def main() -> None:
    text = (ROOT / "docs" / "own-cnn.md").read_text()
    recipes = re.findall(r"### (\w+)\n\n```python\n(.*?)```", text, re.DOTALL)
    print("| recipe | lines | `check-cnn` | seconds | memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        print(f"| the model's own | 0 | | {run(folder, [])} |", flush=True)
        for name, code in recipes:
            path = Path(folder) / f"own_{name}.py"
            path.write_text(code)
            written = sum(bool(line.strip()) and "#" not in line for line in code.splitlines())
            spec = ["--classifier", f"{path}:net"]
            print(f"| {name} | {written} | {check(spec[1])} | {run(folder, spec)} |", flush=True)


def check(cnn: str) -> str:
    """How many checks of `check-cnn` pass, or why it cannot be run."""
    command = [*CXRGAN, "check-cnn", cnn, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        return done.stderr.strip()
    numbers = json.loads(done.stdout)
    total = len(numbers["checks"])
    return f"{total - numbers['failed']} of {total} pass"


def run(folder: str, options: list[str]) -> str:
    """Seconds and memory of `explain` as two cells."""
    command = [*CXRGAN, "explain", *options, "--force", "--film", "none", "--out", folder + "/x"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        return f"{error.decode().strip().splitlines()[-1]} | "
    return f"{seconds:.1f} s | {usage.ru_maxrss / 2**20:.1f} GB"


if __name__ == "__main__":
    main()
