"""The floors of the contenders' times: what the machine can do, measured in the same rounds.

A case says how many bytes a call must read and write and how many operations it does (`Work`).
Reading is timed over as many bytes and as many copies as the case reads, so that the floor finds
its data in the same cache, or out of it; likewise writing. The rate of a matrix product is that of
torch's own, on a square large enough to be at its best. On a GPU, where the cache is flushed and
memory carries both ways at once, one large copy stands for reading and writing.

    share = max(read / read rate, written / write rate, flops / GEMM rate) / time
    share = max((read + written) / copy rate, flops / GEMM rate) / time         on a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peftkern import _native

from .statistics import quantile
from .timing import Calls

# Below this a call costs more than its traffic, so a share would say nothing.
SMALLEST_TRAFFIC = 1 << 20
SMALLEST_FLOPS = 1 << 27
GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = 512 << 20

_read = _native.define(
    "bench_read(Tensor buffer) -> Tensor",
    fake=lambda buffer: buffer.new_empty(1, dtype=torch.int64),
    reference=lambda buffer: buffer.view(torch.int64).sum(0, keepdim=True),
)
_write = _native.define(
    "bench_write(Tensor(a!) buffer) -> ()",
    fake=lambda buffer: None,
    reference=lambda buffer: buffer.view(torch.uint8).fill_(0x3F) and None,
)


@dataclass(frozen=True)
class Work:
    """The least a call can get by with: bytes in, bytes out, operations, the product's dtype."""

    read: int = 0
    written: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32


def read(buffer: Tensor) -> Tensor:
    """Loads every byte of an uint8 buffer once."""
    return _read(buffer)


def write(buffer: Tensor) -> None:
    """Stores every byte of an uint8 buffer once."""
    _write(buffer)


def gemm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out)


class Floors:
    """The floors that a case's work calls for, as further contenders of its rounds."""

    def __init__(self, work: Work, copies: int, device: torch.device) -> None:
        self.work = work
        self._amount: dict[str, int] = {}  # bytes or operations of one call
        self.calls: dict[str, Calls] = {}
        if device.type == "cuda":
            self._of_copying(device)
        else:
            self._of_reading_and_writing(copies, device)
        if work.flops >= SMALLEST_FLOPS:
            size = GEMM_SIZE[device.type]
            square = partial(torch.randn, size, size, dtype=work.dtype, device=device)
            call = partial(gemm, square(), square(), square())
            self._add("gemm", 2 * size**3, [call] * copies)

    def _of_copying(self, device: torch.device) -> None:
        if self.work.read + self.work.written >= SMALLEST_TRAFFIC:
            source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
            self._add("copy", 2 * COPY_BYTES, [partial(torch.empty_like(source).copy_, source)])

    def _of_reading_and_writing(self, copies: int, device: torch.device) -> None:
        kernels: dict[str, tuple[Callable[[Tensor], object], int]] = {
            "read": (read, self.work.read),
            "write": (write, self.work.written),
        }
        for name, (kernel, size) in kernels.items():
            if size >= SMALLEST_TRAFFIC:
                size -= size % 8
                make = partial(torch.ones, size, dtype=torch.uint8, device=device)
                self._add(name, size, [partial(kernel, make()) for _ in range(copies)])

    def _add(self, name: str, amount: int, calls: Calls) -> None:
        self._amount[name] = amount
        self.calls[name] = calls
        for call in calls:
            call()

    def rate(self, name: str, seconds: tuple[float, ...]) -> float:
        """Bytes or operations a second."""
        return self._amount[name] / quantile(seconds, 0.5)

    def share(
        self, floors: dict[str, tuple[float, ...]], seconds: tuple[float, ...]
    ) -> tuple[str, float | None]:
        """The floor that binds, and the fraction of it that `seconds` reach, paired by round."""
        work = self.work
        wanted = {
            "read": work.read, "write": work.written, "copy": work.read + work.written,
            "gemm": work.flops,
        }  # fmt: skip
        best: tuple[str, float | None] = ("", None)
        for name, times in floors.items():
            scale = wanted[name] / self._amount[name]
            pairs = [scale * floor / time for floor, time in zip(times, seconds, strict=True)]
            share = quantile(pairs, 0.5)
            if best[1] is None or share > best[1]:
                best = name, share
        return best
