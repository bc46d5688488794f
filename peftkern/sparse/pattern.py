"""Which entries of a matrix are trained, in the order in which their values are packed."""

from __future__ import annotations

import ctypes
import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peftkern import _check
from peftkern.sparse import bits as _bits
from peftkern.sparse import given
from peftkern.sparse.given import KINDS

CSR_BELOW = 0.078  # as dense, 2 bytes an entry are the 0.156 that a bitmap takes of every element


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as a matrix: its first axis by the others; what has one axis or none is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True, eq=False)
class Pattern:
    """The support of a matrix; immutable. Values are packed row by row, by rising columns.

    Made by `from_mask`, `from_indices`, `from_bits` and `from_csr`, which check what they get.

    Args:
        kind: "csr" or "bitmap".
        shape: rows and columns.
        nnz: the number of entries.
        tensors: of a csr, row_start `[rows + 1]` int32 and columns `[nnz]` uint16, or int32 where
            a matrix has more than 65536 columns; of a bitmap, bits int32 `[rows, words]`, the first
            column in the lowest bit, and the prefix int32 `[rows, tiles of 128]`: the position of
            the row's first entry at or behind the tile's begin. row_start and prefix are int64
            where nnz is 2^31 or more.
        order: int64 `[nnz]`, which of the entries given to `from_indices` lies at each position;
            None where they were in order.
    """

    kind: str
    shape: tuple[int, int]
    nnz: int
    tensors: tuple[Tensor, Tensor] = field(repr=False)
    order: Tensor | None = field(default=None, repr=False)

    @staticmethod
    def from_mask(mask: Tensor, kind: str | None = None) -> Pattern:
        """The entries where a mask is true.

        Args:
            mask: bool, of any shape; of more than two axes, it is `[shape[0], rest]`.
            kind: "csr" or "bitmap"; None takes the smaller one.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: a kind that there is not.
        """
        _check.dtype("mask", mask, [torch.bool])
        shape = matrix_shape(mask.shape)
        return Pattern.from_bits(_bits.pack(mask.reshape(shape)), shape, kind)

    @staticmethod
    def from_bits(bits: Tensor, shape: Sequence[int], kind: str | None = None) -> Pattern:
        """The entries whose bits are set.

        Args:
            bits: int32 `[rows, ceil(columns / 32)]`, the first column in the lowest bit; those
                behind the last column must be zero. A bitmap keeps them, and no copy.
            shape: rows and columns.
            kind: as in `from_mask`.

        Raises:
            TypeError: bits that are not int32.
            ValueError: a shape that does not fit, a kind that there is not, a bit behind the end.
        """
        given.kind(kind)
        rows, columns = given.shape(shape)
        _check.dtype("bits", bits, [torch.int32])
        _check.shape("bits", bits, [rows, _bits.words(columns)])
        tail = columns % _bits.WORD
        if tail and rows and (bits[:, -1] >> tail).bitwise_and_((1 << (32 - tail)) - 1).any():
            raise ValueError(f"bits must be zero behind column {columns}, got one that is set")
        bits = bits.contiguous()
        counts = _bits.tile_counts(bits)
        nnz = _bits.total(counts)
        if _chosen(kind, (rows, columns), nnz) == "csr":
            return Pattern("csr", (rows, columns), nnz, _bits.csr_of(bits, columns, counts, nnz))
        tensors = (bits, _bits.prefix(counts, nnz))
        return Pattern("bitmap", (rows, columns), nnz, tensors)

    @staticmethod
    def from_csr(
        row_start: Tensor, columns: Tensor, shape: Sequence[int], kind: str | None = None
    ) -> Pattern:
        """The entries that lie in a file.

        Args:
            row_start: integers `[rows + 1]`, from 0 to the number of entries, never falling.
            columns: integers `[nnz]`, rising within each row.
            shape, kind: as in `from_bits`.

        Raises:
            TypeError: a tensor that does not hold integers.
            ValueError: a shape that does not fit, entries out of order or given twice.
            IndexError: a column that is not there.
        """
        given.kind(kind)
        rows, width = given.shape(shape)
        for name, tensor in (("row_start", row_start), ("columns", columns)):
            given.integers(name, tensor)
        _check.shape("row_start", row_start, [rows + 1])
        _check.shape("columns", columns, ["nnz"])
        _check.device("columns", columns, row_start)
        nnz = len(columns)
        counts = row_start.long().diff()
        ends = (int(row_start[0]), int(row_start[-1]))
        if ends != (0, nnz) or (counts < 0).any():
            raise ValueError(f"row_start must rise from 0 to {nnz}, got {ends[0]} to {ends[1]}")
        row = torch.arange(rows, device=columns.device).repeat_interleave(counts, output_size=nnz)
        column = columns.long()
        given.in_range("columns", column, width)
        found = _from_sorted(row, column, (rows, width), kind)
        if found is None:
            raise ValueError("columns must rise within each row, got some that do not")
        return found

    @staticmethod
    def from_indices(
        rows: Tensor, columns: Tensor, shape: Sequence[int], kind: str | None = None
    ) -> Pattern:
        """The entries at these places, in any order; `order` tells which one is where.

        Args:
            rows: integers `[nnz]`.
            columns: integers `[nnz]`.
            shape, kind: as in `from_bits`.

        Raises:
            TypeError: a tensor that does not hold integers.
            ValueError: a shape that does not fit, a place given twice.
            IndexError: a place that is not there.
        """
        given.kind(kind)
        height, width = given.shape(shape)
        for name, tensor, size in (("rows", rows, height), ("columns", columns, width)):
            given.integers(name, tensor)
            _check.shape(name, tensor, ["nnz"])
            given.in_range(name, tensor.long(), size)
        _check.shape("columns", columns, [len(rows)])
        _check.device("columns", columns, rows)
        rows, columns = rows.long(), columns.long()
        found = _from_sorted(rows, columns, (height, width), kind)
        if found is not None:
            return found
        # By columns and then by rows, and not by their product, which may not fit into 64 bits.
        order = columns.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]
        found = _from_sorted(rows[order], columns[order], (height, width), kind)
        if found is None:
            raise ValueError("rows and columns must name each place once, got one twice")
        return Pattern(found.kind, found.shape, found.nnz, found.tensors, order)

    @staticmethod
    def of(tensors: Sequence[Tensor], layout: Sequence[int]) -> Pattern:
        """What `operand` gives, as a pattern again; unchecked."""
        kind, rows, columns, nnz = layout
        first, second = tensors
        return Pattern(KINDS[kind], (rows, columns), nnz, (first, second))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def hash(self) -> str:
        """The first 64 bits of SHA-256 over shape, row starts and columns, in hexadecimal digits;
        the same of either kind on every device."""
        csr = self.to("cpu").csr()
        digest = hashlib.sha256(struct.pack("<2q", *self.shape))
        row_start, columns = csr.tensors
        for tensor in (row_start.long(), *(p.int() for p in torch.split(columns, 2**20))):
            digest.update(memory(tensor))
        return digest.hexdigest()[:16]

    def __reduce__(self) -> Any:
        """torch cannot read back what pickle wrote of 16-bit columns: they go as signed ones."""
        first, second = self.tensors
        signed = second.view(torch.int16) if second.dtype == torch.uint16 else second
        return _restored, (self.kind, self.shape, self.nnz, first, signed, self.order)

    def operand(self) -> tuple[list[Tensor], list[int]]:
        """As every op takes it: its tensors, and its layout [kind, rows, columns, nnz]."""
        return list(self.tensors), [KINDS.index(self.kind), *self.shape, self.nnz]

    def to(self, device: torch.device | str) -> Pattern:
        """Itself where it lies there already."""
        if self.device == torch.device(device):
            return self
        first, second = (tensor.to(device) for tensor in self.tensors)
        order = None if self.order is None else self.order.to(device)
        return Pattern(self.kind, self.shape, self.nnz, (first, second), order)

    def csr(self) -> Pattern:
        """The same entries in the same order; itself where it is one."""
        if self.kind == "csr":
            return self
        bits, columns = self.tensors[0], self.shape[1]
        tensors = _bits.csr_of(bits, columns, _bits.tile_counts(bits), self.nnz)
        return Pattern("csr", self.shape, self.nnz, tensors, self.order)

    def bitmap(self) -> Pattern:
        """The same entries in the same order; itself where it is one."""
        if self.kind == "bitmap":
            return self
        bits = _bits.bits_of(*self.tensors, self.shape)
        tensors = (bits, _bits.prefix(_bits.tile_counts(bits), self.nnz))
        return Pattern("bitmap", self.shape, self.nnz, tensors, self.order)

    def mask(self) -> Tensor:
        """bool `[rows, columns]`."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        if self.kind == "bitmap":
            for rows, part in _bits.unpacked(self.tensors[0], self.shape[1]):
                mask[rows] = part
        else:
            for _, entries, row in _bits.entries_of(*self.tensors, self.shape):
                mask[row, self.tensors[1][entries].long()] = True
        return mask

    def indices(self) -> Tensor:
        """int32 `[2, nnz]`: the row and the column of each entry."""
        row_start, columns = self.csr().tensors
        found = torch.empty(2, self.nnz, dtype=torch.int32, device=self.device)
        rows = torch.arange(self.shape[0], dtype=torch.int32, device=self.device)
        found[0] = rows.repeat_interleave(row_start.diff(), output_size=self.nnz)
        found[1] = columns.int()
        return found


def _restored(
    kind: str, shape: tuple[int, int], nnz: int, first: Tensor, second: Tensor,
    order: Tensor | None,
) -> Pattern:  # fmt: skip
    if second.dtype == torch.int16:
        second = second.view(torch.uint16)
    return Pattern(kind, shape, nnz, (first, second), order)


def _from_sorted(
    rows: Tensor, columns: Tensor, shape: tuple[int, int], kind: str | None
) -> Pattern | None:
    """None where a place does not come behind the one before it."""
    next_row = rows.diff()
    if not ((next_row > 0) | (next_row == 0) & (columns.diff() > 0)).all():
        return None
    nnz = len(rows)
    row_start = _bits.row_starts(rows.bincount(minlength=shape[0]), nnz)
    csr = Pattern("csr", shape, nnz, (row_start, columns.to(_bits.column_dtype(shape[1]))))
    return csr if _chosen(kind, shape, nnz) == "csr" else csr.bitmap()


def _chosen(kind: str | None, shape: tuple[int, int], nnz: int) -> str:
    if kind is not None:
        return kind
    return "csr" if nnz < CSR_BELOW * shape[0] * shape[1] or nnz == 0 else "bitmap"


def memory(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    """A view of its bytes, without numpy, which need not be there."""
    tensor = tensor.contiguous()
    view = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    view.owner = tensor  # type: ignore[attr-defined]  # or its memory would be gone
    return view
