"""How many bits of a bitmap are set, and in which columns, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.sparse_tiles import BLOCK_ROWS, QUAD, WORD, bits_of, popcount
from peftkern.sparse import bits as layouts

BLOCK = 1024  # counts that one program makes


@triton.jit
def tile_counts_kernel(
    bits_ptr,  # [rows, words] int32
    out_ptr,  # [rows, quads] int32
    count,  # of all that are made
    words,
    quads,  # of a row
    BLOCK: tl.constexpr,
):
    """Floor: the bytes of the bits read, a quarter of them written."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, QUAD)[None, :]
    word = (i % quads * QUAD)[:, None] + lane
    inside = (i < count)[:, None] & (word < words)
    found = tl.load(bits_ptr + (i // quads * words)[:, None] + word, mask=inside, other=0)
    tl.store(out_ptr + i, tl.sum(popcount(found), 1), mask=i < count)


@triton.jit
def columns_kernel(
    bits_ptr,  # [rows, words] int32
    row_start_ptr,  # [rows + 1] int32 or int64
    out_ptr,  # [nnz] uint16 or int32
    rows,
    words,
    BLOCK_ROWS: tl.constexpr,
):
    """The columns of some rows, from the first to the last.

    Floor: the bytes of the bits read, 2 or 4 an entry written.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    begin = tl.load(row_start_ptr + row, mask=inside, other=0)
    lane = tl.arange(0, WORD)[None, :]
    for w in range(0, words):
        word = tl.load(bits_ptr + row.to(tl.int64) * words + w, mask=inside, other=0)
        there, entry = bits_of(word, begin)
        column = tl.broadcast_to(lane + w * WORD, entry.shape)
        tl.store(out_ptr + entry, column.to(out_ptr.dtype.element_ty), mask=there)
        begin += popcount(word)


def tile_counts(bits: Tensor) -> Tensor:
    rows, words = bits.shape
    quads = triton.cdiv(words, QUAD.value)
    counts = bits.new_empty(rows, quads)
    if counts.numel():
        tile_counts_kernel[(triton.cdiv(counts.numel(), BLOCK),)](
            bits, counts, counts.numel(), words, quads, BLOCK=BLOCK
        )
    return counts


def columns(bits: Tensor, row_start: Tensor, width: int, nnz: int) -> Tensor:
    found = torch.empty(nnz, dtype=layouts.column_dtype(width), device=bits.device)
    if nnz:
        rows, words = bits.shape
        columns_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
            bits, row_start, found, rows, words, BLOCK_ROWS=BLOCK_ROWS
        )
    return found
