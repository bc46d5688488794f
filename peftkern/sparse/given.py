"""What patterns are made of, refused where it is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import _check

KINDS = ("csr", "bitmap")  # by the number that an op's layout has for each


def kind(name: str | None) -> None:
    if name is not None and name not in KINDS:
        raise ValueError(f"kind must be csr, bitmap or None, got {name!r}")


def shape(sizes: Sequence[int]) -> tuple[int, int]:
    if len(sizes) != 2 or any(not isinstance(n, int) or n < 0 for n in sizes):
        raise ValueError(f"shape must be rows and columns, got {list(sizes)}")
    rows, columns = sizes
    if max(rows, columns) >= 2**31:
        raise ValueError(f"shape must have axes that fit into 32 bits, got {list(sizes)}")
    return rows, columns


def integers(name: str, tensor: Tensor) -> None:
    _check.dtype(name, tensor, [torch.int64, torch.int32, torch.uint16])


def in_range(name: str, index: Tensor, size: int) -> None:
    if not len(index):
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{name} must lie in [0, {size}), got {low} to {high}")
