"""Products with the sparse matrix itself, in Triton, for a base that cannot take it in.

    y = residual + scale * x S^T          residual + scale * grad S

Few rows by a kernel that reads the entries alone; more by panels of S for the library's product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import narrow, rows_of, widen
from peftkern.kernels.qlora_panels import PANEL_BYTES, PANEL_STEP
from peftkern.kernels.sparse_tiles import (
    BLOCK_ROWS,
    Operand,
    next_chunk,
    open_rows,
)
from peftkern.sparse import fallback

FEW = 16  # rows of x that the kernel for entries alone takes at most
FEW_ROWS = 8  # rows of S that one of its programs has


@triton.jit(do_not_specialize=["inputs"])
def few_kernel(
    x_ptr,  # [inputs, columns], float32, bfloat16 or float16
    values_ptr,  # [nnz] float32
    residual_ptr,  # [inputs, rows] of any float dtype, or None
    out_ptr,  # [inputs, rows]
    first_ptr,
    second_ptr,
    rows,
    columns,
    inputs,
    scale,
    CSR: tl.constexpr,
    BLOCK_M: tl.constexpr,  # inputs at least
    BLOCK_ROWS: tl.constexpr,
):
    """y of all inputs and of some rows of S.

    Floor: 4 bytes an entry and those of the pattern; x lies in the caches, one number of it is read
    for each entry and input.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m = tl.arange(0, BLOCK_M)[:, None, None]
    from_x = x_ptr + tl.minimum(m, inputs - 1) * columns
    sum = tl.zeros((BLOCK_M, BLOCK_ROWS, 32), tl.float32)
    begin, end, first, last = open_rows(
        first_ptr, second_ptr, row, rows, columns, 0, columns, 0, columns, CSR, 0
    )
    for chunk in range(first, last):
        entry, column, there, begin = next_chunk(
            first_ptr, second_ptr, row, rows, columns, chunk, begin, end, CSR
        )
        value = tl.load(values_ptr + entry, mask=there, other=0)
        x = tl.load(from_x + column[None, :, :], mask=there[None, :, :], other=0)
        sum += widen(x) * value[None, :, :]
    y = scale * tl.sum(sum, 2)
    m = tl.arange(0, BLOCK_M)[:, None]
    place, inside = m * rows + row[None, :], (m < inputs) & (row < rows)[None, :]
    if residual_ptr is not None:
        y += widen(tl.load(residual_ptr + place, mask=inside, other=0))
    tl.store(out_ptr + place, narrow(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["left", "right"])
def dense_kernel(
    values_ptr,  # [nnz] float32
    first_ptr,
    second_ptr,
    out_ptr,  # [rows, right - left], of any float dtype
    rows,
    columns,
    left,  # the panel's columns; left is a multiple of 128
    right,
    CSR: tl.constexpr,
    STEPS: tl.constexpr,  # 0: all columns
    BLOCK_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A panel of S, rounded once; of csr its entries alone.

    Floor: the bytes of the panel written, 4 an entry, and those of the pattern.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    chunk = tl.program_id(1) * CHUNKS
    begin, end, first, last = open_rows(
        first_ptr, second_ptr, row, rows, columns, left, right, chunk, CHUNKS, CSR, STEPS
    )
    to = out_ptr + row.to(tl.int64)[:, None] * (right - left)
    for chunk in range(first, last):
        entry, column, there, begin = next_chunk(
            first_ptr, second_ptr, row, rows, columns, chunk, begin, end, CSR
        )
        value = tl.load(values_ptr + entry, mask=there, other=0)
        inside = there if CSR else (row < rows)[:, None] & (column < right)
        tl.store(to + (column - left), narrow(value, out_ptr.dtype.element_ty), mask=inside)


def matmul(
    x: Tensor, values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    residual: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64:
        return fallback.matmul(x, values, pattern, layout, residual, scale)
    operand = Operand.of(pattern, layout)
    flat = rows_of(x)
    y = flat.new_empty(len(flat), operand.rows)
    if 0 < len(flat) <= FEW and operand.rows:
        few(flat, values, operand, rows_of(residual), scale, y)
    else:
        _start(y, residual)
        for begin, end in _panels(operand.rows, operand.columns * x.itemsize):
            panel = dense(values, operand.part(begin, end), x.dtype, 0, operand.columns)
            y[:, begin:end].addmm_(flat, panel.t(), alpha=scale)
    return y.view(*x.shape[:-1], operand.rows)


def matmul_t(
    grad: Tensor, values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    residual: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    if grad.dtype == torch.float64:
        return fallback.matmul_t(grad, values, pattern, layout, residual, scale)
    operand = Operand.of(pattern, layout)
    flat = rows_of(grad)
    x = flat.new_empty(len(flat), operand.columns)
    _start(x, residual)
    # Of columns, so that no sum is rounded between two panels.
    for begin, end in _panels(operand.columns, operand.rows * grad.itemsize):
        panel = dense(values, operand, grad.dtype, begin, end)
        x[:, begin:end].addmm_(flat, panel, alpha=scale)
    return x.view(*grad.shape[:-1], operand.columns)


def few(
    x: Tensor, values: Tensor, operand: Operand, residual: Tensor | None, scale: float, out: Tensor
) -> None:
    """Of FEW inputs at most; `out` is `[inputs, rows]` and has an element at least."""
    few_kernel[(triton.cdiv(operand.rows, FEW_ROWS),)](
        x, values, residual, out, *operand.arguments(), len(x), scale,
        CSR=operand.csr, BLOCK_M=triton.next_power_of_2(len(x)), BLOCK_ROWS=FEW_ROWS,
    )  # fmt: skip


def dense(values: Tensor, operand: Operand, dtype: torch.dtype, left: int, right: int) -> Tensor:
    """S[:, left:right], in this dtype; left is a multiple of PANEL_STEP."""
    new = values.new_zeros if operand.csr or operand.nnz == 0 else values.new_empty
    panel = new(operand.rows, right - left, dtype=dtype)
    if panel.numel() and operand.nnz:
        whole = right - left == operand.columns
        dense_kernel[operand.grid(right - left)](
            values, operand.first, operand.second, panel, operand.rows, operand.columns, left,
            right, CSR=operand.csr, STEPS=0 if whole else operand.steps, BLOCK_ROWS=BLOCK_ROWS,
            CHUNKS=operand.chunks,
        )  # fmt: skip
    return panel


def _start(out: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        out.zero_()
    else:
        out.copy_(residual.view(out.shape))


def _panels(length: int, bytes_of_one: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each, which has PANEL_BYTES at most, or is as narrow as there are."""
    size = max(PANEL_BYTES // max(bytes_of_one, 1) // PANEL_STEP * PANEL_STEP, PANEL_STEP)
    for begin in range(0, length, size):
        yield begin, min(begin + size, length)
