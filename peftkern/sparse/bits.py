"""Between masks, bitmaps and CSR, part by part: nothing as large as a mask lies beside them.

A bitmap's words hold the columns of a row from the lowest bit on; what is behind the last column is
zero. Positions count in 32 bits, and in 64 where there are 2^31 entries or more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern import _native

WORD, TILE = 32, 128  # columns of a word, and of one entry of the prefix
_PART = 2**17  # elements that are unpacked at a time, which a cache holds


def index_dtype(nnz: int) -> torch.dtype:
    return torch.int32 if nnz < 2**31 else torch.int64


def column_dtype(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= 2**16 else torch.int32


def words(columns: int) -> int:
    return -(-columns // WORD)


def tiles(columns: int) -> int:
    return -(-columns // TILE)


def pack(mask: Tensor) -> Tensor:
    """bool `[rows, columns]` -> int32 `[rows, words]`."""
    rows, columns = mask.shape
    bits = torch.empty(rows, words(columns), dtype=torch.int32, device=mask.device)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    for part in _parts(rows, columns):
        padded = mask.new_zeros(part.stop - part.start, words(columns) * WORD)
        padded[:, :columns] = mask[part]
        octets = padded.view(torch.uint8).view(len(padded), words(columns) * 4, 8) * powers
        bits[part] = octets.sum(-1, dtype=torch.uint8).view(torch.int32)
    return bits


def unpack(bits: Tensor, columns: int) -> Tensor:
    """int32 `[rows, words]` -> bool `[rows, columns]`."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = bits.contiguous().view(torch.uint8)[..., None] >> places
    return octets.bitwise_and_(1).view(torch.bool).flatten(1)[:, :columns]


def unpacked(bits: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their mask."""
    for part in _parts(len(bits), columns):
        yield part, unpack(bits[part], columns)


def _tile_counts(bits: Tensor) -> Tensor:
    """int32 `[rows, tiles]`: the entries of each tile."""
    rows, width = bits.shape
    count = -(-width * WORD // TILE)
    counts = torch.empty(rows, count, dtype=torch.int32, device=bits.device)
    for part in _parts(rows, width * WORD):
        padded = bits.new_zeros(part.stop - part.start, count * TILE // WORD)
        padded[:, :width] = _popcount(bits[part])
        counts[part] = padded.view(len(padded), count, -1).sum(-1, dtype=torch.int32)
    return counts


def total(counts: Tensor) -> int:
    """Part by part: torch makes 64 bits of all that it sums."""
    parts = counts.flatten().split(_PART)  # type: ignore[no-untyped-call]
    return int(sum(part.sum() for part in parts))


def prefix(counts: Tensor, nnz: int) -> Tensor:
    """`[rows, tiles]`: the position of the first entry of its row at or behind a tile's begin.

    Args:
        counts: of the tiles; they become it, but where positions need 64 bits.
    """
    if index_dtype(nnz) == torch.int64:
        return _prefix(counts.long())
    _prefix_op(counts)
    return counts


def _prefix(counts: Tensor) -> Tensor:
    flat = counts.flatten()
    return (flat.cumsum(0, dtype=flat.dtype) - flat).view(counts.shape)


def _prefix_(counts: Tensor) -> None:
    counts.copy_(_prefix(counts))


def row_starts(counts: Tensor, nnz: int) -> Tensor:
    """`[rows]` of counts -> `[rows + 1]`."""
    starts = torch.zeros(len(counts) + 1, dtype=index_dtype(nnz), device=counts.device)
    starts[1:] = counts.cumsum(0, dtype=starts.dtype)
    return starts


def csr_of(bits: Tensor, columns: int, counts: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """-> row_start and columns; `counts` are those of the tiles."""
    starts = row_starts(counts.sum(1), nnz)
    return starts, _columns_op(bits, starts, columns, nnz)


def _columns(bits: Tensor, row_start: Tensor, width: int, nnz: int) -> Tensor:
    found = torch.empty(nnz, dtype=column_dtype(width), device=bits.device)
    begin = 0
    for _, mask in unpacked(bits, width):
        here = mask.nonzero()[:, 1]
        found[begin : begin + len(here)] = here.to(found.dtype)
        begin += len(here)
    return found


def bits_of(row_start: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """The way back."""
    return _bits_op(row_start, columns, shape[1])  # type: ignore[no-any-return]


def _bits(row_start: Tensor, columns: Tensor, width: int) -> Tensor:
    rows = len(row_start) - 1
    bits = torch.empty(rows, words(width), dtype=torch.int32, device=columns.device)
    for part, entries, row in entries_of(row_start, columns, (rows, width)):
        mask = torch.zeros(part.stop - part.start, width, dtype=torch.bool, device=columns.device)
        mask[row - part.start, columns[entries].long()] = True
        bits[part] = pack(mask)
    return bits


def entries_of(
    row_start: Tensor, columns: Tensor, shape: tuple[int, int], part: int = _PART
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, their entries, and of each entry its row: int64.

    Args:
        part: how many elements of the matrix those rows have, unless one row has more.
    """
    rows, width = shape
    parts = list(_parts(rows, width, part))
    ends = row_start[[*(p.start for p in parts), rows]].tolist()
    for p, begin, end in zip(parts, ends, ends[1:], strict=False):
        counts = row_start[p.start : p.stop + 1].diff()
        numbers = torch.arange(p.start, p.stop, device=columns.device)
        row = numbers.repeat_interleave(counts, output_size=end - begin)
        yield p, slice(begin, end), row


def _parts(rows: int, columns: int, part: int = _PART) -> Iterator[slice]:
    if columns:
        height = max(1, part // columns)
        yield from (slice(r, min(rows, r + height)) for r in range(0, rows, height))


def _popcount(bits: Tensor) -> Tensor:
    # Each step's mask clears what an arithmetic shift brings in at the top.
    sums = bits - ((bits >> 1) & 0x55555555)
    sums = (sums & 0x33333333) + ((sums >> 2) & 0x33333333)
    sums = (sums + (sums >> 4)) & 0x0F0F0F0F
    sums = sums + (sums >> 8)
    return (sums + (sums >> 16)) & 0x3F


tile_counts = _native.define(
    "sparse_tile_counts(Tensor bits) -> Tensor",
    lambda bits: bits.new_empty(bits.shape[0], -(-bits.shape[1] * WORD // TILE)),
    _tile_counts,
)
# The column of each bit that is set, where a row's begin at its row_start; `nnz` bits are.
_columns_op = _native.define(
    "sparse_columns(Tensor bits, Tensor row_start, int width, int nnz) -> Tensor",
    lambda bits, row_start, width, nnz: bits.new_empty(nnz, dtype=column_dtype(width)),
    _columns,
)
# The way back: a bit for each of a row's columns.
_bits_op = _native.define(
    "sparse_bits(Tensor row_start, Tensor columns, int width) -> Tensor",
    lambda row_start, columns, width: columns.new_empty(
        row_start.shape[0] - 1, words(width), dtype=torch.int32
    ),
    _bits,
)
# int32 counts become the sums of those before them.
_prefix_op = _native.define(
    "sparse_prefix_(Tensor(a!) counts) -> ()",
    lambda counts: None,
    _prefix_,
)
for _verb in ("tile_counts", "columns"):
    _native.register_triton("sparse", _verb)
