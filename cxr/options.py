"""The command line's fittings: options, each declared once, and what becomes of a failure.

Imports nothing heavy, so that `cxrgan --help` answers at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from cxr import CxrError, Interrupted

PRESETS = ("tiny", "cxr32", "cxr64", "cxr128", "cxr256")
SIZES = (32, 64, 128, 256)
SPLITS = ("train", "val", "test", "all")
INTERRUPTED = 130  # the status a shell gives for Ctrl-C
FAILURES = (click.UsageError, CxrError, OSError, RuntimeError, MemoryError)


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
        click.echo("interrupted", err=True)
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
    elif _lacks_memory(error):
        line, status = "out of memory: take a smaller --batch or --preset", 1
    else:
        raise error
    from cxr.console import plain  # after a failure: it is slow to import

    line = plain(" ".join(line.split("\n")))
    click.echo(line if status == INTERRUPTED else f"error: {line}", err=True)
    return status


def _lacks_memory(error: Exception) -> bool:
    """Of Python, of torch on a GPU (its error may not be imported here), of torch on a CPU."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or "DefaultCPUAllocator" in str(error)


def reason(error: Exception) -> str:
    """Why an image failed, as one line."""
    known = isinstance(error, CxrError | OSError)
    line = str(error) if known else f"{type(error).__name__}: {error}"
    return " ".join(line.split())


@contextmanager
def stopping(work: str) -> Iterator[list[int]]:
    """Within it, Ctrl-C and SIGTERM only leave their number in the list that is yielded, so that
    the `work` under way, such as a step, ends; a second one stops at once. Raises `Interrupted`
    then."""
    stopped: list[int] = []
    told = f"\nstopping after this {work}; once more stops at once\n".encode()

    def note(number, frame):
        if stopped:
            raise KeyboardInterrupt
        stopped.append(number)
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts
            os.write(2, told)  # past a progress bar, which may be writing itself

    before = {one: signal.signal(one, note) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    except KeyboardInterrupt:
        error = Interrupted("stopped at once: what was saved before is kept")
        error.status = 128 + (stopped[0] if stopped else signal.SIGINT)
        raise error from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


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
    """A folder, or a file of the default's kind: another kind's may be anything of the user's."""
    suffix = Path(default).suffix

    def kept(context: click.Context, option: click.Parameter, out: str) -> str:
        if suffix and not Path(out).is_dir() and Path(out).suffix.lower() != suffix:
            raise click.BadParameter(f"{out} is no name of a {suffix} file", context, option)
        return out

    return click.option("--out", default=default, help=what, callback=kept)


def images_option(default: int, least: int, what: str) -> Callable:
    return click.option("--images", type=click.IntRange(least), default=default, help=what)


def size_option(**default) -> Callable:
    return click.option(
        "--size", type=click.Choice(SIZES), help="Pixels on each side of an image.", **default
    )


def model_option(what: str = "A model file, or a shipped model's name.", **extra) -> Callable:
    return click.option("--model", metavar="MODEL", help=what, **extra)


seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Random seed."
)


device_option = click.option(
    "--device", default="auto", help="Where to compute: auto, cpu, cuda or cuda:N."
)


fold_option = click.option(
    "--fold",
    type=click.IntRange(0, 9),
    default=0,
    help="Which tenth of the patients is the test set; the model file records it.",
)


classes_option = click.option(
    "--classes",
    type=click.Choice(("many",)),
    show_default="healthy against diseased",
    help="One classifier of three classes or more; train-gan --target explains one of them.",
)


fit_option = click.option(
    "--fit",
    type=click.Choice(("crop", "pad", "lungs")),
    default="crop",
    help="How to make an image square: crop to its centre, pad with black bars, or crop to the lungs, "
    "which a network finds.",
)


refine_option = click.option(
    "--refine",
    type=click.IntRange(0),
    default=60,
    help="Number of optimisation steps of the inversion.",
)


within_option = click.option(
    "--within",
    type=click.Choice(("lungs",)),
    help="Let the overlay change the image in the lungs alone, which a network finds.",
    show_default="anywhere",
)


path_options = stack(
    click.option("--frames", type=click.IntRange(2, 200), default=17, help="Number of frames."),
    click.option(
        "--restarts",
        type=click.IntRange(1, 64),
        default=2,
        help="Number of starting points of the inversion.",
    ),
)


