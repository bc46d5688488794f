"""Many rows of one expert: panels of the weight, decoded for the library's product.

    y[:, rows]         = x panel^T     a panel of rows of W
    grad_x[:, columns] = g panel       a panel of its columns, so that no sum is rounded between two

A panel is small enough to lie in the cache when the product reads it, so what it costs beyond the
product is a read of the packed weight: 0.56 bytes a weight instead of the 4.56 of a weight that is
decoded whole. Bias and low-rank term are written to the output first, and the product adds to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.qlora_gemm import gemm
from peftkern.kernels.qlora_tiles import decode_arguments, decode_tile

PANEL_BYTES = 16 * 2**20  # half of the smallest of today's large caches
PANEL_STEP = 128  # rows and columns: a panel ends where a tile of the product does
BLOCK_N, BLOCK_K = 32, 128


@triton.jit(do_not_specialize=["height"])  # the last panel is of any
def panel_kernel(
    weight_ptr,  # and its parts, as decode_tile takes them: [1, rows, columns]
    absmax_ptr,
    codebook_ptr,
    nested_absmax_ptr,
    nested_map_ptr,
    nested_offset_ptr,
    out_ptr,  # [height, width]
    row,  # the panel's first row and column, multiples of BLOCK_N and BLOCK_K
    column,
    height,
    width,
    rows,
    columns,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Floor: bytes of the packed panel read, of the panel written."""
    tiles = tl.cdiv(width, BLOCK_K)
    below, right = tl.program_id(0) // tiles * BLOCK_N, tl.program_id(0) % tiles * BLOCK_K
    value = decode_tile(
        weight_ptr, absmax_ptr, codebook_ptr, nested_absmax_ptr, nested_map_ptr, nested_offset_ptr,
        tl.program_id(0) * 0, row + below, column + right, rows, columns, out_ptr.dtype.element_ty,
        BITS, BLOCK_SIZE, NESTED, ALIGNED, EVEN, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    n, k = below + tl.arange(0, BLOCK_N), right + tl.arange(0, BLOCK_K)
    place = out_ptr + n.to(tl.int64)[:, None] * width + k[None, :]
    tl.store(place, value, mask=(n < height)[:, None] & (k < width)[None, :])


def linear(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], out: Tensor, bias: Tensor | None,
    down: Tensor | None, lora_b: Tensor | None, scale: float, offsets: Tensor | None,
    adapter: Tensor | None,
) -> None:  # fmt: skip
    """out = x W^T + bias + scale * down B^T for one expert; arguments as `gemm` takes them."""
    started = bias is not None or down is not None
    if started:
        gemm(x, weight, layout, out, bias, down, lora_b, scale, offsets, adapter, has_base=False)
    for begin, end, panel in _panels(weight, layout, x.dtype, over_rows=False):
        _product(out[:, begin:end], x, panel.t(), started)


def grad_x(
    grad: Tensor, weight: Sequence[Tensor], layout: Sequence[int], out: Tensor, up: Tensor | None,
    lora_a: Tensor | None, scale: float, offsets: Tensor | None, adapter: Tensor | None,
    dropout: float, seed: Tensor | None, add: bool = False,
) -> None:  # fmt: skip
    """out = g W + scale * D'(up A) for one expert; arguments as `gemm` takes them over_rows.

    add: to what `out` holds.
    """
    if up is not None:
        gemm(
            grad, weight, layout, out, None, up, lora_a, scale, offsets, adapter, dropout, seed,
            over_rows=True, has_base=False, add=add,
        )  # fmt: skip
    for begin, end, panel in _panels(weight, layout, grad.dtype, over_rows=True):
        _product(out[:, begin:end], grad, panel, add or up is not None)


def _product(out: Tensor, left: Tensor, right: Tensor, started: bool) -> None:
    if started:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _panels(
    weight: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype, over_rows: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Begin and end of each panel, of rows or, over_rows, of columns; and its weights in `dtype`.

    All lie in one buffer: a panel is gone when the next one comes. A dense weight in this dtype is
    one panel; in another one it is rounded panel by panel, so that no second weight lies around.
    """
    _, rows, columns, _, bits = layout
    length, other = (columns, rows) if over_rows else (rows, columns)
    if bits == 0 and weight[0].dtype == dtype:
        yield 0, length, weight[0].view(rows, columns)
        return
    count = max(triton.cdiv(rows * columns * dtype.itemsize, PANEL_BYTES), 1)
    size = triton.cdiv(triton.cdiv(length, count), PANEL_STEP) * PANEL_STEP
    buffer = weight[0].new_empty(min(size, length) * other, dtype=dtype)
    for begin in range(0, length, size):
        end = min(begin + size, length)
        shape = (rows, end - begin) if over_rows else (end - begin, columns)
        panel = buffer[: shape[0] * shape[1]].view(shape)
        if panel.numel():
            decode(panel, weight, layout, *((0, begin) if over_rows else (begin, 0)))
        yield begin, end, panel


def decode(
    panel: Tensor, weight: Sequence[Tensor], layout: Sequence[int], row: int = 0, column: int = 0
) -> None:
    """Fills a panel, of any float dtype, with W[row : row + height, column : column + width].

    Args:
        weight, layout: as every op takes them, of one expert.
        row, column: multiples of PANEL_STEP.
    """
    _, rows, columns, block_size, bits = layout
    height, width = panel.shape
    panel_kernel[(triton.cdiv(height, BLOCK_N) * triton.cdiv(width, BLOCK_K),)](
        *decode_arguments(weight),
        panel,
        row,
        column,
        height,
        width,
        rows,
        columns,
        BITS=bits,
        BLOCK_SIZE=block_size,
        NESTED=len(weight) > 3,
        ALIGNED=block_size == 0 or columns % block_size == 0,
        EVEN=columns % BLOCK_K == 0,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        # A nested scale is a product and a sum, rounded twice as everywhere else.
        enable_fp_fusion=False,
    )
