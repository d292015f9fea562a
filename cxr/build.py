"""Finds, compiles and loads the native kernels; says which are in use and why.

There is a library for the CPU and, where torch sees a GPU, one for CUDA. Each is looked for beside
this file (built ahead of time by setup.py), then in the user's cache, and is else compiled there,
once per source, flags, torch version and processor. Whatever fails, the dispatcher runs the
references of `cxr.ops` instead.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cxr import CxrError, UsageError, console

PACKAGE = Path(__file__).parent
SUFFIXES = {"cpu": (".cpp", ".h"), "cuda": (".cu", ".cuh", ".h")}  # of the sources
X86 = platform.machine() in ("x86_64", "AMD64")
ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
FLAGS = {
    "cpu": ["-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", ABI],
    "cuda": ["-O3", "-DUSE_CUDA", ABI],
}
NATIVE = ["-march=native", *(["-mprefer-vector-width=512"] if X86 else [])]  # this very processor
PORTABLE = ["-mavx2", "-mfma", "-mf16c"] if X86 else []  # most processors
DIGEST = hashlib.sha256().digest_size

_status: tuple[str, str] | None = None


class _Unavailable(Exception):
    """Why there are no native kernels, in one line."""


def status() -> tuple[str, str]:
    """Which path the operations take, "native", "reference" or "partly native", and why."""
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
    loaded, lines = [], []
    for kind in _kinds():
        try:
            lines.append(f"{kind}: {_load_native(kind)}")
            loaded.append(kind)
        except _Unavailable as reason:
            if mode == "require":
                raise CxrError(f"CXRGAN_KERNELS=require, but: {kind}: {reason}") from reason
            lines.append(f"{kind}: {reason}")
            console.warn(f"slower plain torch is used, not the native kernels: {lines[-1]}")
    path = "native" if len(loaded) == len(lines) else "partly native" if loaded else "reference"
    return path, "; ".join(lines)


def _kinds() -> list[str]:
    return ["cpu", "cuda"] if torch.version.cuda and torch.cuda.is_available() else ["cpu"]


def _load_native(kind: str) -> str:
    """Load the library from where it is, or make it; where it came from. Raises _Unavailable."""
    sources = _sources(kind)
    ahead = ahead_of_time(kind, sources)
    if _runs_portable(kind) and ahead.exists() and _loads(ahead):
        return f"built ahead of time: {ahead}"
    target = (*NATIVE, _processor()) if kind == "cpu" else (_architectures(),)
    key = _hash(ahead.name, *FLAGS[kind], torch.__version__, *target)
    entry = _cache() / f"kernels-{kind}-{key}.so"
    if _intact(entry) and _loads(entry):
        return f"compiled earlier: {entry}"
    return _compile(kind, sources, entry)


def _sources(kind: str) -> list[Path]:
    """The native sources: in the wheel inside the package, in a checkout beside it."""
    for folder in (PACKAGE / "kernels", PACKAGE.parent / "kernels"):
        if found := sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES[kind]):
            return found
    raise _Unavailable(f"their sources are missing from {PACKAGE / 'kernels'}")


def _translation_units(kind: str, sources: list[Path]) -> list[str]:
    return [str(path) for path in sources if path.suffix == SUFFIXES[kind][0]]


def ahead_of_time(kind: str, sources: list[Path]) -> Path:
    """Where the library of these very sources lies if it was built with the package."""
    key = _hash(*(path.name.encode() + path.read_bytes() for path in sources))
    return PACKAGE / f"_kernels-{kind}-{key}.so"


def _runs_portable(kind: str) -> bool:
    """Whether the processors here are among those that are compiled for ahead of time."""
    if kind == "cuda":
        gpus = range(torch.cuda.device_count())
        return all(torch.cuda.get_device_capability(i) >= (8, 0) for i in gpus)
    return not X86 or torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def extensions() -> list:
    """What setup.py builds ahead of time: the kernels for the CPU, and those for CUDA where torch
    and a toolkit have it; a GPU is not needed."""
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = _architectures()
    cuda = torch.version.cuda and cpp_extension.CUDA_HOME
    found = []
    for kind in ("cpu", "cuda") if cuda else ("cpu",):
        sources = _sources(kind)
        make = cpp_extension.CUDAExtension if kind == "cuda" else cpp_extension.CppExtension
        found.append(
            make(
                f"cxr.{ahead_of_time(kind, sources).stem}",
                [os.path.relpath(path) for path in _translation_units(kind, sources)],
                extra_compile_args={
                    "cxx": FLAGS[kind] + (PORTABLE if kind == "cpu" else []),
                    "nvcc": FLAGS["cuda"],
                },
            )
        )
    return found


def _cache() -> Path:
    xdg = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("CXRGAN_CACHE") or os.path.join(xdg, "cxrgan"))


def _hash(*parts: str | bytes) -> str:
    """A name for what may not change without a new build."""
    parts = (part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[
        :16
    ]


def _architectures() -> str:
    """The GPUs to compile for, as TORCH_CUDA_ARCH_LIST says it: what it says, else those of this
    machine, else those of data centres."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if gpus:
        return ";".join(f"{major}.{minor}" for major, minor in sorted(gpus))
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return "8.0;9.0;10.0+PTX" if version >= (12, 8) else "8.0;9.0+PTX"


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


