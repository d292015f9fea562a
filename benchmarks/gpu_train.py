"""Train a GAN on a GPU that is lent for minutes: data packed small, the run ended in time, the model
brought back in half precision.

    python benchmarks/gpu_train.py pack DATA PACKED.zip --size 128 [--negative NAME]
    python benchmarks/gpu_train.py train PACKED.zip OUT --minutes 8 -- --preset cxr128 --classifier CNN ...

`pack` writes the images as the networks see them, JPEG at quality 95, and a table with their patients
and splits. What follows `--` are options of `cxrgan train-gan`. OUT gets `model.safetensors`,
`discriminator.safetensors`, the log and the last sample sheet. On a CPU it rehearses.
"""

import argparse
import csv
import io
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from PIL import Image

from cxr import datasets
from cxr.checkpoints import Model, load_model

CXRGAN = [sys.executable, str(Path(__file__).resolve().parents[1] / "cxrgan.py")]
COLUMNS = ("path", "label", "patient", "split")


def pack(data: str, out: Path, size: int, fit: str, negative: str | None) -> None:
    """Write a data set as small as it trains."""
    opened = datasets.open_dataset(data, size, fit, negative=negative)
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(COLUMNS)
    with zipfile.ZipFile(out, "w") as packed:
        for number, pixels in enumerate(opened.images):
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "JPEG", quality=95)
            name = f"{number:06d}.jpg"
            packed.writestr(name, picture.getvalue())
            label = opened.classes[opened.labels[number]]
            rows.writerow((name, label, opened.patients[number], opened.splits[number]))
        packed.writestr(f"{opened.name}.csv", table.getvalue())
    print(f"{len(opened)} images, {out.stat().st_size / 2**20:.1f} MiB: {out}")


def train(packed: Path, out: Path, minutes: float, options: list[str]) -> None:
    """Train for so many minutes at most, from the first second of this process on."""
    end = time.monotonic() + 60 * minutes
    folder, run = out / "data", out / "run"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was broken off
    zipfile.ZipFile(packed).extractall(folder)
    (table,) = folder.glob("*.csv")
    command = [*CXRGAN, "train-gan", str(table), "--out", str(run), *options]
    process = subprocess.Popen(command)
    try:
        process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends the step under way, and saves
        process.wait()
    bring(run, out)
    shutil.rmtree(folder)
    shutil.rmtree(run)


def bring(run: Path, out: Path) -> None:
    """Of a run, what ships: its model of the last tick, without and with its discriminator alone."""
    if not (run / "model.safetensors").exists():
        sys.exit("no tick of 8,192 images ended in time: give it more --minutes")
    model = load_model(run / "model.safetensors")
    alone = Model({"discriminator": model.networks.pop("discriminator")}, model.info)
    model.save(out / "model.safetensors", half=True)
    alone.save(out / "discriminator.safetensors", half=True)
    shutil.copy(run / "log.jsonl", out)
    shutil.copy(max((run / "samples").iterdir()), out)
    print(f"{model.info['provenance']['gan']['seen']} images seen: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    packing, training = tasks.add_parser("pack"), tasks.add_parser("train")
    packing.add_argument("data")
    packing.add_argument("out", type=Path)
    packing.add_argument("--size", type=int, default=128)
    packing.add_argument("--fit", default="crop")
    packing.add_argument("--negative")
    training.add_argument("packed", type=Path)
    training.add_argument("out", type=Path)
    training.add_argument("--minutes", type=float, default=8)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given = vars(parser.parse_args(sys.argv[1:end]))
    if given.pop("task") == "pack":
        pack(**given)
    else:
        train(**given, options=sys.argv[end + 1 :])


if __name__ == "__main__":
    main()
