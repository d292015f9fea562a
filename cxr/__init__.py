"""cxrgan: explain a chest X-ray classifier by moving an image from healthy to diseased."""

from pathlib import Path

__version__ = "0.1.0"


def weights_folder() -> Path:
    """`weights/` of a wheel (`cxr/weights`) or of a checkout (beside `cxr`)."""
    here = Path(__file__).parent
    return here / "weights" if (here / "weights").is_dir() else here.parent / "weights"


def plain(value: object) -> str:
    """A text on one line that cannot steer the terminal: what is not printable (Unicode's control,
    format and separator characters, lone surrogates) is shown as its escape, such as `\\x1b`."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


class CxrError(Exception):
    """A failure the person at the keyboard can mend; the message is one line and says how."""

    status = 1

    def __init__(self, message: str):
        super().__init__(plain(message))  # names in it come from files


class UsageError(CxrError):
    """Wrong use of a command or an option, rather than a bad input file."""

    status = 2


class Interrupted(CxrError):
    """Ctrl-C; what was done before is kept."""

    status = 130


def __getattr__(name: str):
    """`cxr.adapt` and `cxr.IMAGENET`, which need torch, when they are asked for."""
    if name in ("adapt", "IMAGENET"):
        from cxr.cnn import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module 'cxr' has no attribute {name!r}")
