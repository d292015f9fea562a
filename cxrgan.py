"""The front door: a command per job. Parses, calls, prints; computes nothing.

Nothing heavy is imported before a command runs, so that `cxrgan --help` answers at once.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from cxr import CxrError, UsageError, __version__

PRESETS = ("tiny", "cxr32", "cxr64", "cxr128", "cxr256")
SIZES = (32, 64, 128, 256)
SPLITS = ("train", "val", "test", "all")
INTERRUPTED = 130  # the status a shell gives for Ctrl-C
FAILURES = (click.UsageError, CxrError, OSError, RuntimeError)


class Door(click.Group):
    """Lists commands in their order below; in `main` alone a failure becomes an exit status."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, *args, **extra):
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except FAILURES as error:
            status = complain(error)
        sys.exit(status)


def complain(error: Exception) -> int:
    """Print a failure as one line on stderr and return its exit status; a bug is raised again."""
    if isinstance(error, click.Abort):  # what click makes of Ctrl-C
        return INTERRUPTED
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "cxrgan"
        line = f"{error.format_message().rstrip('.')}; see {command} --help"
        status = error.exit_code
    elif isinstance(error, CxrError):
        line, status = str(error), error.status
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        line, status = where + (error.strerror or str(error)), 1
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
        line, status = "out of memory: take a smaller --batch or --preset", 1
    else:
        raise error
    line = " ".join(line.split("\n"))
    click.echo(line if status == INTERRUPTED else f"error: {line}", err=True)
    return status


# ---------------------------------------------------------------------------------------------
# Options, each declared once


