"""What `--predict` goes by: what GPUs can do by their datasheets, issue slots a weight, and goals.

None of it was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from .layers import Case


class Device(NamedTuple):
    """The most that a GPU can do, as its maker says."""

    architecture: str  # as qlora_paths.py names it
    target: str  # and nvcc
    bandwidth: float  # bytes a second
    matrix: float  # operations a second: bfloat16 in matrix units, no zeros skipped
    multiprocessors: int
    clock: float  # the highest, which none holds for long
    source: str

    @property
    def issue(self) -> float:
        """Issue slots a second and lane: each of four schedulers starts a warp of 32 a cycle."""
        return self.multiprocessors * 4 * 32 * self.clock


HOPPER = (
    "1979 TFLOP/s of bfloat16 with sparsity, and half without; 67 TFLOP/s of float32, which is 132 "
    "multiprocessors of 128 lanes at 1.98 GHz"
)
DEVICES = {
    "h200": Device(
        "sm90", "sm_90a", 4.8e12, 989e12, 132, 1.98e9,
        f"NVIDIA's datasheet of the H200 SXM: 4.8 TB/s; {HOPPER}",
    ),
    "h100": Device(
        "sm90", "sm_90a", 3.35e12, 989e12, 132, 1.98e9,
        f"NVIDIA's datasheet of the H100 SXM: 3.35 TB/s; {HOPPER}",
    ),
    "a100": Device(
        "sm80", "sm_80", 2.039e12, 312e12, 108, 1.41e9,
        "NVIDIA's datasheet of the A100 80GB SXM: 2039 GB/s; 312 TFLOP/s of bfloat16; 19.5 TFLOP/s "
        "of float32, which is 108 multiprocessors of 64 lanes at 1.41 GHz",
    ),
}  # fmt: skip

# The most that the tests' gates allow, on any architecture: issue slots a weight and lane of plain
# NF4 in blocks of 64, of decode by its kernel's name, of the product by the rows of its tile.
SLOTS = {
    "decode half 4 64 0 8": 2.9,
    "decode half 4 64 0 16": 3.4,
    "gemm 32": 9.0,
    "gemm 64": 9.5,
    "panel": 11.0,
}


class Goal(NamedTuple):
    """What is to be reached on an H200 in cases with these rows, rank and dropout."""

    text: str
    rows: range
    rank: int = 0
    dropout: float = 0.0
    shape: tuple[int, int] | None = None  # None: any
    share: float = 0.0  # of the memory's rate


DECODING, TRAINING = range(1, 17), range(2048, 8193)
GOALS = (
    Goal("60% of bandwidth", range(1, 2), shape=(14336, 4096), share=0.6),
    Goal("80% of bandwidth", range(1, 2), shape=(28672, 8192), share=0.8),
    Goal("1.5x as fast as bitsandbytes", DECODING),
    Goal("at most 1.15x a compiled bfloat16 layer", TRAINING, 16, 0.1),
    Goal("1.3x as fast as peft + bitsandbytes", TRAINING, 16, 0.1),
    Goal("1.1x as fast as unsloth", TRAINING, 16),
)


def goals(case: Case) -> list[Goal]:
    """Those that this case is to reach."""
    shape = (case.outputs, case.inputs)
    return [
        goal
        for goal in GOALS
        if case.rows in goal.rows
        and (case.rank, case.dropout) == (goal.rank, goal.dropout)
        and goal.shape in (None, shape)
    ]
