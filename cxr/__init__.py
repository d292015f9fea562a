"""cxrgan: explain a chest X-ray classifier by moving an image from healthy to diseased."""

__version__ = "0.1.0"


class CxrError(Exception):
    """A failure the person at the keyboard can mend; the message is one line and says how."""

    status = 1


class UsageError(CxrError):
    """Wrong use of a command or an option, rather than a bad input file."""

    status = 2


def __getattr__(name: str):
    """`cxr.adapt` and `cxr.IMAGENET`, which need torch, when they are asked for."""
    if name in ("adapt", "IMAGENET"):
        from cxr.cnn import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module 'cxr' has no attribute {name!r}")
