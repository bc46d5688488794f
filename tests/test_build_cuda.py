"""Which toolkit a build takes for CUDA, for which GPUs, what it says of that; what comes out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_build import ROOT, needs, run, script  # noqa: F401

import peftkern
from peftkern import _native

TOOLKIT = ROOT / "csrc" / "toolkit.cmake"
ARCHITECTURES = "80 86 89 90 100 103 110 120"
NOTHING = "no CUDA kernels: "

# Which toolkit


def a_toolkit(folder, version="13.0.88", architectures=ARCHITECTURES, error=""):
    """Its nvcc answers what is asked of it, and compiles unless there is an error."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    known = "".join(f"compute_{number}\\n" for number in architectures.split())
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo "Build cuda_{version[:4]}.r, V{version}" ;;
  --list-gpu-arch) printf '{known}' ;;
  *) echo "$@" > "{folder}/asked"; echo "{error}" >&2; test -z "{error}" ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def take(tmp_path, monkeypatch):
    """What CMake decides; it sees no toolkit but the one in CUDA_HOME."""
    cmake, sh = shutil.which("cmake"), shutil.which("sh")
    if cmake is None:
        pytest.skip("no cmake")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sh").symlink_to(sh)
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CUDAHOSTCXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    text = TOOLKIT.read_text().replace("PATHS /usr/local/cuda", f"PATHS {tmp_path}/none")
    (tmp_path / "toolkit.cmake").write_text(text)
    (tmp_path / "ask.cmake").write_text(
        'include(toolkit.cmake)\nmessage(STATUS "TAKEN:${cuda_taken}:${cuda_version}:'
        '${CMAKE_CUDA_COMPILER}:${CMAKE_CUDA_ARCHITECTURES}")\n'
    )

    def ask(choice="auto", **variables):
        found = subprocess.run(
            [cmake, f"-DPEFTKERN_CUDA={choice}", "-DCMAKE_CXX_COMPILER=/a/c++", "-P", "ask.cmake"],
            cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True,
        )  # fmt: skip
        if found.returncode:  # CMake breaks its lines
            return " ".join(found.stderr.split())
        return re.search("TAKEN:(.*)", found.stdout).group(1)

    return ask


def test_what_is_found_is_taken_and_said(take, tmp_path):
    home = a_toolkit(tmp_path / "cuda")
    wanted = (
        "CUDA kernels for sm_80+PTX sm_90a sm_100 sm_120 by nvcc 13.0.88:13.0.88:"
        f"{home}/bin/nvcc:80-real;80-virtual;90a-real;100-real;120-real"
    )
    for choice in ("auto", "on"):
        assert take(choice, CUDA_HOME=str(home)) == wanted
    assert "-ccbin /a/c++ " in (home / "asked").read_text()
    take("on", CUDA_HOME=str(home), CUDAHOSTCXX="/an/older/c++")
    assert "-ccbin /an/older/c++ " in (home / "asked").read_text()
    for there, elsewhere in ((home, None), (a_toolkit(tmp_path / "old", "11.8.89"), home)):
        path = f"{there / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {"CUDA_HOME": str(elsewhere)} if elsewhere else {}
        assert take("auto", PATH=path, **variables) == wanted


def test_an_older_toolkit_compiles_for_the_gpus_that_it_knows(take, tmp_path):
    home = a_toolkit(tmp_path / "cuda", "12.4.131", "75 80 86 89 90")
    assert take(CUDA_HOME=str(home)).startswith("CUDA kernels for sm_80+PTX sm_90a by nvcc 12.4")


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        ("8.6", "sm_86"),
        ("8.0;9.0a+PTX", "sm_80 sm_90a+PTX"),
        ("7.0 7.5 8.0+PTX", "sm_80+PTX"),
        ("Ampere;Hopper", "sm_80 sm_86+PTX sm_90+PTX"),
        ("10.3 12.0", "sm_103 sm_120"),
    ],
)
def test_the_list_of_torch_is_obeyed(take, tmp_path, listed, names):
    home = a_toolkit(tmp_path / "cuda")
    taken = take(CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=listed)
    assert taken.startswith(f"CUDA kernels for {names} by nvcc")
    numbers = re.findall(r"sm_(\w+)(\+PTX)?", names)
    wanted = [f"{n}-{kind}" for n, ptx in numbers for kind in ["real", "virtual"][: 1 + bool(ptx)]]
    assert taken.rpartition(":")[2].split(";") == wanted


