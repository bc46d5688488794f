"""qlora's kernels in Triton. Launchers have the ops' own signatures."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

# Elements a program decodes. One byte in, up to 16 out: any size that fills a GPU will do.
BLOCK_ELEMENTS = 2048
NESTED_BLOCK = 256


@triton.jit
def _dequantize_kernel(
    packed_ptr,  # [ceil(count / 2)] uint8, the first code of a pair in the high bits
    absmax_ptr,  # [ceil(count / block_size)] float32, or uint8 codes where the scales are nested
    codebook_ptr,  # [16] float32
    nested_absmax_ptr,  # [ceil(blocks / 256)] float32
    nested_map_ptr,  # [256] float32
    nested_offset_ptr,  # [] float32
    out_ptr,  # [count]
    count,
    block_size,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    byte = tl.load(packed_ptr + element // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    block = element // block_size
    scale = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        scale = tl.load(nested_map_ptr + scale.to(tl.int32))
        scale *= tl.load(nested_absmax_ptr + block // NESTED_BLOCK, mask=mask, other=0)
        scale += tl.load(nested_offset_ptr)
    value = tl.load(codebook_ptr + code) * scale
    tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_rows_kernel(
    codes_ptr,  # [rows, columns] int8
    absmax_ptr,  # [rows] float32
    out_ptr,  # [rows, columns]
    count,
    columns,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    code = tl.load(codes_ptr + element, mask=mask, other=0).to(tl.float32)
    # A division that rounds to nearest, as everywhere else; `/` is off by an ulp on a GPU.
    scale = tl.div_rn(tl.load(absmax_ptr + element // columns, mask=mask, other=0), 127.0)
    tl.store(out_ptr + element, (code * scale).to(out_ptr.dtype.element_ty), mask=mask)


def dequantize(weight: Sequence[Tensor], layout: Sequence[int], out: Tensor) -> None:
    count = out.numel()
    if count == 0:
        return
    grid = (triton.cdiv(count, BLOCK_ELEMENTS),)
    _, _, columns, block_size, bits = layout
    if bits == 8:
        codes, absmax = weight
        _dequantize_rows_kernel[grid](codes, absmax, out, count, columns, BLOCK=BLOCK_ELEMENTS)
        return
    packed, absmax, codebook, *nested = weight
    _dequantize_kernel[grid](
        packed,
        absmax,
        codebook,
        *(nested or [None] * 3),
        out,
        count,
        block_size,
        NESTED=bool(nested),
        NESTED_BLOCK=NESTED_BLOCK,
        BLOCK=BLOCK_ELEMENTS,
        # A nested scale is a product and a sum, rounded twice as everywhere else.
        enable_fp_fusion=False,
    )