def _compile(kind: str, sources: list[Path], entry: Path) -> str:
    """Compile and load, and leave the library in the cache as `entry`; where it came from."""
    compiler = _compiler(kind)
    failure = entry.with_name(f"{entry.stem}-{_hash(compiler)}.failed")
    if failure.exists():
        raise _Unavailable(f"{failure.read_text()} (delete {failure} to try again)")
    folder = _own_folder(entry.parent)
    time = "some ten seconds" if kind == "cpu" else "about a minute"
    console.say(f"compiling the native kernels for {kind}, once; this takes {time}")
    try:
        library = _run_compiler(kind, _translation_units(kind, sources), folder)
        data = library.read_bytes()
        if _keep(data + hashlib.sha256(data).digest(), folder / "kept", entry):
            return f"compiled now by {compiler}: {entry}"
        return f"compiled for this run only by {compiler}: {entry.parent} cannot be written"
    except _Unavailable as reason:
        _keep(str(reason).encode(), folder / "kept", failure)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compiler(kind: str) -> str:
    """The compiler that torch will call, and its version. Raises _Unavailable without it, ninja or
    setuptools; that is not remembered, since they may be installed."""
    try:
        from torch.utils import cpp_extension  # slow to import, and needs setuptools

        with _environment(kind):
            cpp_extension.verify_ninja_availability()
    except (ImportError, RuntimeError) as error:
        raise _Unavailable(str(error))
    command, remedy = os.environ.get("CXX", "c++"), "install g++ or set CXX"
    if kind == "cuda":
        command = f"{cpp_extension.CUDA_HOME or '/usr/local/cuda'}/bin/nvcc"
        remedy = "install the CUDA toolkit or set CUDA_HOME"
    try:
        answer = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise _Unavailable(f"no compiler: '{command}' does not run; {remedy}")
    lines = answer.stdout.splitlines()
    return lines[0] if kind == "cpu" else f"nvcc, {lines[-1]}"


def _own_folder(cache: Path) -> Path:
    """A folder no other process builds in, where possible on the cache's file system."""
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    except OSError:
        return Path(tempfile.mkdtemp(prefix="cxrgan-"))


def _run_compiler(kind: str, sources: list[str], folder: Path) -> Path:
    from torch.utils import cpp_extension

    try:
        with _environment(kind):
            library = cpp_extension.load(
                f"cxrgan_{kind}",
                sources,
                extra_cflags=FLAGS[kind] + (NATIVE if kind == "cpu" else []),
                extra_cuda_cflags=FLAGS["cuda"],
                build_directory=str(folder),
                with_cuda=kind == "cuda",
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = (line for line in lines if "error: " in line or "nvcc fatal" in line)
        raise _Unavailable(next(told, lines[0]))
    return Path(library)


@contextmanager
def _environment(kind: str) -> Iterator[None]:
    """The ninja wheel's program on the path, where its environment may not be activated, and the
    GPUs to compile for."""
    before = dict(os.environ)
    os.environ["PATH"] = before.get("PATH", "") + os.pathsep + sysconfig.get_path("scripts")
    if kind == "cuda":
        os.environ["TORCH_CUDA_ARCH_LIST"] = _architectures()
    try:
        yield
    finally:
        for name in ("PATH", "TORCH_CUDA_ARCH_LIST"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _keep(data: bytes, draft: Path, target: Path) -> bool:
    """Put a file into the cache in one step; False if the cache cannot be written."""
    try:
        draft.write_bytes(data)
        os.replace(draft, target)
    except OSError:
        return False
    return True
