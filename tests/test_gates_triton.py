"""Static gates: what every Triton kernel compiles to, for GPUs that need not be there.

A bound holds for all releases of Triton from 3.6 on and for all three architectures: it lies some
way above what was measured, and a drop past it is to be seen.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from peftkern.bench.predict_data import DEVICES, SLOTS

triton = pytest.importorskip("triton", reason="needs triton")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
pytestmark = pytest.mark.skipif(
    not all((TOOLS / name).exists() for name in ("cuobjdump", "nvdisasm")),
    reason="needs the tools of Triton's wheel",
)

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm80", "sm90", "sm100")

# Instructions, as the start of a name in SASS; of a matrix unit: mma, wgmma and tcgen05.
MATRIX = {"sm80": r"HMMA", "sm90": r"HGMMA", "sm100": r"UTCHMMA"}
SMALL_MATRIX = r"HMMA"  # the first side is the rank, too short for the others
EXACT = r"FFMA"  # float32 is multiplied as float32
COPY = r"LDGSTS\S*\.128"  # cp.async of 16 bytes: loads that are under way while others are used
COPY_CODES = r"LDGSTS\.E(\.64)?$"  # a row has few words of them in a step
READ = r"LDG\S*\.128"
WRITE = r"STG\S*\.128"
COUNT = r"POPC"  # the bits of a word in one instruction


class Gate(NamedTuple):
    """At most so many registers, bytes of shared memory and of stack; these instructions."""

    registers: int
    shared: int
    instructions: tuple = ()
    stack: int = 0


KB = 1024
# By kernel, and before that by case and kernel; the cases are those of triton_cases.py.
GATES = {
    # Eight bytes spill, here for sm100 in Triton 3.9, and in the other row with a stack for sm80 in
    # Triton 3.6.
    "down_kernel": Gate(128, 48 * KB, (MATRIX, COPY, WRITE), stack=8),
    "sum_kernel": Gate(64, 0, (READ, WRITE)),
    "gemm_kernel": Gate(200, 80 * KB, (MATRIX, COPY, WRITE)),
    "gemm_kernel over rows": Gate(232, 80 * KB, (MATRIX, COPY, WRITE)),
    "lora_bwd_kernel": Gate(184, 72 * KB, (MATRIX, COPY, WRITE)),
    "grad_a_kernel": Gate(168, 64 * KB, (SMALL_MATRIX, COPY, WRITE)),
    "finish_kernel": Gate(64, 4 * KB, (READ,)),
    "panel_kernel": Gate(80, 8 * KB, (WRITE,)),
    "siblings_down_kernel": Gate(232, 72 * KB, (MATRIX, COPY, WRITE)),
    "siblings_sum_kernel": Gate(64, 0, (READ, WRITE)),
    "grad_weight_kernel": Gate(192, 100 * KB, (MATRIX, COPY, WRITE)),
    "linear_kernel": Gate(232, 72 * KB, (MATRIX, COPY, WRITE)),
    "project_kernel": Gate(176, 72 * KB, (MATRIX, COPY, WRITE)),
    "activate_kernel": Gate(64, 0, (READ, WRITE)),
    "expand_kernel": Gate(168, 72 * KB, (MATRIX, COPY, WRITE)),
    "linear_bwd_kernel": Gate(232, 72 * KB, (MATRIX, COPY, WRITE)),
    "grad_hidden_kernel": Gate(96, 8 * KB, (READ, WRITE)),
    "grad_x_kernel": Gate(168, 72 * KB, (MATRIX, COPY, WRITE)),
    "grad_up_kernel": Gate(255, 88 * KB, (MATRIX, COPY, WRITE)),
    # Spills for sm80: some in Triton 3.6, and more where there is a norm's gradient to be made.
    "grad_down_kernel": Gate(255, 104 * KB, (MATRIX, COPY, WRITE), stack=128),
    "statistics_kernel": Gate(80, KB, (READ,)),
    "norm_sums_kernel": Gate(64, KB, (READ,)),
    # All registers that so many lanes can have: a matrix lies in them.
    "moments_kernel": Gate(128, KB),
    "moments_parts_kernel": Gate(64, KB),
    "quantize_kernel": Gate(72, KB, (READ, WRITE)),
    "quantize_sums_kernel": Gate(184, KB),
    "quantize_bwd_kernel": Gate(80, KB, (READ, WRITE)),
    "encode_kernel": Gate(64, 4 * KB, (READ,)),
    "pack_kernel": Gate(48, 4 * KB),
    "unpack_kernel": Gate(56, 4 * KB),
    "packed_linear_kernel": Gate(232, 64 * KB, (MATRIX, COPY, COPY_CODES, WRITE)),
    "start_kernel": Gate(80, 8 * KB, (READ, WRITE)),
    "sddmm_kernel": Gate(208, 104 * KB, (MATRIX, COPY)),
    # Adds to what is there, all of a tile's at once; in all of a lane's registers, and for sm100 in
    # more. Of a convolution the rows of the gradient alone are copied ahead.
    ("sampled by a bitmap", "sddmm_kernel"): Gate(255, 104 * KB, (MATRIX, COPY, COUNT), stack=96),
    "conv2d_sddmm_kernel": Gate(255, 72 * KB, (MATRIX, COPY), stack=32),
    "gather_kernel": Gate(80, 4 * KB),
    "scatter_kernel": Gate(72, KB),
    "few_kernel": Gate(48, 2 * KB),
    "dense_kernel": Gate(88, KB),
    "adamw_kernel": Gate(216, KB),
    "tile_counts_kernel": Gate(80, 4 * KB, (READ, COUNT)),
    "columns_kernel": Gate(64, KB, (COUNT,)),
    ("sparse, a bitmap", "scatter_kernel"): Gate(56, KB, (COUNT,)),
    ("packed AdamW, a bitmap", "adamw_kernel"): Gate(184, KB, (COUNT,)),
    ("sampled, float32", "sddmm_kernel"): Gate(152, 20 * KB, (EXACT, COPY)),
    ("nested, many rows", "gemm_kernel"): Gate(232, 64 * KB, (MATRIX, COPY, WRITE), stack=8),
    ("nested, many rows", "gemm_kernel over rows"): Gate(232, 64 * KB, (MATRIX, COPY, WRITE)),
    ("plain, float32", "down_kernel"): Gate(64, 8 * KB, (EXACT, COPY)),
    ("plain, float32", "gemm_kernel"): Gate(128, 12 * KB, (EXACT, COPY, WRITE)),
    ("plain, float32", "gemm_kernel over rows"): Gate(255, 12 * KB, (EXACT, COPY, WRITE)),
    ("plain, float32", "lora_bwd_kernel"): Gate(128, 20 * KB, (EXACT, COPY, WRITE)),
    ("plain, float32", "grad_a_kernel"): Gate(224, 24 * KB, (EXACT, COPY, WRITE)),
    ("bottleneck, float32", "linear_kernel"): Gate(96, 16 * KB, (EXACT, COPY, WRITE)),
    ("bottleneck, float32", "linear_bwd_kernel"): Gate(96, 16 * KB, (EXACT, COPY, WRITE)),
    ("bottleneck, float32", "grad_up_kernel"): Gate(128, 20 * KB, (EXACT, COPY, WRITE)),
    ("bottleneck, float32", "grad_down_kernel"): Gate(96, 16 * KB, (EXACT, COPY, WRITE)),
    ("latents of 4 bits", "quantize_kernel"): Gate(128, KB, (READ, WRITE)),
    ("codes of 4 bits", "encode_kernel"): Gate(64, 4 * KB),
    ("packed, many rows", "unpack_kernel"): Gate(56, 4 * KB, (WRITE,)),
    ("packed, float32", "packed_linear_kernel"): Gate(160, 16 * KB, (EXACT, COPY, WRITE)),
    ("int8, few rows", "gemm_kernel"): Gate(200, 96 * KB, (MATRIX, COPY, WRITE)),
    ("int8, few rows", "gemm_kernel over rows"): Gate(255, 96 * KB, (MATRIX, COPY, WRITE)),
}
# The rare ways have the whole of a multiprocessor to themselves. Where rows start anywhere, each
# number is read by itself, from an address of its own.
RARE_GATES = {
    "experts": Gate(255, 112 * KB),
    "mixed adapters": Gate(255, 112 * KB),
    "uneven": Gate(255, 160 * KB, stack=2 * KB),
    "bottleneck with a norm": Gate(255, 112 * KB),
    "bottleneck, uneven": Gate(255, 160 * KB, stack=2 * KB),
    "packed, uneven": Gate(255, 64 * KB, stack=KB),
    "sampled, uneven": Gate(255, 96 * KB),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What triton_gates.py says."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(folder),
        "PEFTKERN_TILES": str(folder / "none.json"),  # the committed tiles alone
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("triton_gates.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def records(compiled):
    """One for every launch of every case."""
    return compiled["records"]


def name_of(record):
    return record["kernel"] + " over rows" * record["switches"].get("OVER_ROWS", False)


def gate_of(record):
    case, name = record["case"], name_of(record)
    return RARE_GATES.get(case) or GATES.get((case, name)) or GATES[name]


def faults(record, gate):
    """What the compiled kernel has too much of, or lacks."""
    for what in ("registers", "shared", "stack"):
        if record[what] > getattr(gate, what):
            yield f"{what}: {record[what]} are more than {getattr(gate, what)}"
    for wanted in gate.instructions:
        pattern = wanted if isinstance(wanted, str) else wanted[record["architecture"]]
        if not any(re.match(pattern, name) for name in record["instructions"]):
            yield f"no {pattern}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_stays_within_its_gate(records, architecture):
    found = {
        f"{record['case']}: {name_of(record)}: {fault}"
        for record in records
        if record["architecture"] == architecture
        for fault in faults(record, gate_of(record))
    }
    assert not found, "\n".join(sorted(found))


def test_every_kernel_has_a_gate_and_every_gate_a_kernel(records):
    written = set()
    for file in (ROOT / "kernels").glob("*.py"):
        written |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M))
    for architecture in ARCHITECTURES:
        assert {r["kernel"] for r in records if r["architecture"] == architecture} == written
    names = {name for r in records for name in (r["case"], name_of(r), (r["case"], name_of(r)))}
    assert {*GATES, *RARE_GATES} <= names


def test_no_weight_takes_more_slots_than_the_prediction_states(records):
    """Of those devices: in the product's main loop, or in a panel's kernel, which has none."""
    found, names = [], {"gemm_kernel": "gemm {BLOCK_M}", "panel_kernel": "panel"}
    for record in records:
        if not re.match(r"plain, \d+ rows", record["case"]) or record["kernel"] not in names:
            continue
        if record["architecture"] not in {device.architecture for device in DEVICES.values()}:
            continue
        switches = record["switches"]
        weights = switches["BLOCK_N"] * switches["BLOCK_K"] / record["lanes"]
        found.append((names[record["kernel"]].format(**switches), record["turn"] / weights))
    assert {name for name, _ in found} == {name for name in SLOTS if not name.startswith("decode")}
    assert [f"{name}: {slots:.2f}" for name, slots in found if slots > SLOTS[name]] == []


def test_another_number_of_rows_or_another_dropout_compiles_nothing_anew(compiled):
    """Each of them would stop a training step for seconds."""
    first, *others = compiled["variants"].values()
    assert len(first) > 5
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"registers": 255}, "registers: 255 are more than 184"),
        ({"shared": 200 * KB}, "shared: 204800 are more than 73728"),
        ({"stack": 16}, "stack: 16 are more than 0"),
        ({"instructions": {"HMMA.16816.F32": 8, "LDGSTS.E.BYPASS.128": 8}}, r"no STG\S*\.128"),
        ({"architecture": "sm90"}, "no HGMMA"),
    ],
)
def test_a_gate_closes(change, fault):
    instructions = {"HMMA.16816.F32": 8, "LDGSTS.E.BYPASS.128": 8, "STG.E.128": 4}
    record = {
        "architecture": "sm80", "case": "nested, few rows", "kernel": "lora_bwd_kernel",
        "switches": {}, "registers": 100, "shared": KB, "stack": 0, "instructions": instructions,
    }  # fmt: skip
    assert list(faults(record, gate_of(record))) == []
    assert list(faults(record | change, gate_of(record))) == [fault]
