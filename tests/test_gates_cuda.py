"""What every CUDA kernel is compiled to, for each architecture that we build for, with no GPU.

A kernel takes no more registers, shared memory and instructions than its row of GATES says, spills
nothing, touches no local memory, has the instructions that it was written for, and bears as many
threads as it is launched with.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/*/cuda*.cu"))
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
# Of decode's main loop: 64 rows by 256 columns a turn, among 256 threads.
WEIGHTS_A_TURN = 64

DTYPES = {"f": "f32", "d": "f64", "NS_4bf16": "half", "NS_4fp16": "half"}

MATRIX = ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128")
PLAIN = ("FFMA", "LDGSTS.E.BYPASS.128")
WIDE_LOADS, WIDE_STORES = ("LDG.E.128",), ("STG.E.128",)


class Gate(NamedTuple):
    """The most that a kernel takes on any architecture. Registers come in eights; of 65536, blocks
    of 256 threads take 256 times as many each. `slots`: of the main loop, issue slots a weight and
    lane.
    """

    registers: int
    shared: int
    instructions: tuple[str, ...]
    slots: float = 0.0


# By template arguments: dtype (half: bf16 and fp16 alike); of decode, bits, columns that share a
# scale, whether scales are nested, and rows of x.
GATES = {
    "quantize half": Gate(32, 128, WIDE_LOADS),
    "quantize f32": Gate(40, 128, WIDE_LOADS),
    "quantize f64": Gate(40, 128, WIDE_LOADS),
    "quantize_rows half": Gate(32, 32, WIDE_LOADS),
    "quantize_rows f32": Gate(32, 32, WIDE_LOADS),
    "quantize_rows f64": Gate(32, 32, WIDE_LOADS),
    "dequantize half": Gate(32, 64, WIDE_STORES),
    "dequantize f32": Gate(32, 64, WIDE_STORES),
    "dequantize f64": Gate(32, 64, WIDE_STORES),
    "dequantize_rows half": Gate(32, 0, WIDE_STORES),
    "dequantize_rows f32": Gate(32, 0, WIDE_STORES),
    "dequantize_rows f64": Gate(32, 0, WIDE_STORES),
    "decode half 4 64 0 8": Gate(80, 0, MATRIX, 2.9),
    "decode half 4 64 1 8": Gate(80, 0, MATRIX, 3.2),
    "decode half 4 64 0 16": Gate(120, 0, MATRIX, 3.4),
    "decode half 4 64 1 16": Gate(120, 0, MATRIX, 3.7),
    "decode half 4 32 0 8": Gate(96, 0, MATRIX, 3.5),
    "decode half 4 32 1 8": Gate(128, 0, MATRIX, 3.8),
    "decode half 4 32 0 16": Gate(128, 0, MATRIX, 4.2),
    "decode half 4 32 1 16": Gate(128, 0, MATRIX, 4.7),
    "decode half 4 16 0 8": Gate(128, 0, MATRIX, 4.4),
    "decode half 4 16 1 8": Gate(128, 0, MATRIX, 5.0),
    "decode half 4 16 0 16": Gate(128, 0, MATRIX, 5.3),
    "decode half 4 16 1 16": Gate(128, 0, MATRIX, 6.1),
    "decode half 8 64 0 8": Gate(80, 0, MATRIX, 4.1),
    "decode half 8 64 0 16": Gate(96, 0, MATRIX, 4.3),
    "decode f32 4 64 0 4": Gate(128, 0, PLAIN, 8.0),
    "decode f32 4 64 1 4": Gate(128, 0, PLAIN, 8.4),
    "decode f32 4 32 0 4": Gate(128, 0, PLAIN, 9.5),
    "decode f32 4 32 1 4": Gate(128, 0, PLAIN, 10.0),
    "decode f32 4 16 0 4": Gate(120, 0, PLAIN, 11.4),
    "decode f32 4 16 1 4": Gate(128, 0, PLAIN, 12.1),
    "decode f32 8 64 0 4": Gate(128, 0, PLAIN, 8.7),
    "decode_any half": Gate(80, 0, ("FFMA",)),
    "decode_any f32": Gate(80, 0, ("FFMA",)),
    "join half": Gate(32, 0, ("LDG.E",)),
    "join f32": Gate(32, 0, ("LDG.E",)),
}


class Kernel(NamedTuple):
    """What the compiler says, and what the disassembler shows: addresses and instructions."""

    name: str
    architecture: str
    registers: int
    shared: int
    spilled: int
    threads: int  # that a block may have, by __launch_bounds__; 0 without
    code: list[tuple[int, str]]

    def count(self, start: str) -> int:
        return sum(text.startswith(start) for _, text in self.code)

    @property
    def slots(self) -> float:
        """Issue slots a weight and lane of the shortest loop that copies ahead; 0 without one."""
        places = {address: i for i, (address, _) in enumerate(self.code)}
        lengths = []
        for end, (_, text) in enumerate(self.code):
            branch = re.search(r" 0x([0-9a-f]+)", text) if text.startswith("BRA") else None
            begin = places[int(branch[1], 16)] if branch else end
            body = self.code[begin : end + 1]
            if begin < end and any(text.startswith("LDGSTS") for _, text in body):
                lengths.append(len(body))
        return min(lengths, default=0) / WEIGHTS_A_TURN


def find_tool(name, *folders):
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Every kernel on every architecture: one call of the compiler for each file."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = find_tool("nvcc", f"{home}/bin")
    triton = find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    cuobjdump = find_tool("cuobjdump", f"{home}/bin", wheel)
    if not nvcc or not cuobjdump:
        pytest.skip(f"no {'disassembler' if nvcc else 'CUDA compiler'}")
    folder = tmp_path_factory.mktemp("gates")
    return [kernel for source in SOURCES for kernel in compiled(source, nvcc, cuobjdump, folder)]


def compiled(source, nvcc, cuobjdump, folder):
    binary = folder / f"{source.stem}.fatbin"
    command = [nvcc, "-std=c++20", "-O3", "-I", ROOT / "csrc", "-Xptxas", "-v", "-fatbin"]
    command += [f"-gencode=arch={virtual},code={real}" for real, virtual in ARCHITECTURES.items()]
    run = subprocess.run([*command, "-o", binary, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    resources = {
        (mangled, architecture): said
        for mangled, architecture, said in re.findall(
            r"entry function '(\S+)' for '(\S+)'\n(.*?Used .*?)\n", run.stderr, re.DOTALL
        )
    }
    for architecture in ARCHITECTURES:
        show = [cuobjdump, "-arch", architecture, binary]
        code, elf = (
            subprocess.run([*show, what], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-sass", "--dump-elf")
        )
        threads = {}
        for facts in elf.split("\n.nv.info.")[1:]:
            bound = re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+) 0x1 0x1", facts)
            threads[facts.split("\n", 1)[0]] = int(bound[1], 16) if bound else 0
        for function in code.split("Function : ")[1:]:
            mangled = function.split(maxsplit=1)[0]
            said = resources[mangled, architecture]
            code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.+?) *;", function)
            yield Kernel(
                readable(mangled),
                architecture,
                number(r"Used (\d+) registers", said),
                number(r"(\d+) bytes smem", said),
                sum(map(int, re.findall(r"(\d+) bytes (?:spill|stack)", said))),
                threads[mangled],
                [(int(address, 16), instruction) for address, instruction in code],
            )


def launched():
    """How many threads a block of each kernel has, as the sources that start it say."""
    text = "\n".join(path.read_text() for path in ROOT.glob("csrc/*/cuda*"))
    sizes = dict(re.findall(r"constexpr int (k\w*Threads) = (\d+);", text))
    starts = re.findall(r"\blaunch\((\w+)_kernel<.*?dim3\((k\w*Threads)\),", text, re.S)
    return {name: int(sizes[size]) for name, size in starts}


def number(pattern, text):
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def readable(mangled):
    """The kernel's name and its template's arguments, as GATES spells them."""
    name, arguments = re.search(r"\d\d([a-z_]+)_kernelI(.*?)EEv", mangled).groups()
    (dtype,) = (new for old, new in DTYPES.items() if arguments.startswith(old))
    return " ".join([name, dtype, *re.findall(r"L[ib](\d+)E", arguments)])


def test_every_kernel_stays_within_its_row(kernels):
    broken = []
    for kernel in kernels:
        gate = GATES.get(kernel.name)
        if gate is None:
            broken.append(f"{kernel.name} has no row, {kernel[1:5]}, {kernel.slots:.2f}")
            continue
        where = f"{kernel.name} on {kernel.architecture}"
        for what, has, may in (
            ("registers", kernel.registers, gate.registers),
            ("bytes of shared memory", kernel.shared, gate.shared),
            ("bytes spilled", kernel.spilled, 0),
            ("accesses to local memory", kernel.count("LDL") + kernel.count("STL"), 0),
            ("issue slots a weight", kernel.slots, gate.slots),
        ):
            if has > may:
                broken.append(f"{where}: {has:.4g} {what}, at most {may} allowed")
        broken += [f"{where}: no {i}" for i in gate.instructions if not kernel.count(i)]
    assert not broken, "\n".join(broken)


def test_every_row_has_its_kernels(kernels):
    names = Counter(kernel.name for kernel in kernels)
    expected = {name: len(ARCHITECTURES) * (1 + ("half" in name)) for name in GATES}
    assert names == expected


def test_a_block_has_as_many_threads_as_its_kernel_was_compiled_for(kernels):
    """A launch of more fails; one of fewer has registers that it does not use."""
    assert {kernel.name.split()[0]: kernel.threads for kernel in kernels} == launched()
