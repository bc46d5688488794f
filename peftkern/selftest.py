"""A small case of every op, on every device and instruction set of this machine."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from peftkern import _native
from peftkern._verdict import Case, Verdict
from peftkern.bottleneck.cases import cases as bottleneck_cases
from peftkern.info import info
from peftkern.onebit.cases import cases as onebit_cases
from peftkern.qlora.cases import cases as qlora_cases
from peftkern.sparse.cases import cases as sparse_cases

# A family adds its own here: from a device to its cases.
FAMILIES: tuple[Callable[[torch.device], Iterator[Case]], ...] = (
    qlora_cases, bottleneck_cases, onebit_cases, sparse_cases,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where cases run.

    Args:
        device: their tensors lie there.
        isa: the instruction set, or a GPU's architecture.
        entered: makes it so while a case runs.
        stands_in: what takes the kernels' place: Triton's launchers in its interpreter, or CUDA's
            kernels in our emulator; None where kernels run as they are.
    """

    device: torch.device
    isa: str
    entered: Callable[[], AbstractContextManager[object]]
    stands_in: str | None = None

    def served_by(self, case: Case) -> str:
        if self.stands_in:
            return self.stands_in
        kernels = _native.kernels()
        found = (kernels[op][self.device.type] for op in case.ops)
        return " + ".join(dict.fromkeys(found)).replace("reference", "plain torch")

    def takes(self, case: Case) -> bool:
        if self.stands_in:
            return STAND_INS[self.stands_in].keys() >= set(case.ops)
        kernels = _native.kernels()
        return all(self.device.type in kernels[op] for op in case.ops)


# What can be tested of a GPU's kernels on a machine that has none.
STAND_INS: dict[str, Mapping[str, Callable[..., object]]] = {
    "Triton, interpreted": _native.launchers,
    "CUDA, emulated": _native.emulated,
}


def places() -> list[Place]:
    cpu = torch.device("cpu")
    found = [Place(cpu, i, partial(_native.using_isa, i)) for i in _native.available_isas()]
    found = found or [Place(cpu, "none", nullcontext)]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
    for name, functions in STAND_INS.items():
        if functions and (functions is not _native.launchers or interpreted):
            found.append(Place(cpu, "none", partial(_native.Instead, functions), name))
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(Place(torch.device("cuda", i), f"sm_{major}{minor}", nullcontext))
    return found


def run() -> bool:
    """Prints a line for every case as it runs, and at the end what this machine is.

    Returns:
        Whether all passed.
    """
    lines = [
        (place, case)
        for place in places()
        for family in FAMILIES
        for case in family(place.device)
        if place.takes(case)
    ]
    columns = [
        (str(place.device), place.isa, case.name, place.served_by(case)) for place, case in lines
    ]
    widths = [max(map(len, column)) for column in zip(*columns, strict=True)]
    failures = 0
    for (place, case), cells in zip(lines, columns, strict=True):
        # Before it runs, so that a crash of the whole process shows where.
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(*padded, sep="  ", end="  ", flush=True)
        passed, words, seconds = _outcome(place, case)
        failures += not passed
        print(f"{'pass' if passed else 'FAIL'}  {words}, {1000 * seconds:.0f} ms", flush=True)
    print(f"\n{info()}\n")
    if failures:
        print(f"self-check FAILED: {failures} of {len(lines)} cases")
    else:
        print(f"self-check passed: {len(lines)} cases")
    return not failures


def _outcome(place: Place, case: Case) -> tuple[bool, str, float]:
    """Whether it passed, in which words, after how many seconds."""
    start = time.perf_counter()
    try:
        with place.entered(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing kernels: the line says what served it
            worst = max(case.verdicts(), key=_badness)
        passed, words = worst.passed, str(worst)
    except Exception as error:  # one failure must not hide the others
        reason = (str(error).splitlines() or [""])[0]
        passed, words = False, f"{type(error).__name__}: {reason}"
    return passed, words, time.perf_counter() - start


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return not verdict.passed, verdict.error / verdict.allowed if verdict.allowed else 0.0
