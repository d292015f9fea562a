"""Finds, compiles and loads the native kernels; says which are in use and why.

There is a library for the CPU and, where torch sees a GPU, one for CUDA. Each is looked for beside
this file (built ahead of time by setup.py), then in the user's cache, and is else compiled there,
once per source, flags, torch version and processor. Whatever fails, the dispatcher runs the
references of `cxr.ops` instead.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import torch

from cxr import CxrError, UsageError, console
from cxr.files import distrusted, locked, replacing, write_text

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
LIMIT = 300  # seconds for a build, and for waiting for another process's
BUILD = """
import json, sys
from torch.utils import cpp_extension
try:
    cpp_extension.load(**json.loads(sys.argv[1]))
except Exception as error:
    sys.exit(str(error))
"""
NINJA = re.compile(r"\[\d+/\d+\]|FAILED: |ninja: |Error building extension")

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
    from cxr.data import (
        cache,  # not above: setup.py imports this module, and may lack what it needs
    )

    sources = _sources(kind)
    ahead = ahead_of_time(kind, sources)
    if _runs_portable(kind) and ahead.exists() and _loads(ahead):
        return f"built ahead of time: {ahead}"
    target = (*NATIVE, _processor()) if kind == "cpu" else (_architectures(),)
    name = f"kernels-{kind}-{_hash(ahead.name, *FLAGS[kind], torch.__version__, *target)}.so"
    for folder in cache.cache_folders():
        if _intact(folder / name) and _loads(folder / name):
            return f"compiled earlier: {folder / name}"
    try:
        return _compile(kind, sources, cache.writable_folder() / name)
    except (CxrError, OSError) as error:  # a full disk
        raise _Unavailable(str(error))


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
    """Whether a cached library is whole, as loading half of one would end the process, and cannot
    be another user's, as loading it runs it."""
    try:
        data = entry.read_bytes()
        whole = hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]
        return whole and distrusted(entry) is None
    except OSError:
        return False


def _compile(kind: str, sources: list[Path], entry: Path) -> str:
    """Compile and load, and leave the library in the cache as `entry`; where it came from. Of
    several processes one compiles; the others wait for it, and in vain at most `LIMIT`."""
    compiler = _compiler(kind)
    called = _hash(compiler, os.environ.get("CXX", ""))
    failure = entry.with_name(f"{entry.stem}-{called}.failed")
    with locked(entry.with_suffix(".lock"), LIMIT):
        if _intact(entry) and _loads(entry):
            return f"compiled by another process: {entry}"
        if failure.exists():
            raise _Unavailable(f"{failure.read_text()} (delete {failure} to try again)")
        time = "some ten seconds" if kind == "cpu" else "about a minute"
        console.say(f"compiling the native kernels for {kind}, once; this takes {time}")
        try:
            with replacing(entry, private=True) as library:
                folder = library.with_name("build")
                folder.mkdir()
                data = _run_compiler(kind, _translation_units(kind, sources), folder).read_bytes()
                library.write_bytes(data + hashlib.sha256(data).digest())
        except _Unavailable as reason:
            if "No space left" not in str(reason) and "quota" not in str(reason):
                write_text(failure, str(reason))
            raise
    if not _loads(entry):
        raise _Unavailable(f"{entry} was compiled, and cannot be loaded")
    return f"compiled now by {compiler}: {entry}"


def _compiler(kind: str) -> str:
    """The compiler that torch will call, and its version. Raises _Unavailable without it, ninja or
    setuptools; that is not remembered, since they may be installed."""
    if not shutil.which("ninja", path=_environment(kind)["PATH"]):
        raise _Unavailable("ninja is missing: pip install ninja")
    if importlib.util.find_spec("setuptools") is None:
        raise _Unavailable("setuptools is missing: pip install setuptools")
    remedy = "install g++ or set CXX"
    try:
        command = shlex.split(os.environ.get("CXX") or "c++")
    except ValueError:
        raise _Unavailable(f"no compiler: CXX is '{os.environ['CXX']}', a quote is not closed")
    if kind == "cuda":
        from torch.utils import cpp_extension  # slow to import

        command = [f"{cpp_extension.CUDA_HOME or '/usr/local/cuda'}/bin/nvcc"]
        remedy = "install the CUDA toolkit or set CUDA_HOME"
    name = shlex.join(command)
    try:
        status, said = _run([*command, "--version"], 10)
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"no compiler: '{name} --version' does not end; {remedy}")
    except OSError:
        status, said = 1, ""
    if status:
        raise _Unavailable(f"no compiler: '{name}' does not run; {remedy}")
    lines = said.splitlines() or [name]
    return lines[0] if kind == "cpu" else f"nvcc, {lines[-1]}"


def _run(command: list[str], limit: float, **options) -> tuple[int, str]:
    """Exit status and output of a command, which is ended after `limit` seconds, with all that it
    has started. Raises TimeoutExpired, and OSError where it cannot be started."""
    kept = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    options |= {"text": True, "errors": "replace", "start_new_session": True}
    with subprocess.Popen(command, **kept, **options) as process:
        try:
            said, _ = process.communicate(timeout=limit)
            return process.returncode, said
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _run_compiler(kind: str, sources: list[str], folder: Path) -> Path:
    """The library, compiled in a process of its own, which also tries to load it."""
    name = f"cxrgan_{kind}"
    options = {
        "name": name,
        "sources": sources,
        "extra_cflags": FLAGS[kind] + (NATIVE if kind == "cpu" else []),
        "extra_cuda_cflags": FLAGS["cuda"],
        "build_directory": str(folder),
        "with_cuda": kind == "cuda",
        "is_python_module": False,
    }
    environment = _environment(kind)
    if len(shlex.split(environment.get("CXX", ""))) > 1:  # such as `ccache g++`; torch takes a name
        script = folder / "cxx"
        script.write_text(f'#!/bin/sh\nexec {environment["CXX"]} "$@"\n')
        script.chmod(0o700)
        environment["CXX"] = "./cxx"  # from `folder`, whose own name a shell may not bear
    command = [sys.executable, "-c", BUILD, json.dumps(options)]
    try:
        status, said = _run(command, LIMIT, env=environment, cwd=folder)
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"the compiler had not ended after {LIMIT} seconds")
    if status:
        raise _Unavailable(
            _first_error(said) or f"the compiler failed, and said nothing ({status})"
        )
    return folder / f"{name}.so"


def _first_error(said: str) -> str | None:
    """The line that says why a build failed, not what ninja says and calls."""
    lines = [line.strip() for line in said.splitlines()]
    lines = [line for line in lines if line and " -o " not in line and not NINJA.match(line)]
    told = (line for line in lines if re.search("error: |fatal", line, re.IGNORECASE))
    return next(told, lines[-1] if lines else None)


def _environment(kind: str) -> dict[str, str]:
    """The environment of the build: the ninja wheel's program on the path, where its environment
    may not be activated; messages in English; the GPUs to compile for."""
    path = os.environ.get("PATH", "") + os.pathsep + sysconfig.get_path("scripts")
    changes = {"PATH": path, "LC_ALL": "C.UTF-8", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    if kind == "cuda":
        changes["TORCH_CUDA_ARCH_LIST"] = _architectures()
    return os.environ | changes
