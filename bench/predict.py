"""`peftkern bench --predict DEVICE`: the floors of a GPU's rows, from datasheets and machine code.

    floor = max(bytes / bandwidth, operations / matrix rate, weights * slots / issue rate)

Bytes and operations are those of the benchmark's cases. Slots are what the weight's decoding costs,
over all products of the call and, in a product that decodes inside, all tiles of rows: counted in
what nvcc makes of decode where there is a toolkit, else the most that the gates of the tests allow,
as always for Triton's kernels. No launch is in it, no cache, no other kernel of the call: what runs
takes longer. All of it is predicted, and no table of measured rows takes it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import ceil
from pathlib import Path
from unittest import mock

import torch

from peftkern.kernels import qlora_paths as paths

from . import qlora_gpu, sass
from .layers import Case
from .machine import commit_info
from .predict_data import DEVICES, SLOTS, Device, goals
from .table import print_table

LABEL = "predicted, not measured"
KIND = "peftkern prediction"
DECODE_SOURCE = Path(__file__).resolve().parents[1] / "csrc/qlora/cuda_decode.cu"
STATED = "the tests' gates"
HEADINGS = (
    "case", "path", "predicted MB", "predicted GFLOP", "predicted slots / weight", "slots from",
    "predicted µs: memory", "predicted µs: matrix", "predicted µs: issue", "predicted floor µs",
    "predicted bound", "goal",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """Of one case. `slots`: issue slots a weight and lane, of the whole call."""

    case: str
    direction: str
    path: str
    bytes: int
    operations: int
    slots: float
    slots_from: str
    memory_us: float
    matrix_us: float
    issue_us: float
    goal: str = ""
    label: str = LABEL

    @property
    def group(self) -> str:
        """That of the measured rows."""
        return f"qlora linear, {self.direction}: {self.case}"

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        return max(self._times, key=self._times.__getitem__)

    @property
    def floor_us(self) -> float:
        return max(self._times.values())

    @property
    def _times(self) -> dict[str, float]:
        return {"memory": self.memory_us, "matrix": self.matrix_us, "issue": self.issue_us}


def predict(name: str, counted: Mapping[str, float] | None = None) -> list[Prediction]:
    """The rows of qlora_gpu.py on a device of DEVICES.

    Args:
        counted: issue slots a weight by kernel; None: from the machine code, where there are tools.

    Raises:
        ValueError: a device that is not there.
        RuntimeError: nvcc refuses the kernel.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name}")
    device = DEVICES[name]
    counted = count(device.target) if counted is None else counted
    forward = (*qlora_gpu.DECODE, *qlora_gpu.DECODE_LORA, *qlora_gpu.BETWEEN)
    cases = [*((case, 1) for case in forward), *((case, 2) for case in qlora_gpu.TRAIN)]
    # The committed tables alone, as on the device: what a user has measured holds for another.
    on_device = {"architecture": lambda _: device.architecture, "_own": lambda _: {}}
    with mock.patch.multiple(paths, **on_device):
        return [_row(case, products, name, counted) for case, products in cases]


def count(target: str) -> dict[str, float]:
    """Issue slots a weight in decode's kernels, by name; none without toolkit or source."""
    nvcc, cuobjdump = sass.tools()
    if not nvcc or not cuobjdump or not DECODE_SOURCE.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        kernels = sass.compiled(DECODE_SOURCE, nvcc, cuobjdump, Path(folder), [target])
        return {kernel.name: kernel.slots for kernel in kernels}


def _row(case: Case, products: int, name: str, counted: Mapping[str, float]) -> Prediction:
    device, work = DEVICES[name], case.work(products)
    path, kernel, passes = _way(case)  # of x's gradient too: training has too many rows for decode
    slots = products * passes * counted.get(kernel, SLOTS[kernel])
    size = work.read + work.written
    return Prediction(
        case.name,
        "forward" if products == 1 else "forward+backward",
        path,
        size,
        work.flops,
        slots,
        f"SASS of {device.target}" if kernel in counted else STATED,
        1e6 * size / device.bandwidth,
        1e6 * work.flops / device.matrix,
        1e6 * case.outputs * case.inputs * slots / device.issue,
        "; ".join(_goals(case, size, device)) if name == "h200" else "",
    )


def _way(case: Case) -> tuple[str, str, int]:
    """The path, the kernel that decodes there, and how often it decodes each weight."""
    device = torch.device("cuda")  # by name alone
    path = paths.choose(device, case.dtype, case.rows, 1, 4, decodes=True)
    if path == "decode":
        return path, f"decode half 4 64 0 {8 if case.rows <= 8 else 16}", 1
    if path == "panels":
        return path, "panel", 1
    tile = paths.tile("gemm", device, case.dtype, case.rows)
    return path, f"gemm {tile.rows}", ceil(case.rows / tile.rows)


def _goals(case: Case, size: int, device: Device) -> Iterator[str]:
    for goal in goals(case):
        most = 1e6 * size / (goal.share * device.bandwidth) if goal.share else 0
        yield goal.text + f": {most:.3g} µs" * bool(most)


def cells(row: Prediction) -> tuple[str, ...]:
    """The row's line under `HEADINGS`."""
    times = row.memory_us, row.matrix_us, row.issue_us, row.floor_us
    return (
        row.case,
        row.path,
        f"{row.bytes / 1e6:.4g}",
        f"{row.operations / 1e9:.4g}",
        f"{row.slots:.3g}",
        row.slots_from,
        *(f"{time:.4g}" for time in times),
        row.bound,
        row.goal,
    )


def show(name: str, rows: Sequence[Prediction]) -> None:
    """Prints a table for each direction, and where the device's rates come from."""
    for direction, some in groupby(rows, key=lambda row: row.direction):
        lines = [cells(row) for row in some]
        used = [i for i in range(len(HEADINGS)) if any(line[i] for line in lines)]
        title = f"{LABEL}: qlora linear, {direction}, on {name}"
        print_table(title, [HEADINGS[i] for i in used], [[line[i] for i in used] for line in lines])
    print(f"{name}: {DEVICES[name].source}")


def save(name: str, rows: Sequence[Prediction], path: Path) -> None:
    """As JSON of a kind of its own: what reads measured rows cannot take it for some."""
    derived = ("group", "floor_us", "bound")
    facts = {
        "kind": KIND,
        "label": LABEL,
        "device": {"name": name, **DEVICES[name]._asdict()},
        "commit": commit_info()["id"][:12],
        "predictions": [asdict(row) | {key: getattr(row, key) for key in derived} for row in rows],
    }
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
