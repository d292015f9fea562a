"""Files and folders are written whole or not at all, by one process at a time, and to the disk.

What is written first lies in a draft: a folder beside the target that only this user may enter,
whose name cannot be foreseen, locked while its process lives. Drafts of dead processes are removed.
"""

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cxr import CxrError, UsageError

ROOT = 0
DRAFT = re.compile(r"\.[a-z0-9_]{8}\.draft")
_swept: set[Path] = set()  # folders where this process has looked for drafts


@contextmanager
def replacing(path: str | Path, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path, moved to `path` at the end; nothing is left on failure.

    After a loss of power the old content is there, or the new. A `private` file is for this user
    alone; another has the permissions that the umask leaves. Raises CxrError when the file system
    refuses.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise CxrError(f"{path}: is no file that could be replaced; choose another name")
    with _writing(path) as draft:
        new = draft / "new"
        yield new
        os.chmod(new, 0o600 if private else 0o666 & ~_umask())
        _flush(new)
        os.replace(new, path)
        _flush(path.parent)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty draft folder, moved to `path` when it is whole. A folder that is there is
    replaced, never mixed; on failure it stays as it was.

    Raises CxrError when the file system refuses.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CxrError(f"{path}: is no folder that could be replaced; choose another name")
    with _writing(path, parents=True) as draft:
        new, old = draft / "new", draft / "old"
        new.mkdir()
        old.mkdir()
        try:
            yield new
        except CxrError as error:  # of a file in it
            raise CxrError(str(error).replace(str(new), str(path))) from error
        _flush(new)
        try:
            if path.is_dir():
                os.rename(path, old / path.name)
            os.rename(new, path)
        finally:
            _put_back(draft)
        _flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file. Raises CxrError."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def append_text(path: str | Path, text: str) -> None:
    """Append to a text file, to the disk. Raises CxrError."""
    try:
        with open(path, "a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CxrError(f"{path}: cannot be written: {error.strerror or error}") from error


def keep(path: str | Path, copy: str | Path) -> None:
    """Let `copy` be what `path` is now, whatever replaces `path` later. Raises CxrError."""
    with replacing(copy) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


@contextmanager
def locked(path: str | Path, patience: float = 0) -> Iterator[str | None]:
    """Holds the lock file `path` and yields None; if another process still holds it after so many
    seconds, yields who. The kernel frees the lock of a process that dies.

    Where the file system knows no locks, none is held. Raises OSError if the file cannot be made.
    """
    end = time.monotonic() + patience
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        while not _lock(file):
            if time.monotonic() >= end:
                yield os.pread(file, 200, 0).decode(errors="replace") or "another process"
                return
            time.sleep(0.1)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(file, 0)
        os.pwrite(
            file, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode(), 0
        )
        yield None
    finally:
        os.close(file)


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Make `folder`; within it, no other process that asks the same writes there. Raises UsageError, which
    says who does, or CxrError if the folder cannot be written."""
    with ExitStack() as opened:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            holder = opened.enter_context(locked(Path(folder) / "run.lock"))
        except OSError as error:
            raise CxrError(f"{folder}: cannot be written: {error.strerror}") from None
        if holder:
            raise UsageError(
                f"{folder} is in use by {holder}: wait for its end, or choose another --out"
            )
        yield


def distrusted(path: str | Path) -> str | None:
    """Why another user could have put or changed what lies at `path`; None if only this user and
    root could. A link at `path` itself is not trusted; one on the way is, if its owner is."""
    path = Path(path).absolute()
    for place in dict.fromkeys((path, *path.parents, *path.resolve().parents)):
        found = place.lstat()
        if found.st_uid not in (ROOT, os.getuid()):
            return f"{place} belongs to another user"
        if stat.S_ISLNK(found.st_mode):
            if place == path:
                return f"{place} is a link"
            continue
        if place != path and found.st_mode & stat.S_ISVTX:  # as /tmp: none renames another's
            continue
        shared = found.st_gid != os.getuid()  # else the group of this user alone
        if found.st_mode & (0o022 if shared else 0o002):
            return f"others may write {place}; chmod go-w helps"
    return None


@contextmanager
def _writing(path: Path, parents: bool = False) -> Iterator[Path]:
    """Yields a locked draft folder for `path`, removed at the end. OSErrors become CxrErrors."""
    draft = file = None
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        draft, file = _draft(path.parent)
        yield draft
    except OSError as error:
        raise CxrError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if draft is not None:
            try:
                shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(file)


def _draft(folder: Path) -> tuple[Path, int]:
    """A new draft folder and its descriptor, which holds its lock."""
    while True:
        made = tempfile.mkdtemp(prefix=".", suffix=".draft", dir=folder)
        with suppress(FileNotFoundError):
            file = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if _lock(file) and os.path.exists(made):
                return Path(made), file
            os.close(file)  # swept by another process before the lock was held


def _sweep(folder: Path) -> None:
    """Remove the drafts that dead processes of this user left; a folder that one of them had moved
    away, and not yet replaced, comes back."""
    if folder.absolute() in _swept:
        return
    _swept.add(folder.absolute())
    with suppress(OSError):
        left = [Path(entry) for entry in os.scandir(folder) if DRAFT.fullmatch(entry.name)]
        for draft in left:
            _remove_if_dead(draft)


def _remove_if_dead(draft: Path) -> None:
    with suppress(OSError):
        file = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(file).st_uid == os.getuid() and _lock(file, sure=True):
                _put_back(draft)
                shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(file)


def _put_back(draft: Path) -> None:
    """A folder that was moved into the draft, and not yet replaced, where it was."""
    for old in (draft / "old").glob("*"):
        if not (draft.parent / old.name).exists():
            os.rename(old, draft.parent / old.name)


def _lock(file: int, sure: bool = False) -> bool:
    """Whether nobody else holds the lock of an open file; ours from now on. Where locks are
    unknown: whether not `sure`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not sure
    return True


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what some say of every folder
            raise
    finally:
        os.close(file)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
