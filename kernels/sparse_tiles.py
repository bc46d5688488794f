"""Where the entries of a pattern lie, for sparse's kernels in Triton.

A pattern is two tensors, and its entries are numbered row by row:

    csr       row_start [rows + 1], columns [nnz]: those of row i are row_start[i] to
              row_start[i + 1], in rising columns
    bitmap    bits [rows, words] int32, the lowest bit first; prefix [rows, quads]: how many
              entries come before column 128 q of row i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

WORD, QUAD = tl.constexpr(32), tl.constexpr(4)  # columns of a word, words of a number of prefix
# A program that goes along rows takes so many of them, and of each so many chunks at the most.
BLOCK_ROWS, CHUNKS, CSR_CHUNKS = 32, 16, 128


@triton.jit
def popcount(word):
    """How many bits are set, int32; the compiler finds the one instruction that counts them."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (tl.mul(word, 0x01010101, sanitize_overflow=False) >> 24).to(tl.int32)


@triton.jit
def bits_of(word, first):
    """Words of bits, and the entry that each would start with -> which bits are set, and the entry
    of each; along a new last axis."""
    lane = tl.arange(0, 32)
    for _ in tl.static_range(len(word.shape)):
        lane = tl.expand_dims(lane, 0)
    word, first = tl.expand_dims(word, -1), tl.expand_dims(first, -1)
    return ((word >> lane) & 1) != 0, first + popcount(word & ((1 << lane) - 1))


@triton.jit
def words_at(bits_ptr, prefix_ptr, row, word, rows, words):
    """-> these words of these rows, and how many entries come before each."""
    inside = (row < rows) & (word < words)
    place = bits_ptr + row.to(tl.int64) * words + word
    quads = (words + QUAD - 1) // QUAD
    first = tl.load(prefix_ptr + row.to(tl.int64) * quads + word // QUAD, mask=inside, other=0)
    for back in tl.static_range(1, 4):
        earlier = tl.load(place - back, mask=inside & (word % QUAD >= back), other=0)
        first += popcount(earlier)
    return tl.load(place, mask=inside, other=0), first


@triton.jit
def find(columns_ptr, begin, end, column, STEPS: tl.constexpr):
    """Of each row's entries [begin, end), the first that is not before this column."""
    for _ in range(STEPS):
        middle = begin + (end - begin) // 2
        open = begin < end
        there = tl.load(columns_ptr + middle, mask=open, other=0).to(tl.int32)
        before = open & (there < column)
        begin = tl.where(before, middle + 1, begin)
        end = tl.where(open & (there >= column), middle, end)
    return begin


@triton.jit
def row_span(row_start_ptr, row, rows):
    """-> a row's first entry, and the one behind its last; both 0 beyond the last row."""
    inside = row < rows
    begin = tl.load(row_start_ptr + row, mask=inside, other=0)
    return begin, tl.load(row_start_ptr + row + 1, mask=inside, other=0)


@triton.jit
def open_rows(
    first_ptr, second_ptr, row, rows, columns, left, right, chunk, chunks, CSR: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """What a program walks through: these rows between columns [left, right), which are multiples
    of 128 or the end; without STEPS all columns.

    A chunk is a word of bits or, of csr, 32 entries; a program has so many of each row, from this
    one on. -> the first entry of each row; of csr the one behind its last; and the chunks, from
    begin to end.
    """
    if CSR:
        begin, end = row_span(first_ptr, row, rows)
        if STEPS > 0:
            begin = find(second_ptr, begin, end, left, STEPS)
            end = find(second_ptr, begin, end, right, STEPS)
        begin += chunk * WORD
        most = tl.max(tl.maximum(end - begin, 0), 0).to(tl.int32)
        return begin, end, chunk, chunk + tl.minimum((most + WORD - 1) // WORD, chunks)
    else:
        words = (columns + WORD - 1) // WORD
        chunk += left // WORD
        _, begin = words_at(first_ptr, second_ptr, row, tl.zeros_like(row) + chunk, rows, words)
        return begin, begin, chunk, tl.minimum(chunk + chunks, (right + WORD - 1) // WORD)


@triton.jit
def next_chunk(first_ptr, second_ptr, row, rows, columns, chunk, begin, end, CSR: tl.constexpr):
    """-> entries [.., 32] of these rows, their columns and which there are; and where each row's
    next chunk begins."""
    lane = tl.arange(0, WORD)[None, :]
    if CSR:
        entry = begin[:, None] + lane
        there = entry < end[:, None]
        column = tl.load(second_ptr + entry, mask=there, other=0).to(tl.int32)
        return entry, column, there, begin + WORD
    else:
        words = (columns + WORD - 1) // WORD
        word = tl.load(first_ptr + row.to(tl.int64) * words + chunk, mask=row < rows, other=0)
        there, entry = bits_of(word, begin)
        column = tl.broadcast_to(lane + chunk * WORD, entry.shape)
        return entry, column, there, begin + popcount(word)


class Operand(NamedTuple):
    """A pattern as kernels take it."""

    first: Tensor  # row_start, or bits
    second: Tensor  # columns, or prefix
    rows: int
    columns: int
    nnz: int
    csr: bool

    @classmethod
    def of(cls, pattern: Sequence[Tensor], layout: Sequence[int]) -> Operand:
        kind, rows, columns, nnz = layout
        first, second = pattern
        return cls(first, second, rows, columns, nnz, kind == 0)

    @property
    def steps(self) -> int:
        """That `find` takes in a row of any length."""
        return self.columns.bit_length()

    def arguments(self) -> tuple[Any, ...]:
        return self.first, self.second, self.rows, self.columns

    @property
    def chunks(self) -> int:
        """That a program walks through: most rows of a csr have few, and one program for all."""
        return CSR_CHUNKS if self.csr else CHUNKS

    def grid(self, columns: int) -> tuple[int, int]:
        """Programs that walk through so many columns: BLOCK_ROWS rows, and chunks of each."""
        return triton.cdiv(self.rows, BLOCK_ROWS), triton.cdiv(columns, 32 * self.chunks)

    def part(self, begin: int, end: int) -> Operand:
        """These rows alone; entries keep their numbers."""
        first = self.first[begin : end + self.csr]
        second = self.second if self.csr else self.second[begin:end]
        return self._replace(first=first, second=second, rows=end - begin)
