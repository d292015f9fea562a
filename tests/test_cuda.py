"""What of the CUDA kernels can be tried without a GPU: that they compile for those of data centres,
and that they compute the right numbers when the CPU plays the GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from cxr import build

TESTS = Path(__file__).parent
SOURCE = next(path for path in build._sources("cuda") if path.suffix == ".cu")
INCLUDES = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{SOURCE.parent}"]
NVCC = shutil.which("nvcc", path=f"{os.environ.get('PATH')}{os.pathsep}/usr/local/cuda/bin")
HOT = ("mod_act_kernel", "mod_act_bwd_kernel", "fir_mod_act_bwd_kernel", "blur_kernel")


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_kernels_compile_for_data_centre_gpus_and_stay_in_registers(tmp_path):
    command = [NVCC, "-c", SOURCE, "-o", tmp_path / "cuda.o", "-std=c++20", *build.FLAGS["cuda"]]
    command += [*cpp_extension.COMMON_NVCC_FLAGS, *INCLUDES, "-Xptxas", "-v"]
    for arch in ("80", "90", "100"):
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = r"entry function '(\S+)' for '(\S+)'[^']*? (\d+) bytes spill stores"
    found = re.findall(pattern, done.stderr)
    assert {arch for _, arch, _ in found} == {"sm_80", "sm_90", "sm_100"}
    for hot in HOT:
        spills = {(name, arch): n for name, arch, n in found if hot in name}
        assert spills and not any(int(n) for n in spills.values()), spills


def on_the_cpu(source: str) -> str:
    """cuda.cu as C++: registered for the CPU, launched through the emulation."""
    source = source.replace("<cuda_runtime.h>", f'"{TESTS / "emulated_cuda.h"}"')
    source = source.replace("(cxrgan, CUDA, m)", "(cxrgan, CPU, m)")
    source = re.sub(r"\n.*DeviceGuard.*;", "", source)
    launch = re.compile(r"  void\* stream = nullptr;.*?cudaGetErrorString\(error\)\);\n", re.DOTALL)
    return launch.sub("  emulated::launch(kernel, grid, block, P(arguments)...);\n", source)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_kernels_agree_with_the_reference_when_the_cpu_plays_the_gpu(tmp_path):
    source, library = tmp_path / "cuda.cpp", tmp_path / "cuda.so"
    source.write_text(on_the_cpu(SOURCE.read_text()))
    (tmp_path / "cuda_pipeline_primitives.h").touch()  # emulated, too
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", build.ABI, source, *INCLUDES]
    command += [f"-I{tmp_path}"]
    command += [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", library]
    subprocess.run(command, check=True)
    code = f"""
import sys
import pytest
import torch
from cxr import build, ops
torch.ops.load_library({str(library)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("cxrgan::fir", "CPU")
build._status = "native", "emulated"
tests = "(fp64_autograd or convolution or larger or empty or one_noise or beyond) and not reference"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", tests, "tests/test_ops.py"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
