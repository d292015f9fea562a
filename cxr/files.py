"""Files are written whole or not at all."""

import os
import shutil
import tempfile
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


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty draft folder, moved to `path` when it is whole. A folder that is there is
    replaced, never mixed; on failure it stays as it was.

    Raises CxrError when the file system refuses.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CxrError(f"{path}: is no folder that could be replaced; choose another name")
    room = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=".draft-", dir=path.parent))
        draft, old = room / "new", room / "old"
        draft.mkdir()
        yield draft
        if path.is_dir():
            os.rename(path, old)
        try:
            os.rename(draft, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    except OSError as error:
        raise CxrError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if room is not None and (path.exists() or not (room / "old").exists()):
            shutil.rmtree(room, ignore_errors=True)
