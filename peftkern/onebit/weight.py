"""A quantised matrix: its codes, row by row, and the mean and std that give them their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftkern import _check, _native
from peftkern.onebit.reference import BITS


@dataclass(frozen=True, eq=False)
class OneBitWeight:
    """W = mean + std * level[code]; immutable.

    Args:
        packed: codes of `bits` bits, the first of a row in the low bits of its first byte, rows
            padded with zeros: uint8 `[out, ceil(in * bits / 8)]`.
        mean: float32 `[]` (float64 of a float64 weight).
        std: of the same dtype, over one element less than there are.
        shape: out and in.
        bits: 1, 2 or 4.
        dtype: the dtype it had, and has again when dequantised.

    Raises:
        TypeError: a part of another dtype.
        ValueError: bits that there are not, or a part that does not fit or lies elsewhere.
    """

    packed: Tensor
    mean: Tensor
    std: Tensor
    shape: torch.Size
    bits: int
    dtype: torch.dtype
    statistics: Tensor = field(init=False, repr=False)  # `[1, 2]`, as every op takes them
    _laid_out: list[Tensor] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be 1, 2 or 4, got {self.bits}")
        if len(self.shape) != 2:
            raise ValueError(f"shape must be [out, in], got {list(self.shape)}")
        if self.dtype not in _check.FLOATS:
            raise TypeError(f"dtype must be a float dtype, got {self.dtype}")
        rows, columns = self.shape
        _check.dtype("packed", self.packed, [torch.uint8])
        _check.shape("packed", self.packed, [rows, (columns * self.bits + 7) // 8])
        _check.dense("packed", self.packed)
        single = torch.promote_types(self.dtype, torch.float32)
        for name, tensor in (("mean", self.mean), ("std", self.std)):
            _check.dtype(name, tensor, [single])
            _check.shape(name, tensor, [])
            _check.device(name, tensor, self.packed)
        object.__setattr__(self, "shape", torch.Size(self.shape))
        statistics = torch.stack([self.mean.detach(), self.std.detach()])[None]
        object.__setattr__(self, "statistics", statistics)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Those that have to be stored."""
        return self.packed.nbytes + self.statistics.nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in `dtype` or the dtype it had."""
        from peftkern.onebit.codes import dequantize

        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> OneBitWeight:
        """Itself where it lies there already."""
        if self.packed.device == torch.device(device):
            return self
        packed, mean, std = (t.to(device) for t in (self.packed, self.mean, self.std))
        return OneBitWeight(packed, mean, std, self.shape, self.bits, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """A file may be read to another device, or by another version: they order bytes anew."""
        return {**self.__dict__, "_laid_out": []}

    def laid_out(self) -> Tensor:
        """The bytes as the kernel of `onebit_linear` on this device reads them; made once.

        Not kept where other functions stand in for the kernels, which may order them otherwise.
        """
        if self._laid_out and not _native.Instead.entered:
            return self._laid_out[0]
        op = torch.ops.peftkern.onebit_lay_out.default
        laid_out: Tensor = op(self.packed, self.bits, self.shape[1])
        if not _native.Instead.entered and not torch.compiler.is_compiling():
            self._laid_out.append(laid_out)
        return laid_out
