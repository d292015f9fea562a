"""Files are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cxr import CxrError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved over it at the end; nothing is left on failure.

    Raises CxrError when the file system refuses.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CxrError(f"{path}: is no file that could be replaced; choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CxrError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # gone already, as it should be
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file. Raises CxrError."""
    with replacing(path) as temporary:
        temporary.write_text(text)
