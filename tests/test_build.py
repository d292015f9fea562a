"""The loader, on a library of one function that registers nothing."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from cxr import CxrError, UsageError, build, console, files

ROOT = Path(build.__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)

TORCHS_BUILD = build.BUILD
BUILD = """
import json, os, subprocess, sys
options = json.loads(sys.argv[1])
command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", *options["sources"]]
sys.exit(subprocess.run([*command, "-o", options["name"] + ".so"]).returncode)
"""  # as torch's, whose import takes seconds


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A folder of sources and an empty cache; nothing loaded, nothing said."""
    folder = tmp_path / "package" / "kernels"
    folder.mkdir(parents=True)
    (folder / "one.cpp").write_text('extern "C" int cxrgan_one() { return 1; }\n')
    monkeypatch.setattr(build, "PACKAGE", folder.parent)
    monkeypatch.setattr(build, "BUILD", BUILD)
    monkeypatch.setattr(build, "_status", None)
    monkeypatch.setattr(build, "_kinds", lambda: ["cpu"])
    monkeypatch.setenv("CXRGAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("CXRGAN_KERNELS", raising=False)
    return folder


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


@pytest.fixture
def compiler_calls(monkeypatch) -> list:
    calls, run = [], build._run_compiler
    monkeypatch.setattr(build, "_run_compiler", lambda *a: calls.append(a) or run(*a))
    return calls


def load_again(monkeypatch) -> tuple[str, str]:
    """As a new process would."""
    monkeypatch.setattr(build, "_status", None)
    return build.load()


def cached(tmp_path) -> list[str]:
    """What the cache holds besides locks."""
    kinds = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    return [kind for kind in kinds if kind != ".lock"]


def test_off_loads_nothing_and_says_so(sources, said, monkeypatch):
    monkeypatch.setenv("CXRGAN_KERNELS", "off")
    assert build.load() == build.status() == ("reference", "CXRGAN_KERNELS=off")
    assert not said


def test_another_word_is_refused(sources, monkeypatch):
    monkeypatch.setenv("CXRGAN_KERNELS", "fast")
    with pytest.raises(UsageError, match="auto, off or require"):
        build.load()


def test_without_a_compiler_one_line_says_what_is_used_and_why(sources, said, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    path, reason = build.load()
    assert path == "reference" and "no-such-compiler" in reason
    assert len(said) == 1 and reason in said[0]
    build.load()
    assert len(said) == 1


def test_require_fails_without_a_compiler(sources, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CXRGAN_KERNELS", "require")
    with pytest.raises(CxrError, match="no-such-compiler"):
        build.load()


def test_missing_sources_fall_back(sources, said):
    shutil.rmtree(sources)
    path, reason = build.load()
    assert path == "reference" and "sources are missing" in reason


@needs_compiler
def test_compiles_once_and_again_when_the_source_changes(
    sources, said, compiler_calls, tmp_path, monkeypatch
):
    assert build.load()[0] == "native" and "compiled now" in build.status()[1]
    assert "compiled earlier" in load_again(monkeypatch)[1]
    assert len(compiler_calls) == 1 and cached(tmp_path) == [".so"]
    (sources / "one.cpp").write_text('extern "C" int cxrgan_one() { return 2; }\n')
    assert "compiled now" in load_again(monkeypatch)[1]
    assert len(compiler_calls) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_cached_library_is_rebuilt(
    sources, said, compiler_calls, tmp_path, monkeypatch, damage
):
    with monkeypatch.context() as patch:
        patch.setattr(build, "_loads", lambda path: True)  # what is loaded may not be changed
        build.load()
    (entry,) = (tmp_path / "cache").glob("*.so")
    whole = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(whole[: len(whole) // 2])
    else:  # whole, and yet no library of this machine
        other = b"not a library"
        entry.write_bytes(other + build.hashlib.sha256(other).digest())
    assert "compiled now" in load_again(monkeypatch)[1]
    assert len(compiler_calls) == 2 and build._intact(entry)


@needs_compiler
def test_a_failed_build_is_remembered_until_the_source_changes(
    sources, said, compiler_calls, tmp_path, monkeypatch
):
    (sources / "one.cpp").write_text("int broken(\n")
    path, reason = build.load()
    assert path == "reference" and "error:" in reason and "\n" not in reason
    path, again = load_again(monkeypatch)
    assert path == "reference" and reason in again and len(compiler_calls) == 1
    assert cached(tmp_path) == [".failed"]
    (sources / "one.cpp").write_text('extern "C" int cxrgan_one() { return 3; }\n')
    assert load_again(monkeypatch)[0] == "native"


@needs_compiler
def test_without_ninja_the_reason_says_so(sources, said, tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("c++", "as", "ld"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(programs))
    path, reason = build.load()
    assert path == "reference" and "ninja" in reason.lower()
    monkeypatch.undo()
    assert cached(tmp_path) == []  # once ninja is there, the build is tried


@needs_compiler
def test_without_a_cache_that_can_be_written_the_temporary_folder_serves(
    sources, said, compiler_calls, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CXRGAN_CACHE", str(tmp_path / "file" / "cache"))
    assert str(tmp_path / "tmp") in build.load()[1]
    assert "compiled earlier" in load_again(monkeypatch)[1] and len(compiler_calls) == 1


@pytest.mark.parametrize("harm", ["owner", "writable folder", "writable file", "link"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(
    sources, said, tmp_path, monkeypatch, harm
):
    loaded = []
    monkeypatch.setattr(build, "_loads", lambda path: loaded.append(path) or True)
    monkeypatch.setattr(build, "_compile", lambda kind, sources, entry: str(entry))
    entry = Path(build.load()[1].removeprefix("cpu: "))
    data = b"a library"
    entry.write_bytes(data + build.hashlib.sha256(data).digest())
    assert "compiled earlier" in load_again(monkeypatch)[1] and loaded == [entry]
    if harm == "owner":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        monkeypatch.setattr(files, "ROOT", 12346)
    elif harm == "link":
        entry.rename(tmp_path / "elsewhere.so")
        entry.symlink_to(tmp_path / "elsewhere.so")
    else:
        (entry if harm == "writable file" else entry.parent).chmod(0o777)
    assert load_again(monkeypatch)[0] == "native" and loaded == [entry]


@needs_compiler
def test_a_library_built_ahead_of_time_comes_first(sources, said, compiler_calls, tmp_path):
    built = tmp_path / "built.so"
    subprocess.run(["c++", "-shared", "-fPIC", sources / "one.cpp", "-o", built], check=True)
    shutil.copy(built, build.ahead_of_time("cpu", build._sources("cpu")))
    assert build.load()[0] == "native" and "ahead of time" in build.status()[1]
    assert not compiler_calls


@needs_compiler
def test_two_processes_at_once_both_get_their_kernels(sources, tmp_path):
    killed = tmp_path / "cache" / ".killed__.draft"
    killed.mkdir(parents=True)
    code = (
        "import pathlib; from cxr import build;"
        f"build.PACKAGE = pathlib.Path({str(sources.parent)!r}); build.BUILD = {BUILD!r};"
        "build._kinds = lambda: ['cpu']; print(build.load())"
    )
    command = [sys.executable, "-c", code]
    pair = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "12"]
    answers = [process.communicate()[0] for process in pair]
    assert all("'native'" in answer for answer in answers)
    assert sum("compiled now" in answer for answer in answers) == 1
    assert cached(tmp_path) == [".so"] and not killed.exists()


@needs_compiler
@pytest.mark.parametrize("program", ["", "echo fake 1.0"])
def test_a_compiler_that_is_silent_or_fails_without_a_word_is_named_so(
    sources, said, tmp_path, monkeypatch, program
):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && {{ {program or "true"}; exit 0; }}\nexit 3\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    path, reason = build.load()
    assert path == "reference" and "said nothing" in reason and "-march" not in reason


@needs_compiler
def test_torch_compiles_with_a_compiler_of_several_words(sources, said, monkeypatch):
    monkeypatch.setattr(build, "BUILD", TORCHS_BUILD)
    monkeypatch.setenv("CXX", "env c++")
    assert build.load()[0] == "native"
    monkeypatch.setenv("CXX", "env 'c++")
    with pytest.raises(build._Unavailable, match="a quote is not closed"):
        build._compiler("cpu")


def test_a_compiler_that_hangs_is_ended_with_all_its_children(tmp_path):
    os.mkfifo(tmp_path / "waits")
    script = f"(read x < {tmp_path}/waits; echo late > {tmp_path}/late) & read y < {tmp_path}/waits"
    with pytest.raises(subprocess.TimeoutExpired):
        build._run(["sh", "-c", script], 0.2)
    for _ in range(100):  # what is killed takes a moment to end
        try:
            os.close(os.open(tmp_path / "waits", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads: the grandchild, too, has ended
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild still reads")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[1/2] c++ -c a.cpp -o a.o\nFAILED: a.o \nc++ -c a.cpp -o a.o\na.cpp:1:2: error: no ;", "a.cpp:1:2: error: no ;"),
        ("Error building extension 'x': [1/2] nvcc -o a\nnvcc fatal   : no GPU\nninja: build stopped", "nvcc fatal   : no GPU"),
        ("[2/2] c++ a.o -o a.so\n/usr/bin/ld: cannot find -lc10\nninja: build stopped", "/usr/bin/ld: cannot find -lc10"),
        ("FAILED: a.o\nninja: build stopped: subcommand failed.", None),
    ],
)  # fmt: skip
def test_the_reason_of_a_failed_build_is_the_compilers_first_error(said, reason):
    assert build._first_error(said) == reason


def test_a_gpu_without_its_compiler_leaves_the_cpu_its_kernels(sources, said, monkeypatch):
    (sources / "one.cu").touch()
    monkeypatch.setattr(build, "_kinds", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(build, "_load_native", lambda kind: kind == "cpu" or fail())
    path, reason = build.load()
    assert path == "partly native" and "cuda: no nvcc" in reason
    assert len(said) == 1 and "cuda: no nvcc" in said[0]


def fail():
    raise build._Unavailable("no nvcc")


def test_a_library_for_most_processors_is_left_alone_by_the_others(sources, said, monkeypatch):
    build.ahead_of_time("cpu", build._sources("cpu")).write_bytes(b"not for this processor")
    monkeypatch.setattr(build, "X86", True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(build, "_loads", lambda path: pytest.fail(f"loads {path}"))
    monkeypatch.setattr(build, "_compile", lambda *_: "compiled now")
    assert build.load() == ("native", "cpu: compiled now")


def test_setup_builds_what_the_loader_looks_for(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (extension, *_) = build.extensions()
    assert extension.name == f"cxr.{build.ahead_of_time('cpu', build._sources('cpu')).stem}"
    assert [Path(source).name for source in extension.sources] == ["cpu.cpp", "cpu_norm.cpp"]
    assert "-march=native" not in extension.extra_compile_args["cxx"]
