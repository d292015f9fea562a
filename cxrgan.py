"""The front door: a command per job. Parses, calls, prints; computes nothing. From Python, it
offers what `cxr.api` holds: `cxrgan.explain(image)`.

Nothing heavy is imported before a command runs, so that `cxrgan --help` answers at once.
"""

from pathlib import Path

import click

from cxr import UsageError, __version__
from cxr.options import (
    INTERRUPTED,
    PRESETS,
    SPLITS,
    Door,
    another_classifier,
    classifier_option,
    classifier_options,
    data_options,
    device_option,
    example,
    film_options,
    force_option,
    gather,
    images_option,
    json_option,
    judging_options,
    model_option,
    out_option,
    own_options,
    path_options,
    refine_option,
    seed_option,
    shipped_model,
    size_option,
    stopping,
    training_options,
    within_option,
)

__all__ = ["IMAGENET", "CxrError", "Explanation", "adapt", "explain", "load_model", "sample"]  # noqa: F822


def __getattr__(name: str):
    """What `import cxrgan` offers, which needs torch, when it is asked for."""
    if name in __all__:
        from cxr import api

        return getattr(api, name)
    raise AttributeError(f"module 'cxrgan' has no attribute {name!r}")


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


@cli.command(
    epilog=example("cxrgan check chest_xray", "cxrgan check Data_Entry.csv --positive Mass")
)
@click.argument("data", metavar="DATA")
@data_options
@out_option("check.png", "A sheet of pictures of each class, and of what looks odd.")
@json_option
def check(data: str, out: str, as_json: bool, **reading: str | None) -> None:
    """Look at a data set before anything is trained on it.

    DATA is a folder with one sub-folder per class, or a table of image files and classes.
    """
    from cxr import console
    from cxr.data import check as checks

    numbers = checks.check(data, out, **reading)
    console.print_json(numbers) if as_json else console.data(data, numbers)
    console.say(f"pictures: {out}")
    if all(map(all, numbers["images"].values())):  # else training would refuse it
        console.follow("train-cnn", data, **reading)


@cli.command(epilog=example("cxrgan train-cnn chest_xray --out runs/cnn"))
@training_options(out="runs/cnn", batch=64, images=200_000)
@classifier_options
def train_cnn(data: str, out: str, resume: bool, **options) -> None:
    """Train a classifier on labelled X-rays.

    DATA is a folder with one sub-folder per class, or a table of image files and classes. Where
    --masks or --boxes say where the disease is, the classifier learns that, too.
    """
    from cxr import console
    from cxr.classifier import metrics_by_class, useless
    from cxr.train_cnn import PRESETS, Config, train
    from cxr.training import same_length

    console.quiet_unless_first()
    config = Config(data, **same_length(options, out, resume))
    model = train(config, out, resume)
    told = metrics_by_class(model.info)
    for name, metrics in told.items():
        against = f", {name} against the rest" if len(told) > 1 else ""
        console.classifier(f"{data}, test{against}", metrics)
    path = Path(out) / "model.safetensors"
    console.say(f"model: {path}")
    sound = [name for name, metrics in told.items() if not useless(metrics)]
    for name in (name for name in told if name not in sound):
        which = f" for {name}" if len(told) > 1 else ""
        why = f"this classifier is useless{which}: {useless(told[name])}"
        console.warn(f"{why}; give it more images, or more --images")
    if sound:
        fitting = [name for name, preset in PRESETS.items() if preset.size == config.pixels]
        preset = config.preset if config.preset in fitting else fitting[-1]
        words = "train-gan", data, "--classifier", str(path), "--preset", preset
        target = {"target": sound[-1], "classes": None} if len(told) > 1 else {}
        console.follow(*words, **config.asked() | target)


