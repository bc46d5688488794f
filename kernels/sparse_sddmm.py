"""The gradient of sparse's packed values in Triton: a product whose tiles are never written.

    values[e] = scale * sum over m of grad[m, i] x[m, j],  entry e of the pattern lying at (i, j)

Tokens may be cut into splits, whose sums a second launch adds up in their order. Where a csr has
few entries, a kernel in CUDA makes those products alone, if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern import _native
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.common import dot
from peftkern.kernels.qlora_forward import add_up
from peftkern.kernels.sparse_paths import samples
from peftkern.kernels.sparse_tiles import Operand, bits_of, find, row_span, words_at
from peftkern.sparse import fallback

GROUP = 8  # tiles of rows that share the columns of x while these lie in the L2 cache
ENTRIES = 8  # of a row of a tile that csr takes out of it at a time: they pass from lane to lane


@triton.jit
def tile_of(program, down, across, GROUP: tl.constexpr):
    """-> which tile a program makes, of `down` times `across`: GROUP below each other, then the
    next columns."""
    group = program // (GROUP * across) * GROUP
    height = tl.minimum(down - group, GROUP)
    return group + program % (GROUP * across) % height, program % (GROUP * across) // height


@triton.jit
def _put(place, value, there, ADD: tl.constexpr):
    if ADD:
        value += tl.load(place, mask=there, other=0)
    tl.store(place, value, mask=there)


@triton.jit
def store_entries(
    sum,  # [BLOCK_I, BLOCK_J] float32
    first_ptr,
    second_ptr,
    out_ptr,  # [nnz] float32
    row,  # the tile's rows [BLOCK_I], and its first column: a multiple of BLOCK_J
    column,
    rows,  # where the rows end
    columns,
    CSR: tl.constexpr,
    ADD: tl.constexpr,  # to what `out` holds
    STEPS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Writes what the pattern has of a tile, and nothing else."""
    if CSR:
        begin, end = row_span(first_ptr, row, rows)
        begin = find(second_ptr, begin, end, column, STEPS)
        lane = tl.arange(0, ENTRIES)[None, :]
        more = 1
        while more > 0:
            entry = begin[:, None] + lane
            there = entry < end[:, None]
            off = tl.load(second_ptr + entry, mask=there, other=0).to(tl.int32) - column
            there &= off < BLOCK_J
            value = tl.gather(sum, tl.where(there, off, 0), 1)
            _put(out_ptr + entry, value, there, ADD)
            begin += ENTRIES
            # Columns rise: where the last of these entries is not in the tile, no later one is.
            last = tl.max((there & (lane == ENTRIES - 1)).to(tl.int32), 1)
            more = tl.max(last, 0)
    else:
        word = column // 32 + tl.arange(0, BLOCK_J // 32)[None, :]
        words = (columns + 31) // 32
        bits, first = words_at(first_ptr, second_ptr, row[:, None], word, rows, words)
        there, entry = bits_of(bits, first)
        _put(out_ptr + entry, tl.reshape(sum, (BLOCK_I, BLOCK_J // 32, 32)), there, ADD)


@triton.jit(do_not_specialize=["inputs"])
def sddmm_kernel(
    x_ptr,  # [inputs, columns], float32, bfloat16 or float16
    grad_ptr,  # [inputs, rows]
    first_ptr,
    second_ptr,
    out_ptr,  # [splits, nnz] float32
    inputs,
    rows,
    columns,
    nnz,
    stride_x_row,
    stride_x_column,
    stride_grad_row,
    stride_grad_column,
    part,  # tokens that one split adds up, a multiple of BLOCK_M
    scale,
    CSR: tl.constexpr,
    ADD: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of rows and columns of the pattern, of one split of the tokens.

    Floor: 2 inputs rows columns operations; bytes of x and of grad read once (L2 holds them between
    tiles), of the pattern, and 4 for each entry and split.
    """
    down, across = tl.cdiv(rows, BLOCK_I), tl.cdiv(columns, BLOCK_J)
    below, right = tile_of(tl.program_id(0), down, across, GROUP)
    split = tl.program_id(1).to(tl.int64)
    row = below * BLOCK_I + tl.arange(0, BLOCK_I)
    column = right * BLOCK_J
    j = column + tl.arange(0, BLOCK_J)
    from_grad = grad_ptr + row.to(tl.int64)[:, None] * stride_grad_column
    from_x = x_ptr + j.to(tl.int64)[None, :] * stride_x_column
    sum = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    begin = split * part
    end = tl.minimum(begin + part, inputs)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = m < end
        # Read as what it is multiplied as: of a tile that is turned round, sm80 copies none ahead.
        place = from_grad + m[None, :] * stride_grad_row
        grad = tl.load(place, mask=(row < rows)[:, None] & inside[None, :], other=0)
        place = from_x + m[:, None] * stride_x_row
        x = tl.load(place, mask=inside[:, None] & (j < columns)[None, :], other=0)
        sum = dot(grad, x, sum)
    store_entries(
        sum * scale, first_ptr, second_ptr, out_ptr + split * nnz, row, column, rows, columns,
        CSR, ADD, STEPS, ENTRIES, BLOCK_I, BLOCK_J,
    )  # fmt: skip


def sddmm(
    x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int], scale: float
) -> Tensor:
    if x.dtype == torch.float64:
        return fallback.sddmm(x, grad, pattern, layout, scale)
    values = x.new_empty(layout[3], dtype=torch.float32)
    _product(values, x, grad, pattern, layout, scale, add=False)
    return values


def sddmm_(
    values: Tensor, x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    scale: float,
) -> None:  # fmt: skip
    if x.dtype == torch.float64:
        fallback.sddmm_(values, x, grad, pattern, layout, scale)
    else:
        _product(values, x, grad, pattern, layout, scale, add=True)


def _product(
    values: Tensor, x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    scale: float, add: bool,
) -> None:  # fmt: skip
    operand = Operand.of(pattern, layout)
    if operand.nnz == 0:
        return
    sampled = operand.csr and _native.serves("sparse_sample_", x.device.type)
    if sampled and samples(x.device, x.dtype, operand.rows, operand.columns, operand.nnz):
        torch.ops.peftkern.sparse_sample_(values, x, grad, pattern, layout, scale, add)
        return
    x, grad = readable(x), readable(grad)
    inputs = len(x)
    tile = paths.tile("sddmm", x.device, x.dtype, operand.rows)
    if operand.rows % 8 or operand.columns % 8:
        # Rows that start anywhere are read one number at a time: few, or registers run out.
        tile = tile._replace(inner=min(tile.inner, 16))
    programs = triton.cdiv(operand.rows, tile.rows) * triton.cdiv(operand.columns, tile.outputs)
    splits = paths.splits(tile, programs, inputs, x.device)
    parts = values if splits == 1 else values.new_empty(splits, operand.nnz)
    sddmm_kernel[(programs, splits)](
        x, grad, operand.first, operand.second, parts, inputs, operand.rows, operand.columns,
        operand.nnz, *x.stride(), *grad.stride(),
        triton.cdiv(triton.cdiv(inputs, splits), tile.inner) * tile.inner, scale,
        CSR=operand.csr,
        ADD=add and splits == 1,
        STEPS=operand.steps,
        GROUP=GROUP,
        ENTRIES=ENTRIES,
        BLOCK_I=tile.rows,
        BLOCK_J=tile.outputs,
        BLOCK_M=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        add_up(parts, values, add)


def readable(operand: Tensor) -> Tensor:
    """With a dimension along which neighbours lie side by side, or are one number."""
    return operand if {0, 1} & set(operand.stride()) else operand.contiguous()
