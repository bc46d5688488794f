"""The floors of the machine, and what a call costs besides time."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import _native, bench
from peftkern.bench import Contender, Inputs, Work, floors, footprint, machine


def test_floors_are_measured_beside_the_contenders() -> None:
    size = 1 << 20
    inputs = [Inputs((), (torch.rand(size),)) for _ in range(2)]
    work = Work(read=4 * size, written=4 * size)
    rows = bench.measure(
        "toy", "copy", "4 MiB", {"clone": Contender(lambda: torch.clone)}, inputs, torch.clone,
        baseline="clone", work=work, quick=True,
    )  # fmt: skip
    found = {row.contender: row for row in rows}
    assert set(found) == {"clone", "floor: read", "floor: write"}
    clone = found["clone"]
    assert clone.floor and clone.share is not None and 0 < clone.share < 1.5
    assert clone.peak_mib is not None and clone.peak_mib >= 4
    assert clone.unit == found["floor: read"].unit == "GB/s"
    assert len(clone.seconds) == len(found["floor: read"].seconds)


def test_floor_kernels_touch_every_byte() -> None:
    torch.manual_seed(0)
    for words in (0, 1, 7, 8, 1000, 100_003):
        buffer = torch.randint(-(2**62), 2**62, (words,))
        assert int(floors.read(buffer.view(torch.uint8))) == int(buffer.sum())
        guarded = torch.zeros(words + 2, dtype=torch.int64)
        floors.write(guarded[1:-1].view(torch.uint8))
        assert (guarded[1:-1].view(torch.uint8) == 0x3F).all()
        assert guarded[0] == guarded[-1] == 0


def test_footprint_counts_what_is_held_at_once() -> None:
    x = torch.rand(1 << 20)

    def call() -> Tensor:
        y = x + x
        z = y * x
        del y
        return z.relu_()  # two of 4 MiB were held at once; relu_ calls clamp_min_

    call()
    seen = footprint.footprint(call, torch.device("cpu"))
    assert 8 <= seen.peak_mib < 12
    assert (seen.allocations, seen.dispatched) == (2, 4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts pages on Linux only")
def test_footprint_counts_what_threads_keep_between_calls() -> None:
    kept = threading.local()

    def call() -> Tensor:
        if not hasattr(kept, "scratch"):
            kept.scratch = bytearray(b"1") * (64 << 20)
        return torch.zeros(1)

    call()
    peak = footprint.footprint(call, torch.device("cpu")).peak_mib
    assert 63 <= peak < 80, "64, within what the system counts per core and adds up later"


def test_a_run_held_to_a_lesser_instruction_set_says_so() -> None:
    first, *others = _native.available_isas()
    with _native.using_isa(first):
        assert ("peftkern held to baseline" in machine.device_name()) == bool(others)
    assert "held" not in machine.device_name()