film_options = stack(
    click.option(
        "--film",
        type=click.Choice(("gif", "webp", "mp4", "none")),
        default="gif",
        help="Kind of film; mp4 needs ffmpeg.",
    ),
    click.option(
        "--fps", type=click.FloatRange(0.5, 50), default=8, help="Frames of the film in a second."
    ),
)


force_option = click.option(
    "--force", is_flag=True, help="Exit with 0, even if an explanation is not to be believed."
)


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the numbers as JSON instead of a table."
)


data_options = stack(
    click.option(
        "--negative",
        metavar="CLASS",
        help="Name of the healthy class; without --positive, all others count as diseased.",
    ),
    click.option(
        "--positive",
        metavar="CLASS",
        help="Name of the diseased class or finding, or a table's column of 0 and 1; without "
        "--negative, all others count as healthy.",
    ),
    click.option("--path-column", metavar="NAME", help="A table's column of image files."),
    click.option("--label-column", metavar="NAME", help="A table's column of classes."),
    click.option("--patient-column", metavar="NAME", help="A table's column of patients."),
    click.option(
        "--patient-pattern",
        metavar="REGEX",
        help="Regular expression whose first group, matched in a file's name, is the patient.",
    ),
    click.option(
        "--leave-out",
        metavar="SOURCE",
        help="A table's source=NAME or scanner=NAME: its patients are tested, and not trained on.",
    ),
)


places_options = stack(
    click.option(
        "--masks",
        metavar="FOLDER",
        help="Folder of disease masks, each with the name of its image.",
    ),
    click.option(
        "--boxes",
        metavar="CSV",
        help="In place of masks, boxes: name, x, y, width, height, as shares of the image's sides.",
    ),
)


classifier_options = stack(
    size_option(show_default="the preset's"),
    fit_option,
    fold_option,
    classes_option,
    places_options,
)


judging_options = stack(
    places_options,
    click.option(
        "--lungs",
        metavar="FOLDER",
        help="Folder of lung masks, each with the name of its image.",
        show_default="found by a network",
    ),
    click.option(
        "--oracle",
        metavar="CNN",
        help="An independent classifier, trained apart from the GAN's, that judges the GAN: a model "
        "file, or FILE.py:FUNCTION.",
    ),
    click.option(
        "--findings",
        metavar="CNN",
        multiple=True,
        help="A CNN of other findings, whose verdicts should stay: a model file, or FILE.py:FUNCTION; "
        "may be repeated.",
    ),
    click.option(
        "--limit", type=click.IntRange(1), help="Number of images to explain.", show_default="all"
    ),
)


own_options = stack(
    click.option(
        "--target",
        metavar="CLASS",
        help="The class to explain, of a CNN with several: its name or number.",
    ),
    click.option(
        "--classifier-input",
        metavar="INPUT",
        help="The images that a custom CNN takes: SIZE,CHANNELS,LOW,HIGH, or imagenet.",
    ),
)


def classifier_option(what: str, **extra) -> Callable:
    """`--classifier`, with what a custom CNN may need beside it."""
    forms = "a model file, FILE.py:FUNCTION, FILE.pt2 or FILE.pt."
    option = click.option("--classifier", metavar="CNN", help=f"{what}: {forms}", **extra)
    return stack(option, own_options)


another_classifier = classifier_option(
    "Explain a different classifier, or supply the custom one that this GAN was trained with"
)


shipped_model = model_option(show_default="pneumonia")


def training_options(out: str, batch: int | str, images: int) -> Callable:
    """What both training commands share. batch: its default, or what is said of one that is found
    out."""
    return stack(
        click.argument("data", metavar="DATA"),
        out_option(out, "The run folder: model, state, log."),
        click.option(
            "--preset",
            type=click.Choice(PRESETS),
            default="cxr64",
            help="Size of the networks and of their images.",
        ),
        data_options,
        click.option(
            "--batch",
            type=click.IntRange(2),
            default=None if isinstance(batch, str) else batch,
            show_default=batch if isinstance(batch, str) else True,
            help="Images in a batch, over all processes; a multiple of 16 for train-gan.",
        ),
        click.option(
            "--images",
            type=click.IntRange(1),
            show_default=f"{images}; with --resume, the run's own",
            help="Number of images that training sees.",
        ),
        click.option(
            "--start",
            metavar="MODEL",
            help="Begin with this model's weights; those of cxr64 grow for cxr128.",
        ),
        seed_option,
        device_option,
        click.option("--resume", is_flag=True, help="Continue the run in --out."),
    )


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
