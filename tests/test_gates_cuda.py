"""What every CUDA kernel is compiled to, for each architecture that we build for, with no GPU.

A kernel takes no more registers, shared memory and instructions than its row of GATES says, spills
nothing, touches no local memory, has the instructions that it was written for, and bears as many
threads as it is launched with.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from peftkern.bench import sass
from peftkern.bench.predict_data import SLOTS

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("*/cuda*.cu"))

MATRIX = ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128")
PLAIN = ("FFMA", "LDGSTS.E.BYPASS.128")
SUMS = ("LDG.E.128", "FFMA", "SHFL.BFLY")
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
# scale, whether scales are nested, and rows of x; of onebit's bits, bits and rows of x.
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
    "bits half 1 8": Gate(96, 0, MATRIX, 1.25),
    "bits half 1 16": Gate(128, 0, MATRIX, 1.65),
    "bits half 2 8": Gate(104, 0, MATRIX, 2.6),
    "bits half 4 8": Gate(80, 0, MATRIX, 2.6),
    "bits half 4 16": Gate(128, 0, MATRIX, 2.9),
    "bits f32 1 4": Gate(128, 0, PLAIN, 7.1),
    "bits f32 2 4": Gate(128, 0, PLAIN, 10.3),
    "bits f32 4 4": Gate(120, 0, PLAIN, 7.3),
    "bits_any half": Gate(64, 0, ("FFMA",)),
    "bits_any f32": Gate(64, 0, ("FFMA",)),
    "bits_join half": Gate(32, 0, ("LDG.E",)),
    "bits_join f32": Gate(32, 0, ("LDG.E",)),
    "join half": Gate(32, 0, ("LDG.E",)),
    "join f32": Gate(32, 0, ("LDG.E",)),
    "turn half": Gate(40, 8448, ("STS", "LDS", "STG.E")),
    "turn f32": Gate(40, 8448, ("STS", "LDS", "STG.E")),
    "sample half": Gate(64, 0, SUMS),
    "sample f32": Gate(64, 0, SUMS),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Every kernel on every architecture: one call of the compiler for each file."""
    nvcc, cuobjdump = sass.tools()
    if not nvcc or not cuobjdump:
        pytest.skip(f"no {'disassembler' if nvcc else 'CUDA compiler'}")
    folder = tmp_path_factory.mktemp("gates")
    return [k for source in SOURCES for k in sass.compiled(source, nvcc, cuobjdump, folder)]


def launched():
    """How many threads a block of each kernel has, as the sources that start it say."""
    text = "\n".join(path.read_text() for path in CSRC.glob("*/cuda*"))
    sizes = dict(re.findall(r"constexpr int (k\w*Threads) = (\d+);", text))
    starts = re.findall(r"\blaunch\((\w+)_kernel<.*?dim3\((k\w*Threads)\),", text, re.S)
    return {name: int(sizes[size]) for name, size in starts}


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
    expected = {name: len(sass.ARCHITECTURES) * (1 + ("half" in name)) for name in GATES}
    assert names == expected


def test_the_prediction_states_what_the_gates_allow():
    stated = {name: slots for name, slots in SLOTS.items() if name in GATES}
    assert len(stated) == 2
    assert stated == {name: GATES[name].slots for name in stated}


def test_a_block_has_as_many_threads_as_its_kernel_was_compiled_for(kernels):
    """A launch of more fails; one of fewer has registers that it does not use."""
    assert {kernel.name.split()[0]: kernel.threads for kernel in kernels} == launched()