def stack(*decorators: Callable) -> Callable:
    """Several decorators as one, the first outermost."""

    def apply(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def example(*lines: str) -> str:
    """The last lines of a command's help, kept as they are."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


def out_option(default: str, what: str) -> Callable:
    return click.option("--out", default=default, help=what)


def images_option(default: int, least: int, what: str) -> Callable:
    return click.option("--images", type=click.IntRange(least), default=default, help=what)


def size_option(**default) -> Callable:
    return click.option("--size", type=click.Choice(SIZES), help="Pixels a side.", **default)


def model_option(what: str = "A model file, or a shipped model's name.", **extra) -> Callable:
    return click.option("--model", metavar="MODEL", help=what, **extra)


seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of all that is random."
)
device_option = click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
fit_option = click.option(
    "--fit",
    type=click.Choice(("crop", "pad")),
    default="crop",
    help="How an image becomes square: its centre, or black bars.",
)
refine_option = click.option(
    "--refine", type=click.IntRange(0), default=60, help="Steps of the inversion."
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the numbers as JSON instead of a table."
)
data_options = stack(
    click.option("--negative", metavar="CLASS", help="The healthy class, against all the rest."),
    click.option(
        "--patient-pattern",
        metavar="REGEX",
        help="Its first group, found in a file's name, is the patient.",
    ),
)
classifier_option = click.option(
    "--classifier",
    metavar="CNN",
    help="Another CNN than the GAN's, or yours that it was trained with: a model file, or "
    "FILE.py:FUNCTION.",
)
shipped_model = model_option(show_default="pneumonia")


def training_options(out: str, batch: int, images: int) -> Callable:
    """What both training commands share."""
    return stack(
        click.argument("data", metavar="DATA"),
        out_option(out, "The run folder: model, state, log."),
        click.option("--preset", type=click.Choice(PRESETS), default="cxr64", help="Of networks."),
        data_options,
        click.option(
            "--batch",
            type=click.IntRange(2),
            default=batch,
            help="Over all processes; a multiple of 16 for train-gan.",
        ),
        images_option(images, 1, "How many images training sees."),
        click.option(
            "--start",
            metavar="MODEL",
            help="Begin with this model's weights; those of cxr64 grow for cxr128.",
        ),
        seed_option,
        device_option,
        click.option("--resume", is_flag=True, help="Go on with the run in --out."),
    )


# ---------------------------------------------------------------------------------------------
# Commands


@click.group(
    "cxrgan",
    cls=Door,
    invoke_without_command=True,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    epilog=example(
        "cxrgan explain                       the X-ray and the model that ship",
        "cxrgan train-cnn DATA                a classifier from your X-rays,",
        "cxrgan train-gan DATA --classifier runs/cnn/model.safetensors",
        "cxrgan explain XRAY.png --model runs/gan/model.safetensors",
    ),
)
@click.version_option(__version__, prog_name="cxrgan")
@click.pass_context
def cli(context: click.Context) -> None:
    """Explain a chest X-ray classifier: the same lungs, going from healthy to diseased as the
    classifier sees it. For research only; no diagnosis."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(epilog=example("cxrgan train-cnn chest_xray --out runs/cnn"))
@training_options(out="runs/cnn", batch=64, images=200_000)
@size_option(show_default="the preset's")
@fit_option
@click.option(
    "--fold",
    type=click.IntRange(0, 9),
    default=0,
    help="Which tenth of the patients is tested; the model remembers.",
)
def train_cnn(data: str, out: str, resume: bool, **options) -> None:
    """Train a classifier on labelled X-rays.

    DATA is a folder with one sub-folder per class, or a CSV of path,label[,patient].
    """
    quiet_unless_first()
    from cxr import console, tables
    from cxr.train_cnn import PRESETS, Config, train

    config = Config(data, **options)
    model = train(config, out, resume)
    tables.classifier(f"{data}, test", model.info["metrics"]["classifier"])
    path = Path(out) / "model.safetensors"
    console.say(f"model: {path}")
    fitting = [name for name, preset in PRESETS.items() if preset.size == config.pixels]
    preset = config.preset if config.preset in fitting else fitting[-1]
    follow(
        *("train-gan", data, "--classifier", str(path), "--preset", preset),
        negative=config.negative,
        patient_pattern=config.patient_pattern,
    )


@cli.command(epilog=example("cxrgan train-gan chest_xray --classifier runs/cnn/model.safetensors"))
@training_options(out="runs/gan", batch=16, images=400_000)
@click.option(
    "--classifier", required=True, metavar="CNN", help="A model file, or FILE.py:FUNCTION."
)
@click.option(
    "--proximity",
    type=click.FloatRange(0),
    default=0.1,
    help="How much a dose's change costs; more of it for small data sets.",
)
def train_gan(data: str, out: str, resume: bool, **options) -> None:
    """Train the GAN that explains a classifier.

    DATA is best what the classifier was trained on: a folder with one sub-folder per class, or a
    CSV of path,label[,patient]. FUNCTION takes nothing and returns a module from images
    [N, 1, R, R] in [-1, 1] to logits [N].
    """
    first = quiet_unless_first()
    from cxr import console, tables
    from cxr.checkpoints import load_model
    from cxr.train_gan import Config, train

    train(Config(data, **options), out, resume)
    if not first:
        return  # the file below is the first process's
    path = Path(out) / "model.safetensors"
    metrics = load_model(path).info["metrics"]["gan"]
    rows = [(name, tables.number(value)) for name, value in metrics.items()]
    console.table(f"{data}, validation", ("GAN", "value"), rows)
    console.say(f"model: {path}")
    own = options["classifier"] if ".py:" in options["classifier"] else None
    follow("explain", "XRAY.png", "--model", str(path), classifier=own)


@cli.command(
    epilog=example(
        "cxrgan explain", "cxrgan explain ward/ scan.dcm --model runs/gan/model.safetensors"
    )
)
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@shipped_model
@classifier_option
@click.option("--frames", type=click.IntRange(2, 200), default=17, help="Of the path.")
@click.option("--restarts", type=click.IntRange(1, 64), default=2, help="Of the inversion.")
@refine_option
@seed_option
@out_option("explanation", "A folder for each image is made in it.")
@device_option
@json_option
@click.pass_context
def explain(context, images, model, classifier, out, device, as_json, **options) -> None:
    """Explain what a classifier sees in X-rays.

    IMAGE is a file or a folder of files; without one, the sample that ships is explained.
    """
    from cxr import console, tables
    from cxr import explain as explainer
    from cxr import images as pictures

    loaded = explainer.load_explainer(model, classifier, device)
    paths, status = gather(images or [explainer.sample_image(model)])
    done = []
    with console.progress("explain", len(paths), quiet=len(paths) < 2) as bar:
        for path, name in zip(paths, pictures.names_apart(paths)):
            try:
                found = explainer.explain(path, loaded, **options)
                found.write(Path(out) / name)
                done.append((path, Path(out) / name, found.numbers))
            except UsageError:
                raise  # the other images would say the same
            except (CxrError, OSError) as error:
                status = complain(error)
            bar.advance()
    for path, folder, numbers in done:
        for line in numbers["warnings"]:
            console.warn(f"{path}: {line}")
        if not as_json:
            tables.explanation(path, folder, numbers)
    if as_json:
        print_json([numbers for _, _, numbers in done])
    context.exit(status)


@cli.command(
    epilog=example(
        "cxrgan evaluate chest_xray --model runs/gan/model.safetensors --limit 100",
        "cxrgan evaluate chest_xray --model pneumonia --oracle runs/other-cnn/model.safetensors",
        "cxrgan evaluate --phantoms --out runs/protocol",
    )
)
@click.argument("data", metavar="[DATA]", required=False)
@model_option()
@click.option(
    "--phantoms",
    is_flag=True,
    help="The phantom protocol instead: makes its own data and models; goes on where it stopped.",
)
@size_option(default=32)
@images_option(64_000, 16, "How many images each GAN of the protocol sees.")
@classifier_option
@click.option("--split", type=click.Choice(SPLITS), default="test", help="Of the patients.")
@click.option(
    "--masks", metavar="FOLDER", help="Where the disease is: masks named as their images."
)
@click.option("--lungs", metavar="FOLDER", help="Lung masks, named as their images.")
@click.option(
    "--oracle",
    metavar="CNN",
    help="Another CNN, trained independently, that judges the GAN: a model file, or "
    "FILE.py:FUNCTION.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="How many images to explain.", show_default="all"
)
@refine_option
@data_options
@seed_option
@out_option("evaluation", "The folder for evaluation.json, evaluation.md and figures/.")
@device_option
@json_option
def evaluate(data, model, phantoms, size, images, split, out, as_json, **options) -> None:
    """Measure classifier, GAN and explanations on DATA; or, with --phantoms, on synthetic X-rays
    whose truth is known."""
    from cxr import console, tables
    from cxr import evaluate as evaluation

    if phantoms == bool(data) or phantoms == bool(model):
        raise UsageError("evaluate takes either DATA and --model, or --phantoms and neither")
    if phantoms:
        refuse_given("--phantoms", *("classifier", "split", "masks", "lungs", "oracle", "limit"))
        refuse_given("--phantoms", "refine", "negative", "patient_pattern")
        evaluate_phantoms(size, images, options["seed"], options["device"], out, as_json)
        return
    refuse_given("DATA", "size", "images")
    numbers = evaluation.evaluate(model, data, split, out, **options)
    for line in numbers["about"]["notes"]:
        console.warn(line)
    if as_json:
        print_json(numbers)
    else:
        tables.evaluation(f"{data}, {split}", numbers)
        console.say(f"numbers: {Path(out) / 'evaluation.json'}")


def refuse_given(flag: str, *names: str) -> None:
    """UsageError if one of these options was given beside a flag that ignores it."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{flag} takes no --{name.replace('_', '-')}")


def evaluate_phantoms(
    size: int, images: int, seed: int, device: str, out: str, as_json: bool
) -> None:
    from cxr import console, protocol, tables
    from cxr.trials import Plan

    numbers = protocol.evaluate(out, Plan(f"cxr{size}", seed, gan=images), device)
    if as_json:
        print_json(numbers)
    else:
        tables.protocol(numbers)
        console.say(f"numbers: {Path(out) / 'evaluation.json'}")


@cli.command(epilog=example("cxrgan sample --model runs/gan/model.safetensors --images 12"))
@shipped_model
@out_option("sample.png", "The sheet: a row for each pair of lungs, healthy to diseased.")
@images_option(8, 1, "How many pairs of lungs.")
@seed_option
@device_option
def sample(model: str | None, out: str, images: int, seed: int, device: str) -> None:
    """Draw random lungs, healthy to diseased."""
    import torch

    from cxr import console, explain, monitor
    from cxr import images as pictures
    from cxr.checkpoints import load_model
    from cxr.training import find_device

    loaded = load_model(model or explain.default_model(), find_device(device))
    with torch.no_grad():
        codes = monitor.draw_codes(loaded.generator, images, seed)
        lungs = monitor.walk(loaded.generator, *codes)
    pictures.write_png(out, pictures.grid(monitor.to_uint8(lungs[:, :, 0])))
    doses = ", ".join(f"{dose:g}" for dose in monitor.DOSES)
    console.table(out, ("sheet", ""), [("rows", f"{images} lungs"), ("columns: doses", doses)])


@cli.command(epilog=example("cxrgan phantoms phantoms/ --images 2000 --shortcut 0.9"))
@click.argument("out", metavar="OUT")
@images_option(1000, 2, "How many, half of them diseased.")
@size_option(default=64)
@seed_option
@click.option(
    "--shortcut",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="A corner marker that agrees with the label with this probability.",
    show_default="no marker",
)
def phantoms(out: str, images: int, size: int, seed: int, shortcut: float | None) -> None:
    """Make synthetic X-rays whose truth is known.

    The folder OUT gets images of both classes, the diseased ones' healthy twins, masks, and
    truth.csv with every parameter.
    """
    from cxr import console
    from cxr import phantoms as maker

    maker.write(out, images, size, seed, shortcut)
    marker = "none" if shortcut is None else f"agrees with the label at {shortcut:g}"
    rows = [("images", images), ("pixels", f"{size} x {size}"), ("marker", marker)]
    console.table(out, ("phantoms", ""), [*rows, ("truth", Path(out) / "truth.csv")])
    follow("train-cnn", str(Path(out) / "images"), size=size)


@cli.command(epilog=example("cxrgan bench kernels --device cuda --out benchmarks/gpu.json"))
@click.argument("what", type=click.Choice(("kernels", "step", "explain", "all")), default="all")
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(PRESETS),
    help="Whose shapes and networks; may be repeated.  [default: cxr64, cxr128; on a GPU cxr256, too]",
)
@click.option("--batch", type=click.IntRange(16), default=32, help="Images in a batch of the GAN.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Spent on each operation and shape.",
)
@device_option
@out_option("benchmarks/bench.json", "The JSON file.")
def bench(
    what: str, presets: tuple[str, ...], batch: int, seconds: float, device: str, out: str
) -> None:
    """Time the kernels, the training step and the explainer against their alternatives."""
    if Path(out).is_dir():
        raise UsageError(f"--out {out} is a folder: name a file in it")
    from cxr import bench as benchmark
    from cxr import console

    found = benchmark.bench(what, device, presets, batch, seconds)
    benchmark.write(found, out)
    console.say(f"numbers: {out}")


@cli.command(epilog=example("cxrgan info", "cxrgan info runs/gan/model.safetensors"))
@click.argument("path", metavar="[MODEL]", required=False)
@model_option("The same as the argument.")
def info(path: str | None, model: str | None) -> None:
    """Show the machine and, with MODEL, what is in a model file."""
    from cxr import console
    from cxr import info as facts

    model = path or model
    contents = facts.contents(model) if model else []
    console.table(f"cxrgan {__version__}", ("machine", ""), facts.machine())
    if model:
        console.table(model, ("model", ""), contents)


# ---------------------------------------------------------------------------------------------
# What the commands print


def quiet_unless_first() -> bool:
    """Of the processes that torchrun starts only the first one prints; whether this is it."""
    from cxr import console

    first = os.environ.get("RANK", "0") == "0"
    console.out.quiet = console.err.quiet = not first
    return first


def follow(*words: str, **options) -> None:
    """Say which command comes next; options that are None are left out."""
    from cxr import console

    for name, value in options.items():
        if value is not None:
            words += ("--" + name.replace("_", "-"), str(value))
    console.say(f"next:  {shlex.join(('cxrgan', *words))}")


def print_json(numbers: dict | list) -> None:
    click.echo(json.dumps(numbers, indent=1))


def gather(arguments: Sequence[str | Path]) -> tuple[list[Path], int]:
    """The image files of files and folders, each once, and status 1 if one is not there."""
    from cxr.images import find_images

    paths, status = [], 0
    for argument in arguments:
        try:
            paths += find_images(argument)
        except CxrError as error:
            status = complain(error)
    return list(dict.fromkeys(paths)), status


def main() -> None:
    cli(prog_name="cxrgan")


if __name__ == "__main__":
    main()
