"""Between a weight and the packed values of its pattern, in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import narrow, widen
from peftkern.kernels.sparse_tiles import (
    BLOCK_ROWS,
    Operand,
    next_chunk,
    open_rows,
)
from peftkern.sparse import fallback


@triton.jit
def place_of(row, column, columns, inner):
    """Where a weight has an element: `inner` is what lies between neighbours along the columns."""
    along = column % inner * (columns // inner) + column // inner
    return row.to(tl.int64)[:, None] * columns + along


@triton.jit
def gather_kernel(
    weight_ptr,  # [rows, columns], of any float dtype
    values_ptr,  # [nnz] float32
    first_ptr,
    second_ptr,
    rows,
    columns,
    inner,
    CSR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Floor: the sectors of the weight that entries lie in, the pattern, 4 bytes an entry."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk = tl.program_id(1) * CHUNKS
    begin, end, first, last = open_rows(
        first_ptr, second_ptr, row, rows, columns, 0, columns, chunk, CHUNKS, CSR, 0
    )
    for chunk in range(first, last):
        entry, column, there, begin = next_chunk(
            first_ptr, second_ptr, row, rows, columns, chunk, begin, end, CSR
        )
        place = weight_ptr + place_of(row, column, columns, inner)
        tl.store(values_ptr + entry, widen(tl.load(place, mask=there, other=0)), mask=there)


@triton.jit
def scatter_kernel(
    weight_ptr,  # [rows, columns], of any float dtype
    values_ptr,  # [nnz] float32
    first_ptr,
    second_ptr,
    rows,
    columns,
    inner,
    CSR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Rounds to nearest. Floor: as gather's, but that sectors are read and written."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk = tl.program_id(1) * CHUNKS
    begin, end, first, last = open_rows(
        first_ptr, second_ptr, row, rows, columns, 0, columns, chunk, CHUNKS, CSR, 0
    )
    for chunk in range(first, last):
        entry, column, there, begin = next_chunk(
            first_ptr, second_ptr, row, rows, columns, chunk, begin, end, CSR
        )
        value = tl.load(values_ptr + entry, mask=there, other=0)
        place = weight_ptr + place_of(row, column, columns, inner)
        tl.store(place, narrow(value, weight_ptr.dtype.element_ty), mask=there)


def gather(weight: Tensor, pattern: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    if weight.dtype == torch.float64:
        return fallback.gather(weight, pattern, layout)
    values = weight.new_empty(layout[3], dtype=torch.float32)
    _walk(gather_kernel, weight, values, Operand.of(pattern, layout))
    return values


def scatter_(
    weight: Tensor, values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int]
) -> None:
    if weight.dtype == torch.float64:
        fallback.scatter_(weight, values, pattern, layout)
    else:
        _walk(scatter_kernel, weight, values, Operand.of(pattern, layout))


def _walk(kernel: triton.JITFunction, weight: Tensor, values: Tensor, operand: Operand) -> None:
    if operand.nnz:
        kernel[operand.grid(operand.columns)](
            weight, values, *operand.arguments(), inner_of(weight),
            CSR=operand.csr, BLOCK_ROWS=BLOCK_ROWS, CHUNKS=operand.chunks,
        )  # fmt: skip


def inner_of(weight: Tensor) -> int:
    """How many columns of a row lie channel by channel: those of the window, where channels come
    last, and otherwise 1."""
    return 1 if weight.is_contiguous() else weight.shape[2] * weight.shape[3]
