"""Finds, compiles and loads the native kernels; says which are in use and why.

The kernels are looked for beside this file (built ahead of time), then in the user's cache, and are
else compiled there, once per source, flags, torch version and processor. Whatever fails, the
dispatcher runs the references of `cxr.ops` instead.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from cxr import CxrError, UsageError, console

PACKAGE = Path(__file__).parent
FLAGS = ["-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")
FLAGS.append("-DTORCH_TARGET_VERSION=0x020b000000000000")  # the stable ABI of torch 2.11
DIGEST = hashlib.sha256().digest_size

_status: tuple[str, str] | None = None


class _Unavailable(Exception):
    """Why there are no native kernels, in one line."""


def status() -> tuple[str, str]:
    """Which path the operations take, "native" or "reference", and why."""
    return _status or ("reference", "native kernels not asked for yet")


def load() -> tuple[str, str]:
    """Load the native kernels, compiling them if need be; what `status` says from then on.

    `CXRGAN_KERNELS` may be `auto` (the default), `off`, or `require`, under which CxrError is
    raised where there are none.
    """
    global _status
    if _status is None:
        _status = _load(os.environ.get("CXRGAN_KERNELS") or "auto")
    return _status


def _load(mode: str) -> tuple[str, str]:
    if mode not in ("auto", "off", "require"):
        raise UsageError(f"CXRGAN_KERNELS is '{mode}': set it to auto, off or require")
    if mode == "off":
        return "reference", "CXRGAN_KERNELS=off"
    try:
        return "native", _load_native()
    except _Unavailable as reason:
        if mode == "require":
            raise CxrError(f"CXRGAN_KERNELS=require, but: {reason}") from reason
        console.warn(f"slower plain torch is used, not the native kernels: {reason}")
        return "reference", str(reason)


def _load_native() -> str:
    """Load the library from where it is, or make it; where it came from. Raises _Unavailable."""
    sources = _sources()
    ahead = ahead_of_time(sources)
    if ahead.exists() and _loads(ahead):
        return f"built ahead of time: {ahead}"
    entry = _cache() / f"kernels-{_hash(ahead.name, *FLAGS, torch.__version__, _processor())}.so"
    if _intact(entry) and _loads(entry):
        return f"compiled earlier: {entry}"
    return _compile(sources, entry)


def _sources() -> list[Path]:
    """The native sources: in the wheel inside the package, in a checkout beside it."""
    for folder in (PACKAGE / "kernels", PACKAGE.parent / "kernels"):
        if found := sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
            return found
    raise _Unavailable(f"their sources are missing from {PACKAGE / 'kernels'}")


def ahead_of_time(sources: list[Path]) -> Path:
    """Where the library of these very sources lies if it was built with the package."""
    key = _hash(*(path.name.encode() + path.read_bytes() for path in sources))
    return PACKAGE / f"_kernels-{key}.so"


def _cache() -> Path:
    xdg = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("CXRGAN_CACHE") or os.path.join(xdg, "cxrgan"))


def _hash(*parts: str | bytes) -> str:
    """A name for what may not change without a new build."""
    parts = (part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[
        :16
    ]


def _processor() -> str:
    """What `-march=native` compiles for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _intact(entry: Path) -> bool:
    """Whether a cached library is whole: loading half of one would end the process."""
    try:
        data = entry.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]


def _compile(sources: list[Path], entry: Path) -> str:
    """Compile and load, and leave the library in the cache as `entry`; where it came from."""
    compiler = _compiler()
    failure = entry.with_name(f"{entry.stem}-{_hash(compiler)}.failed")
    if failure.exists():
        raise _Unavailable(f"{failure.read_text()} (delete {failure} to try again)")
    folder = _own_folder(entry.parent)
    console.say("compiling the native kernels, once; this takes some ten seconds")
    try:
        library = _run_compiler([str(path) for path in sources if path.suffix == ".cpp"], folder)
        data = library.read_bytes()
        if _keep(data + hashlib.sha256(data).digest(), folder / "kept", entry):
            return f"compiled now by {compiler}: {entry}"
        return f"compiled for this run only by {compiler}: {entry.parent} cannot be written"
    except _Unavailable as reason:
        _keep(str(reason).encode(), folder / "kept", failure)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compiler() -> str:
    """The C++ compiler that torch will call, and its version."""
    command = os.environ.get("CXX", "c++")
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise _Unavailable(f"no C++ compiler: '{command}' does not run; install g++ or set CXX")
    return answer.stdout.partition("\n")[0]


def _own_folder(cache: Path) -> Path:
    """A folder no other process builds in, where possible on the cache's file system."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="cxrgan-"))


def _run_compiler(sources: list[str], folder: Path) -> Path:
    from torch.utils import cpp_extension  # slow to import, and needs setuptools

    try:
        with _ninja_on_path():
            library = cpp_extension.load(
                "cxrgan_kernels",
                sources,
                extra_cflags=FLAGS,
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise _Unavailable(next((line for line in lines if "error: " in line), lines[0]))
    return Path(library)


@contextmanager
def _ninja_on_path():
    """The ninja wheel's program is not on the path where its environment is not activated."""
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = path + os.pathsep + sysconfig.get_path("scripts")
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _keep(data: bytes, draft: Path, target: Path) -> bool:
    """Put a file into the cache in one step; False if the cache cannot be written."""
    try:
        draft.write_bytes(data)
        os.replace(draft, target)
    except OSError:
        return False
    return True
