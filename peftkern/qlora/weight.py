"""A quantised weight: its producer's bytes, shared and never changed, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern.qlora import reference
from peftkern.qlora.format import BLOCK_SIZES, Format

if TYPE_CHECKING:
    from bitsandbytes.nn import Int8Params, Params4bit


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as its producer stores it (bitsandbytes' bytes, for every format); immutable.

    Args:
        packed: 4 bits: two codes a byte, the first in the high nibble; uint8 `[ceil(n / 2), 1]`, or
            those bytes seen as another dtype, as bitsandbytes' `quant_storage` has them. 8 bits:
            int8 of the weight's shape.
        absmax: the scales: float32 `[ceil(n / block_size)]`, nested uint8 codes of the same shape;
            8 bits: float32 `shape[:-1]`, one a row.
        codebook: float32 `[16]`; None for 8 bits.
        shape: the logical shape.
        dtype: the dtype it had, and has again when dequantised.
        format: the encoding.
        block_size: elements of the flat weight that share a scale, a power of two from 16 to 4096;
            None where a row shares one.
        nested_absmax: float32 `[ceil(blocks / 256)]`, the scales of the scales; None when plain.
        nested_map: float32 `[256]`, what a scale's code means.
        nested_offset: float32 `[]`, the mean that was taken off the scales.

    Raises:
        ValueError: a part is missing, does not fit, or lies elsewhere than the others.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    format: Format
    block_size: int | None
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: Tensor | None = None
    _layout: list[int] = field(init=False, repr=False)  # asked for at every call

    def __post_init__(self) -> None:
        *leading, columns = self.shape if self.shape else (1,)
        rows = leading if len(leading) == 2 else [1, torch.Size(leading).numel()]
        layout = [*rows, columns, self.block_size or 0, self.format.bits]
        object.__setattr__(self, "_layout", layout)
        self._check()

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors, in the order in which every op takes them; packed codes as bytes."""
        if self.codebook is None:
            return [self.packed, self.absmax]
        plain = [stored_as(self.packed, torch.uint8), self.absmax, self.codebook]
        if self.nested_absmax is None:
            return plain
        assert self.nested_map is not None and self.nested_offset is not None
        return [*plain, self.nested_absmax, self.nested_map, self.nested_offset]

    @property
    def layout(self) -> list[int]:
        """experts, rows, columns, block size (0: a row) and bits: what ops need beside tensors."""
        return self._layout

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in `dtype` or the dtype it had."""
        from peftkern.qlora.codes import dequantize

        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Shares what lies there already, copies the rest."""
        return self.scales_to(device)._with(packed=self.packed.to(device))

    def with_bytes(self, packed: Tensor) -> QuantizedWeight:
        """The same scales over other bytes.

        Raises:
            TypeError: a cast has gone over the bytes, such as a mixed precision policy's.
        """
        if packed.dtype != self.packed.dtype:
            raise TypeError(f"weight must be {self.packed.dtype}, got {packed.dtype}")
        return self._with(packed=packed)

    def without_bytes(self) -> QuantizedWeight:
        """The scales alone, which keep no bytes alive."""
        return self.with_bytes(self.packed.new_empty(0))

    def scales_to(self, device: torch.device | str) -> QuantizedWeight:
        tensors: dict[str, Any] = {
            k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "packed"
        }
        if all(t.device == torch.device(device) for t in tensors.values()):
            return self
        return self._with(**{k: t.to(device) for k, t in tensors.items()})

    def _with(self, **tensors: Tensor) -> QuantizedWeight:
        """As `dataclasses.replace` by tensors that fit, in a tenth of its time."""
        twin = object.__new__(QuantizedWeight)
        for name in QuantizedWeight.__dataclass_fields__:  # torch 2.11 cannot compile vars()
            object.__setattr__(twin, name, tensors.get(name, getattr(self, name)))
        return twin

    def _check(self) -> None:
        """What others have stored must not lead a kernel past the end of a tensor."""
        for name, tensor, shape, dtype in self._parts():
            if tensor is None or tensor.shape != torch.Size(shape) or tensor.dtype != dtype:
                got = None if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} must be {list(shape)} {dtype}, got {got}")
            if tensor.device != self.packed.device or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous and on {self.packed.device}, "
                    f"got strides {tensor.stride()} on {tensor.device}"
                )

    def _parts(self) -> list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]]:
        """bitsandbytes' names of the tensors, and what they must be."""
        byte, single = torch.uint8, torch.float32
        if not self.format.in_blocks:
            rows = self.shape[:-1]
            return [
                ("weight", self.packed, self.shape, torch.int8),
                ("SCB", self.absmax, rows, single),
            ]
        block_size = self.block_size or 0
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        count = self.shape.numel()
        blocks = -(-count // block_size)
        packed = stored_as(self.packed, byte)
        parts: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
            ("weight", packed, (-(-count // 2), 1), byte),
            ("absmax", self.absmax, (blocks,), byte if self.nested else single),
            ("quant_map", self.codebook, (16,), single),
        ]
        if self.nested:
            groups = -(-blocks // reference.NESTED_BLOCK_SIZE)
            parts.append(("nested_absmax", self.nested_absmax, (groups,), single))
            parts.append(("nested_quant_map", self.nested_map, (256,), single))
            parts.append(("nested_offset", self.nested_offset, (), single))
        return parts

    @classmethod
    def from_bnb(cls, params: nn.Parameter | nn.Module) -> QuantizedWeight:
        """The weight of a bitsandbytes layer, sharing its storage, before or after a forward.

        Args:
            params: a `Linear4bit` or a `Linear8bitLt`, or a weight of theirs. The first forward of
                a `Linear8bitLt` takes the scales off its weight: then it has to be the layer.

        Raises:
            TypeError: nothing that bitsandbytes has quantised.
            ValueError: a format that peftkern does not know, or a weight that bitsandbytes has
                repacked at an eval forward on a CPU, which rounds its scales.
        """
        from peftkern.qlora import bnb

        return bnb.taken(params)

    def to_bnb(self) -> Params4bit | Int8Params:
        """bitsandbytes' parameter, sharing this storage.

        Raises:
            ValueError: a block size, a format or a number of dimensions that bitsandbytes lacks.
        """
        from peftkern.qlora import bnb

        return bnb.given(self)


def stored_as(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed bytes `[n, 1]` seen as this dtype, bit for bit, in the same storage where they lie on
    a multiple of its size.
    """
    if packed.dtype == dtype:
        return packed
    flat = packed.reshape(-1).view(torch.uint8)
    if dtype.itemsize > 1 and flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(-1, 1)
