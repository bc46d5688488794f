"""What a build with CUDA gives: ops that serve torch's GPUs, and bindings that need no toolkit."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from test_build import ROOT, needs, run

import peftkern
from peftkern import _native

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
    decodes = {"qlora_decode", "onebit_decode"}
    ours = {"qlora_quantize", "qlora_dequantize", *decodes, "sparse_sample_"}
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