@cli.command(epilog=example("cxrgan train-gan chest_xray --classifier runs/cnn/model.safetensors"))
@training_options(out="runs/gan", batch="16; on a GPU up to 64", images=400_000)
@classifier_option("The classifier to explain", required=True)
@click.option(
    "--proximity",
    type=click.FloatRange(0),
    default=0.1,
    help="Penalty on image change between doses; raise it for small data sets.",
)
def train_gan(data: str, out: str, resume: bool, **options) -> None:
    """Train the GAN that explains a classifier.

    DATA is best what the classifier was trained on. FUNCTION takes nothing and returns a module
    from images [N, 1, R, R] in [-1, 1] to logits [N].
    """
    from cxr import console
    from cxr.checkpoints import load_model
    from cxr.cnn.own import is_own
    from cxr.train_gan import Config, train
    from cxr.training import same_length

    first = console.quiet_unless_first()
    train(Config(data, **same_length(options, out, resume)), out, resume)
    if not first:
        return  # the file below is the first process's
    path = Path(out) / "model.safetensors"
    metrics = load_model(path).info["metrics"]["gan"]
    rows = [(name, console.number(value)) for name, value in metrics.items()]
    console.table(f"{data}, validation", ("GAN", "value"), rows)
    console.say(f"model: {path}")
    names = ("classifier", "target", "classifier_input") if is_own(options["classifier"]) else ()
    console.follow("explain", "XRAY.png", "--model", str(path), **{n: options[n] for n in names})


@cli.command(epilog=example("cxrgan check-cnn own.py:net chest_xray --target PNEUMONIA"))
@click.argument("cnn", metavar="CNN")
@click.argument("data", metavar="[DATA]", required=False)
@own_options
@size_option(show_default="a model file's own; else 128")
@data_options
@device_option
@json_option
@click.pass_context
def check_cnn(context, cnn: str, data: str | None, as_json: bool, **options) -> None:
    """Check that a CNN can be explained, before hours are spent.

    CNN is FILE.py:FUNCTION, whose author's code is run; FILE.pt2 (torch.export), FILE.pt
    (TorchScript) or a model file, whose is not. Without DATA, random lungs are shown.
    """
    from cxr import console
    from cxr.cnn import check

    numbers = check.check_cnn(cnn, data, **options)
    console.print_json(numbers) if as_json else console.checks(cnn, numbers)
    context.exit(1 if numbers["failed"] else 0)


@cli.command(
    "explain",
    epilog=example(
        "cxrgan explain", "cxrgan explain ward/ scan.dcm --model runs/gan/model.safetensors"
    ),
)
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@shipped_model
@another_classifier
@path_options
@refine_option
@within_option
@seed_option
@out_option("explanation", "A folder for each image is made in it.")
@film_options
@force_option
@device_option
@json_option
@click.pass_context
def explain_command(context, images, model, out, force, device, as_json, **options) -> None:
    """Explain what a classifier sees in X-rays.

    IMAGE is a file or a folder of files; without one, the sample that ships is explained. Exit
    status 1 if an explanation is not to be believed.
    """
    from cxr import batch, console
    from cxr import explain as explainer
    from cxr.device import share_cores

    share_cores()
    own = (options.pop(name) for name in ("classifier", "target", "classifier_input"))
    loaded = explainer.load_explainer(model, next(own), device, *own)
    paths, status = gather(images or [explainer.sample_image(model)])
    with stopping("group of images") as stopped:
        results = batch.explain_all(paths, loaded, out, stopped, as_json, **options)
    if as_json:
        console.print_json(results)
    status = batch.conclude(results, len(paths), stopped, force) or status
    context.exit(status)


@cli.command(
    epilog=example(
        "cxrgan evaluate chest_xray --model runs/gan/model.safetensors --limit 100",
        "cxrgan evaluate chest_xray --model pneumonia --oracle runs/other-cnn/model.safetensors",
    )
)
@click.argument("data", metavar="DATA")
@model_option(required=True)
@another_classifier
@click.option(
    "--split", type=click.Choice(SPLITS), default="test", help="Which patients to evaluate."
)
@judging_options
@refine_option
@within_option
@data_options
@seed_option
@out_option("evaluation", "The folder for index.html, evaluation.json, evaluation.md and figures/.")
@click.option("--resume", is_flag=True, help="Continue the evaluation in --out.")
@device_option
@json_option
@click.pass_context
def evaluate(context, data: str, model: str, split: str, out: str, as_json: bool, **options):
    """Measure classifier, GAN and explanations on the held-out patients of DATA."""
    from cxr import console
    from cxr.evaluation import evaluate as evaluation
    from cxr.evaluation import tables

    numbers = evaluation.evaluate(model, data, split, out, **options)
    for line in numbers["about"]["notes"]:
        console.warn(line)
    if as_json:
        console.print_json(numbers)
    else:
        tables.evaluation(f"{data}, {split}", numbers)
        console.say(f"page: {Path(out) / 'index.html'}")
    context.exit(INTERRUPTED if "stopped" in numbers["about"] else 0)


