"""Between weights, codes and bytes of onebit, in Triton.

Code i of a row stands in byte i // (8 / bits), at bit bits * (i % (8 / bits)), the lowest first;
what is left of a row's last byte is zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import narrow, widen
from peftkern.kernels.onebit_levels import code_of, load_statistics, value_of
from peftkern.onebit import fallback, reference

BLOCK_N, BLOCK_BYTES = 16, 32  # rows and bytes of one program


@triton.jit
def _places(
    rows, columns, width, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BYTES: tl.constexpr
):
    """The bytes and codes of a tile.

    -> where bytes stand [BLOCK_N, BLOCK_BYTES, 1] and which there are, where codes stand
    [BLOCK_N, BLOCK_BYTES, 8 / BITS] and which there are, and the shift of each code in its byte.
    """
    EACH: tl.constexpr = 8 // BITS
    tiles = tl.cdiv(width, BLOCK_BYTES)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    byte = tl.program_id(0) % tiles * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :, None]
    lane = tl.arange(0, EACH)[None, None, :]
    column = byte * EACH + lane
    row = n.to(tl.int64)
    is_row = n < rows
    return (
        row * width + byte,
        is_row & (byte < width),
        row * columns + column,
        is_row & (column < columns),
        lane * BITS,
    )


@triton.jit
def encode_kernel(
    weight_ptr,  # [rows, columns], float32, bfloat16 or float16
    statistics_ptr,  # [2] float32
    packed_ptr,  # [rows, width] uint8
    rows,
    columns,
    width,  # bytes of a row
    BITS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Floor: the bytes of the weight read, of the codes written."""
    byte, is_byte, place, inside, shift = _places(rows, columns, width, BITS, BLOCK_N, BLOCK_BYTES)
    mean, std = load_statistics(statistics_ptr, 0)
    weight = widen(tl.load(weight_ptr + place, mask=inside, other=0))
    code = tl.where(inside, code_of(weight, mean, std, THRESHOLDS), 0)
    packed = tl.sum(code << shift, 2, keep_dims=True)
    tl.store(packed_ptr + byte, packed.to(tl.uint8), mask=is_byte)


@triton.jit
def pack_kernel(
    code_ptr,  # [rows, columns] uint8
    packed_ptr,  # [rows, width] uint8
    rows,
    columns,
    width,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Floor: the bytes of the codes read, of the packed ones written."""
    byte, is_byte, place, inside, shift = _places(rows, columns, width, BITS, BLOCK_N, BLOCK_BYTES)
    code = tl.load(code_ptr + place, mask=inside, other=0).to(tl.int32) & (2**BITS - 1)
    packed = tl.sum(code << shift, 2, keep_dims=True)
    tl.store(packed_ptr + byte, packed.to(tl.uint8), mask=is_byte)


@triton.jit
def unpack_kernel(
    packed_ptr,  # [rows, width] uint8
    statistics_ptr,  # [2] float32, or None: the codes themselves are written
    out_ptr,  # [rows, columns] uint8, or of any float dtype
    rows,
    columns,
    width,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    CENTRED: tl.constexpr,  # without the mean
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    """Codes, or W, rounded once. Floor: the bytes of the packed codes read, of `out` written."""
    byte, is_byte, place, inside, shift = _places(rows, columns, width, BITS, BLOCK_N, BLOCK_BYTES)
    code = tl.load(packed_ptr + byte, mask=is_byte, other=0).to(tl.int32)
    code = (code >> shift) & (2**BITS - 1)
    if statistics_ptr is None:
        tl.store(out_ptr + place, code.to(tl.uint8), mask=inside)
    else:
        mean, std = load_statistics(statistics_ptr, 0)
        value = value_of(code, 0.0 if CENTRED else mean, std, LEVELS)
        tl.store(out_ptr + place, narrow(value, out_ptr.dtype.element_ty), mask=inside)


def encode(weight: Tensor, statistics: Tensor, bits: int) -> Tensor:
    if weight.dtype == torch.float64:
        return fallback.encode(weight, statistics, bits)
    rows, columns = weight.shape
    packed = weight.new_empty(rows, triton.cdiv(columns * bits, 8), dtype=torch.uint8)
    if packed.numel():
        encode_kernel[_grid(packed)](
            weight, statistics, packed, rows, columns, packed.shape[1], **_blocks(bits),
            THRESHOLDS=reference.thresholds(bits),
        )  # fmt: skip
    return packed


def pack(codes: Tensor, bits: int) -> Tensor:
    *lead, columns = codes.shape
    packed = codes.new_empty(*lead, triton.cdiv(columns * bits, 8))
    if packed.numel():
        rows, width = codes.numel() // columns, packed.shape[-1]
        pack_kernel[_grid(packed)](codes, packed, rows, columns, width, **_blocks(bits))
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    out = packed.new_empty(*packed.shape[:-1], width)
    decode(packed, None, bits, out)
    return out


def dequantize(
    packed: Tensor, statistics: Tensor, bits: int, width: int, dtype: torch.dtype
) -> Tensor:
    if statistics.dtype == torch.float64:
        return fallback.dequantize(packed, statistics, bits, width, dtype)
    out = packed.new_empty(len(packed), width, dtype=dtype)
    decode(packed, statistics, bits, out)
    return out


def decode(
    packed: Tensor, statistics: Tensor | None, bits: int, out: Tensor, centred: bool = False
) -> None:
    """Fills `out` with codes, or with W; centred: without its mean.

    Args:
        packed: uint8 `[..., bytes]`, as many as the codes of a row take, or more.
        out: `[..., columns]`; uint8, or with statistics of any float dtype.
    """
    if out.numel():
        rows, columns = out.numel() // out.shape[-1], out.shape[-1]
        unpack_kernel[_grid(packed)](
            packed, statistics, out, rows, columns, packed.shape[-1], **_blocks(bits),
            LEVELS=reference.levels(bits),
            CENTRED=centred,
            enable_fp_fusion=False,
        )  # fmt: skip


def _grid(packed: Tensor) -> tuple[int]:
    width = packed.shape[-1]
    rows = packed.numel() // width
    return (triton.cdiv(rows, BLOCK_N) * triton.cdiv(width, BLOCK_BYTES),)


def _blocks(bits: int) -> dict[str, int]:
    return {"BITS": bits, "BLOCK_N": BLOCK_N, "BLOCK_BYTES": BLOCK_BYTES}