@pytest.mark.parametrize(
    ("listed", "error"),
    [
        ("sm_80", "must list versions such as 8.0 and 9.0a+PTX or names from Ampere on, got sm_80"),
        ("8.0 9.9", "must list what nvcc 13.0.88 compiles, got 9.9"),
    ],
)
def test_a_list_that_cannot_be_obeyed_is_refused(take, tmp_path, listed, error):
    home = a_toolkit(tmp_path / "cuda")
    for choice in ("auto", "on"):
        said = take(choice, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=listed)
        assert f"peftkern: TORCH_CUDA_ARCH_LIST {error}" in said


def test_off_does_not_even_look(take, tmp_path):
    home = a_toolkit(tmp_path / "cuda")
    assert take("off", CUDA_HOME=str(home)) == f"{NOTHING}PEFTKERN_CUDA is off:none::"
    assert not (home / "asked").exists()


def test_what_is_missing_is_told_and_where_it_is_insisted_on_stops(take, tmp_path):
    old = a_toolkit(tmp_path / "old", "11.8.89")
    torn = a_toolkit(tmp_path / "torn", error="host_config.h: error: unsupported GNU version!")
    reasons = {
        "nvcc must be in CUDA_HOME, PATH or /usr/local/cuda, got none": {},
        "nvcc must be 12.0 or newer, the first to know C++20, got 'V11.8.89'": {"CUDA_HOME": old},
        "must compile with /a/c++, got 'host_config.h: error: unsupported GNU version!'": {
            "CUDA_HOME": torn
        },
        "TORCH_CUDA_ARCH_LIST must list a version from 8.0 on, got 7.5": {
            "CUDA_HOME": a_toolkit(tmp_path / "cuda"), "TORCH_CUDA_ARCH_LIST": "7.5",
        },
    }  # fmt: skip
    for reason, variables in reasons.items():
        variables = {name: str(value) for name, value in variables.items()}
        taken = take("auto", **variables)
        assert taken.startswith(NOTHING) and reason in taken and taken.endswith(":none::")
        said = take("on", **variables)
        assert f"{reason}" in said and "and PEFTKERN_CUDA is on" in said
    assert "PEFTKERN_CUDA must be on, off or auto, got yes" in take("yes")


