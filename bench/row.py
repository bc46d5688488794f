"""One line of a benchmark: what ran, how long, how much memory, and against what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .statistics import Ratio, quantile


@dataclass(frozen=True)
class Run:
    """What all rows of one run share. Without it a number says nothing."""

    device: str
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row:
    """`status` is "ok", "missing" (the peer is not installed), "failed" (it raised) or "wrong" (its
    result did not pass the check); only "ok" has times. `note` says why, or in what an inexact
    contender is inexact.
    """

    family: str
    op: str
    case: str
    direction: str  # "forward", "backward" or "forward+backward"
    contender: str
    run: Run
    status: str = "ok"
    note: str = ""
    seconds: tuple[float, ...] = ()  # one a round
    iterations: int = 1  # calls in a round; `seconds` is the time of one
    seed: int = 0  # of the order of the contenders in each round
    error: float | None = None  # root mean square, relative to the truth's
    peak_mib: float | None = None
    allocations: int | None = None
    dispatched: int | None = None
    rate: float | None = None
    unit: str = ""  # of `rate`: "GB/s" or "GFLOP/s"
    floor: str = ""  # the binding one: "read", "write", "gemm", or on a GPU "copy"
    share: float | None = None  # time at the floor / time
    baseline: str = ""
    ratio: Ratio | None = None  # time / time of the baseline, paired by round
    noise: Ratio | None = None  # the baseline against itself
    # On a GPU: "host_us" a call, and "graph_ms" of its replay or, in "graph", why there is none.
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        return f"{self.family} {self.op}, {self.direction}: {self.case}"

    @property
    def milliseconds(self) -> tuple[float, float, float] | None:
        """p20, p50, p80."""
        if not self.seconds:
            return None
        p20, p50, p80 = (1e3 * quantile(self.seconds, p) for p in (0.2, 0.5, 0.8))
        return p20, p50, p80