@cli.command(epilog=example("cxrgan evaluate-phantoms --out runs/protocol"))
@size_option(default=32)
@images_option(64_000, 16, "Number of images that the training of each GAN sees.")
@seed_option
@out_option("runs/protocol", "The folder for data, models and evaluation.json.")
@device_option
@json_option
def evaluate_phantoms(
    size: int, images: int, seed: int, out: str, device: str, as_json: bool
) -> None:
    """Evaluate on synthetic X-rays whose truth is known.

    Makes its own data, trains its own CNNs and GANs, which takes hours, and goes on where it
    stopped.
    """
    from cxr import console
    from cxr.evaluation import tables
    from cxr.phantoms import protocol
    from cxr.phantoms.arm import Plan

    numbers = protocol.evaluate(out, Plan(f"cxr{size}", seed, gan=images), device)
    if as_json:
        console.print_json(numbers)
    else:
        tables.protocol(numbers)
        console.say(f"numbers: {Path(out) / 'evaluation.json'}")


@cli.command(
    "sample", epilog=example("cxrgan sample --model runs/gan/model.safetensors --images 12")
)
@shipped_model
@out_option("sample.png", "The sheet: a row for each pair of lungs, healthy to diseased.")
@images_option(8, 1, "Number of pairs of lungs.")
@seed_option
@device_option
def sample_command(model: str | None, out: str, images: int, seed: int, device: str) -> None:
    """Draw random lungs, healthy to diseased."""
    from cxr import console, explain, film, sampling
    from cxr.checkpoints import load_model
    from cxr.device import prepare

    loaded = load_model(model or explain.default_model(), prepare(device))
    film.write_png(out, film.grid(sampling.lungs(loaded.generator, images, seed), sampling.HEADS))
    doses = ", ".join(f"{dose:g}" for dose in sampling.DOSES)
    console.table(out, ("sheet", ""), [("rows", f"{images} lungs"), ("columns: doses", doses)])


@cli.command(epilog=example("cxrgan phantoms phantoms/ --images 2000 --shortcut 0.9"))
@click.argument("out", metavar="OUT")
@images_option(1000, 2, "Number of phantoms, half of them diseased.")
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
    from cxr.phantoms import lesions

    lesions.write(out, images, size, seed, shortcut)
    marker = "none" if shortcut is None else f"agrees with the label at {shortcut:g}"
    rows = [("images", images), ("pixels", f"{size} x {size}"), ("marker", marker)]
    console.table(out, ("phantoms", ""), [*rows, ("truth", Path(out) / "truth.csv")])
    console.follow("train-cnn", str(Path(out) / "images"), preset=f"cxr{size}")


@cli.command(epilog=example("cxrgan bench kernels --device cuda --out benchmarks/gpu.json"))
@click.argument("what", type=click.Choice(("kernels", "step", "explain", "all")), default="all")
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(PRESETS),
    help="Size of the networks to measure; may be repeated.  [default: cxr64, cxr128; on a GPU cxr256, too]",
)
@click.option("--batch", type=click.IntRange(16), default=32, help="Images in a batch of the GAN.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Seconds to spend on each operation and shape.",
)
@device_option
@out_option("benchmarks/bench.json", "The JSON file.")
def bench(
    what: str, presets: tuple[str, ...], batch: int, seconds: float, device: str, out: str
) -> None:
    """Time the kernels, the training step and the explainer against their alternatives."""
    if Path(out).is_dir():
        raise UsageError(f"--out {out} is a folder: name a file in it")
    from cxr import console
    from cxr.evaluation import bench as benchmark

    found = benchmark.bench(what, device, presets, batch, seconds)
    benchmark.write(found, out)
    console.say(f"numbers: {out}")


@cli.command(epilog=example("cxrgan info", "cxrgan info runs/gan/model.safetensors"))
@click.argument("path", metavar="[MODEL]", required=False)
@model_option("The same as the argument MODEL.")
def info(path: str | None, model: str | None) -> None:
    """Show the machine and, with MODEL, what is in a model file."""
    from cxr import checkpoints, console
    from cxr import device as facts

    model = path or model
    contents = checkpoints.contents(model) if model else []
    console.table(f"cxrgan {__version__}", ("machine", ""), facts.machine())
    if model:
        console.table(model, ("model", ""), contents)


def main() -> None:
    cli(prog_name="cxrgan")


if __name__ == "__main__":
    main()