def test_the_build_insists_before_it_asks_cmake(script, monkeypatch, tmp_path):  # noqa: F811
    for name in ("PEFTKERN_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert script.need_toolkit() == "auto"
    monkeypatch.setenv("PEFTKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="^peftkern: PEFTKERN_CUDA must be on, off or auto, got y"):
        script.need_toolkit()
    monkeypatch.setenv("PEFTKERN_CUDA", "on")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(script, "TOOLKIT", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="^peftkern: nvcc must be in .* is on, got none: inst"):
        script.need_toolkit()
    monkeypatch.setenv("CUDA_HOME", str(a_toolkit(tmp_path / "cuda")))
    assert script.need_toolkit() == "on"


# What comes out

needs_cuda_build = pytest.mark.skipif(
    "PEFTKERN_LIBRARY" in os.environ or peftkern.info().build.get("cuda", "none") == "none",
    reason="built without CUDA",
)
needs_plain_torch = pytest.mark.skipif(
    bool(torch.version.cuda or torch.version.hip), reason="torch is built for GPUs"
)


@needs_cuda_build
def test_the_build_tells_of_its_toolkit_and_its_gpus():
    from peftkern import _build

    assert re.fullmatch(r"\d+\.\d+\.\d+", _build.cuda)
    assert re.fullmatch(r"sm_\w+(\+PTX)?( sm_\w+(\+PTX)?)*", _build.architectures)
    shown = f"cuda     kernels for {_build.architectures} by nvcc {_build.cuda}"
    assert any(line.startswith(shown) for line in str(peftkern.info()).splitlines())


ASKS = """
import sys, ctypes, torch
for library in sys.argv[1:]:
    ctypes.CDLL(library)
from peftkern import _native
print(*(op for op in _native.references if _native._kernel(op, "cuda") == "CUDA"))
"""


def served_by_cuda(*libraries, **variables):
    """The ops, in a fresh interpreter that has loaded these libraries beside torch."""
    return set(
        run(
            sys.executable, "-W", "ignore", "-c", ASKS, *libraries,
            cwd=ROOT, env=os.environ | variables,
        ).split()
    )  # fmt: skip


@needs_cuda_build
@needs_plain_torch
def test_it_loads_in_a_torch_without_cuda_and_leaves_the_gpu_alone():
    assert served_by_cuda() == set()


@pytest.fixture
def cuda_of_torch(tmp_path):
    """All that our kernels ask torch's CUDA side for: the current stream."""
    name, library = "libtorch_cuda.so", tmp_path / "libtorch_cuda.so"
    (tmp_path / "stream.cpp").write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    )
    run("c++", "-shared", "-fPIC", f"-Wl,-soname,{name}", tmp_path / "stream.cpp", "-o", library)
    return library


@needs("c++")
@needs_cuda_build
@needs_plain_torch
def test_where_torch_has_cuda_its_kernels_serve_it(cuda_of_torch):
    ours = {"qlora_quantize", "qlora_dequantize", "qlora_decode"}
    assert served_by_cuda(cuda_of_torch) == ours
    also_in_triton = ours & _native.launchers.keys()
    assert served_by_cuda(cuda_of_torch, PEFTKERN_TRITON="1") == ours - also_in_triton
    assert "qlora_dequantize" in also_in_triton


# What happens where torch starts CUDA after our import, and where it has before.
OLD_GPU = """
import sys, ctypes, warnings, torch
ctypes.CDLL(sys.argv[1])
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda gpu: [(9, 0), (int(sys.argv[2]), 5)][gpu]
calls = []
torch.cuda._lazy_call = calls.append if sys.argv[3] == "after" else lambda call: call()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from peftkern import _native
    for call in calls:
        call()
print(*(f"{op} {_native._kernel(op, 'cuda')}" for op in sorted(_native.references)), sep="\\n")
print(*(warning.message for warning in said if "peftkern" in str(warning.message)), sep="\\n")
assert _native.serves("qlora_decode", "cuda") == (sys.argv[2] == "8")
"""


@needs("c++")
@needs_cuda_build
@needs_plain_torch
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_gpu_too_old_for_cuda_kernels_has_those_in_triton(cuda_of_torch, order):
    pytest.importorskip("triton")
    lines = run(sys.executable, "-c", OLD_GPU, cuda_of_torch, "7", order, cwd=ROOT).splitlines()
    assert {"qlora_decode reference", "qlora_dequantize Triton", "qlora_linear Triton",
            "qlora_quantize reference"} < set(lines)  # fmt: skip
    (said,) = (line for line in lines if "compute" in line)
    assert said == (
        "peftkern's CUDA kernels need compute capability 8.0, got a GPU of 7.5: those in Triton "
        "run instead"
    )
    lines = run(sys.executable, "-c", OLD_GPU, cuda_of_torch, "8", order, cwd=ROOT).splitlines()
    assert "qlora_decode CUDA" in lines and not any("compute" in line for line in lines)


# All of cuda_runtime.h that the bindings name.
RUNTIME = """
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
typedef struct CUstream_st* cudaStream_t;
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaMemsetAsync(void*, int, unsigned long, cudaStream_t);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
"""


@needs("c++")
@pytest.mark.parametrize(
    "path", sorted((ROOT / "csrc").glob("*/torch_cuda*.cpp")), ids=lambda path: path.name
)
def test_bindings_of_cuda_compile_without_a_toolkit(path, tmp_path):
    """So that breaking them is seen where there is none, and no header of it creeps in."""
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    include = Path(torch.__file__).parent / "include"
    run(
        "c++", "-std=c++20", "-fsyntax-only", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
        "-I", tmp_path, "-I", ROOT / "csrc", "-isystem", include,
        "-isystem", include / "torch/csrc/api/include", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        path,
    )  # fmt: skip


# All of it that launch.h names.
LAUNCHES = """
#pragma once
#include <cstdio>
#include <initializer_list>
struct dim3 { unsigned x; };
enum cudaError_t { cudaSuccess };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return std::printf("%d ", bytes) > 0 ? cudaSuccess : cudaError_t(1);
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Params...), Args...) {
  return cudaSuccess;
}
"""


@needs("c++")
def test_a_kernels_limit_of_shared_memory_is_the_same_for_all_who_launch_it(tmp_path):
    """It is the kernel's, so a thread that lowered it would fail another's launch."""
    (tmp_path / "cuda_runtime.h").write_text(LAUNCHES)
    (tmp_path / "launches.cpp").write_text(
        """#include "common/launch.h"
void kernel(long) {}
int main() {
  for (size_t kilobytes : {48, 64, 99, 80}) {
    peftkern::launch(kernel, dim3{1}, dim3{32}, kilobytes << 10, nullptr, 7);
  }
}"""
    )
    program = tmp_path / "launches"
    run(
        "c++", "-std=c++20", "-I", tmp_path, "-I", ROOT / "csrc", tmp_path / "launches.cpp",
        "-o", program,
    )  # fmt: skip
    assert run(program).split() == [str(99 << 10)] * 3
