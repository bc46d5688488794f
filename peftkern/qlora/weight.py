"""What a quantised weight is: a format, and its producer's bytes, shared and never changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkern.qlora import reference

if TYPE_CHECKING:
    from bitsandbytes.nn import Params4bit

BLOCK_SIZES = tuple(2**i for i in range(4, 13))
BITSANDBYTES_BLOCK_SIZES = BLOCK_SIZES[1:]


@dataclass(frozen=True)
class Format:
    """A frozen description of an encoding: value = codebook[code] * absmax of its block.

    Codes of `bits` bits lie in row-major order, the first in the high bits of a byte; a block is
    `block_size` consecutive elements of the flat weight.

    Args:
        name: what users and files call it.
        bits: the width of a code.
        codebook: the `2 ** bits` values, increasing, in [-1, 1].
    """

    name: str
    bits: int
    codebook: tuple[float, ...] = field(repr=False)


formats = {"nf4": Format("nf4", 4, reference.NF4)}


def _bytes(packed: Tensor) -> Tensor:
    """uint8 `[bytes, 1]` of any storage dtype that bitsandbytes packs into, in the same storage."""
    return packed.reshape(-1).view(torch.uint8).view(-1, 1)


def find_format(name: str | Format) -> Format:
    if isinstance(name, Format):
        return name
    if name not in formats:
        raise ValueError(f"format must be one of {', '.join(formats)}, got {name!r}")
    return formats[name]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as its producer stores it (bitsandbytes' bytes for NF4); immutable.

    Args:
        packed: uint8 `[ceil(n / 2), 1]`, two codes a byte, the first in the high nibble.
        absmax: float32 `[ceil(n / block_size)]`; nested: uint8 codes of the same shape.
        codebook: float32 `[16]`.
        shape: the logical shape.
        dtype: the dtype it had, and has again when dequantised.
        format: the encoding.
        block_size: elements of the flat weight that share a scale, a power of two from 16 to 4096.
        nested_absmax: float32 `[ceil(blocks / 256)]`, the scales of the scales; None when plain.
        nested_map: float32 `[256]`, what a scale's code means.
        nested_offset: float32 `[]`, the mean that was taken off the scales.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    shape: torch.Size
    dtype: torch.dtype
    format: Format
    block_size: int
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors, in the order in which every op takes them."""
        plain = [self.packed, self.absmax, self.codebook]
        if self.nested_absmax is None:
            return plain
        assert self.nested_map is not None and self.nested_offset is not None
        return [*plain, self.nested_absmax, self.nested_map, self.nested_offset]

    @property
    def layout(self) -> list[int]:
        """experts, rows, columns, block size: what every op needs beside the tensors."""
        *leading, columns = self.shape if self.shape else (1,)
        if len(leading) == 2:
            return [leading[0], leading[1], columns, self.block_size]
        return [1, torch.Size(leading).numel(), columns, self.block_size]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in `dtype` or the dtype it had."""
        from peftkern.qlora.ops import dequantize

        return dequantize(self, dtype)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Shares what lies there already, copies the rest."""
        return replace(self.scales_to(device), packed=self.packed.to(device))

    def with_bytes(self, packed: Tensor) -> QuantizedWeight:
        """The same scales over other bytes; as `dataclasses.replace`, in a fifth of its time.

        Raises:
            TypeError: a cast has gone over the bytes, such as a mixed precision policy's.
        """
        if packed.dtype != self.packed.dtype:
            raise TypeError(f"weight must be {self.packed.dtype}, got {packed.dtype}")
        twin = object.__new__(QuantizedWeight)
        vars(twin).update(vars(self), packed=packed)
        return twin

    def without_bytes(self) -> QuantizedWeight:
        """The scales alone, which keep no bytes alive."""
        return self.with_bytes(self.packed.new_empty(0))

    def scales_to(self, device: torch.device | str) -> QuantizedWeight:
        tensors: dict[str, Any] = {
            k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "packed"
        }
        if all(t.device == torch.device(device) for t in tensors.values()):
            return self
        return replace(self, **{k: t.to(device) for k, t in tensors.items()})

    def statistics(self) -> dict[str, Tensor]:
        """All but the packed bytes, under bitsandbytes' names of them in a state dict."""
        named = {"absmax": self.absmax, "quant_map": self.codebook}
        facts: dict[str, Any] = {
            "quant_type": self.format.name,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested:
            assert self.nested_absmax is not None and self.nested_map is not None
            assert self.nested_offset is not None
            named["nested_absmax"], named["nested_quant_map"] = self.nested_absmax, self.nested_map
            facts["nested_blocksize"] = reference.NESTED_BLOCK_SIZE
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = self.nested_offset.item()
        text = bytearray(json.dumps(facts).encode())
        key = f"quant_state.bitsandbytes__{self.format.name}"
        return named | {key: torch.frombuffer(text, dtype=torch.uint8)}

    def with_statistics(self, packed: Tensor, named: dict[str, Tensor]) -> QuantizedWeight:
        """The weight that a state dict holds, which must be of this one's format and shape.

        Raises:
            ValueError: a part is missing or does not fit.
        """
        key = f"quant_state.bitsandbytes__{self.format.name}"
        missing = [k for k in ("absmax", "quant_map", key) if k not in named]
        if missing:
            raise ValueError(f"state_dict must have {', '.join(missing)}, got {sorted(named)}")
        nested = "nested_absmax" in named
        try:
            facts = json.loads(bytes(named[key].cpu().numpy()))
            dtype, offset = (
                getattr(torch, facts["dtype"]),
                facts["nested_offset"] if nested else 0.0,
            )
            weight = QuantizedWeight(
                packed=_bytes(packed),
                absmax=named["absmax"],
                codebook=named["quant_map"],
                shape=torch.Size(facts["shape"]),
                dtype=dtype,
                format=self.format,
                block_size=facts["blocksize"],
                nested_absmax=named["nested_absmax"] if nested else None,
                nested_map=named["nested_quant_map"] if nested else None,
                nested_offset=torch.tensor(offset, dtype=torch.float32) if nested else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{key} must be what bitsandbytes writes, got {error!r}") from error
        if weight.shape != self.shape:
            raise ValueError(f"shape must be {list(self.shape)}, got {list(weight.shape)}")
        weight._check_sizes()
        return weight

    def _check_sizes(self) -> None:
        """What is read from a file must not lead a kernel past the end of a tensor."""
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {self.block_size}")
        count = self.shape.numel()
        blocks = -(-count // self.block_size)
        byte, single = torch.uint8, torch.float32
        wanted: list[tuple[str, Tensor | None, list[int], torch.dtype]] = [
            ("weight", self.packed, [-(-count // 2), 1], byte),
            ("absmax", self.absmax, [blocks], byte if self.nested else single),
            ("quant_map", self.codebook, [2**self.format.bits], single),
        ]
        if self.nested:
            groups = -(-blocks // reference.NESTED_BLOCK_SIZE)
            wanted.append(("nested_absmax", self.nested_absmax, [groups], single))
            wanted.append(("nested_quant_map", self.nested_map, [256], single))
        for name, tensor, shape, dtype in wanted:
            if tensor is None or list(tensor.shape) != shape or tensor.dtype != dtype:
                got = None if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{name} must be {shape} {dtype}, got {got}")

    @classmethod
    def from_bnb(cls, params: Params4bit) -> QuantizedWeight:
        """The weight of a bitsandbytes `Linear4bit`, sharing its storage.

        Raises:
            TypeError: not a quantised `Params4bit`.
            ValueError: a format that peftkern does not know, or a weight that bitsandbytes has
                repacked at an eval forward on a CPU, which rounds its scales.
        """
        state = getattr(params, "quant_state", None)
        if state is None:
            raise TypeError(f"params must be a quantised Params4bit, got {type(params).__name__}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("params must be as they were quantised, got them repacked for a CPU")
        second = state.state2 if state.nested else None
        return cls(
            packed=_bytes(params.data),
            absmax=state.absmax,
            codebook=state.code,
            shape=torch.Size(state.shape),
            dtype=state.dtype,
            format=find_format(state.quant_type),
            block_size=state.blocksize,
            nested_absmax=second.absmax if second else None,
            nested_map=second.code if second else None,
            nested_offset=torch.as_tensor(state.offset) if second else None,
        )

    def to_bnb(self) -> Params4bit:
        """A bitsandbytes `Params4bit` that shares this storage.

        Raises:
            ValueError: a block size that bitsandbytes does not read.
        """
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn import Params4bit

        if self.block_size not in BITSANDBYTES_BLOCK_SIZES:
            raise ValueError(
                f"block_size must be one of {BITSANDBYTES_BLOCK_SIZES} for bitsandbytes, "
                f"got {self.block_size}"
            )
        nested: dict[str, Any] = {}
        if self.nested:
            second = QuantState(
                absmax=self.nested_absmax,
                code=self.nested_map,
                blocksize=reference.NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            )
            nested = {"offset": self.nested_offset, "state2": second}
        state = QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=self.codebook,
            blocksize=self.block_size,
            quant_type=self.format.name,
            dtype=self.dtype,
            **nested,
        )
        return Params4bit(
            data=self.packed,
            requires_grad=False,
            quant_state=state,
            blocksize=self.block_size,
            compress_statistics=self.nested,
            quant_type=self.format.name,
            bnb_quantized=True,
        )
