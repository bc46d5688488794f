"""The gradient of a sparse convolution's packed values in Triton: the unfolded input is never made.

    values[e] = scale * sum over b, p, q of grad[b, i, p, q]
                x[b, c, p sh - ph + r dh, q sw - pw + s dw]

Entry e of the pattern lies in row i and in column (c kh + r) kw + s; c counts from the first
channel of i's group on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.common import dot
from peftkern.kernels.qlora_forward import add_up
from peftkern.kernels.sparse_sddmm import ENTRIES, GROUP, store_entries, tile_of
from peftkern.kernels.sparse_tiles import Operand
from peftkern.sparse import fallback


@triton.jit
def _outputs_of(token, grad_shape):
    """-> image, row and column of an output, where they are counted through."""
    height, width = grad_shape[2], grad_shape[3]
    return token // (height * width), token // width % height, token % width


@triton.jit
def _load_x(x_ptr, x_shape, x_stride, grad_shape, window, token, inside, channel, r, s):
    """What these outputs [BLOCK_M] see through these places [BLOCK_J] of the kernel."""
    _, _, sh, sw, ph, pw, dh, dw, _ = window
    image, p, q = _outputs_of(token, grad_shape)
    y = (p * sh - ph)[:, None] + (r * dh)[None, :]
    x = (q * sw - pw)[:, None] + (s * dw)[None, :]
    seen = inside & (y >= 0) & (y < x_shape[2]) & (x >= 0) & (x < x_shape[3])
    lead = image.to(tl.int64)[:, None] * x_stride[0] + channel.to(tl.int64)[None, :] * x_stride[1]
    place = lead + y.to(tl.int64) * x_stride[2] + x.to(tl.int64) * x_stride[3]
    return tl.load(x_ptr + place, mask=seen, other=0)


@triton.jit(do_not_specialize=["inputs"])
def conv2d_sddmm_kernel(
    x_ptr,  # [images, channels, height, width], float32, bfloat16 or float16
    grad_ptr,  # [images, rows, height, width]
    first_ptr,
    second_ptr,
    out_ptr,  # [splits, nnz] float32
    x_shape,  # these four of four numbers
    x_stride,
    grad_shape,
    grad_stride,
    window,  # kernel, stride, padding and dilation, each of height and width; groups
    inputs,  # images, by the height and the width of grad
    columns,
    nnz,
    part,  # outputs that one split adds up, a multiple of BLOCK_M
    scale,
    CSR: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of rows of one group and of columns, of one split of the outputs.

    Floor: 2 inputs rows columns operations; bytes of x and of grad read once (L2 holds them), of
    the pattern, and 4 for each entry and split. Each element of x comes by itself, from an address
    of its own.
    """
    per_group = grad_shape[1] // window[8]
    tiles, across = tl.cdiv(per_group, BLOCK_I), tl.cdiv(columns, BLOCK_J)
    below, right = tile_of(tl.program_id(0), tiles * window[8], across, GROUP)
    group = below // tiles
    limit = (group + 1) * per_group
    row = group * per_group + below % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    column = right * BLOCK_J
    j = column + tl.arange(0, BLOCK_J)
    r, s = j // window[1] % window[0], j % window[1]
    channel = group * (x_shape[1] // window[8]) + j // (window[0] * window[1])
    split = tl.program_id(1).to(tl.int64)
    from_grad = grad_ptr + row.to(tl.int64)[:, None] * grad_stride[1]
    sum = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    begin = split * part
    end = tl.minimum(begin + part, inputs)
    for start in range(begin, end, BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        inside = token < end
        image, p, q = _outputs_of(token, grad_shape)
        place = image.to(tl.int64) * grad_stride[0] + p.to(tl.int64) * grad_stride[2]
        place = from_grad + (place + q.to(tl.int64) * grad_stride[3])[None, :]
        grad = tl.load(place, mask=(row < limit)[:, None] & inside[None, :], other=0)
        x = _load_x(
            x_ptr, x_shape, x_stride, grad_shape, window, token,
            inside[:, None] & (j < columns)[None, :], channel, r, s,
        )  # fmt: skip
        sum = dot(grad, x, sum)
    store_entries(
        sum * scale, first_ptr, second_ptr, out_ptr + split * nnz, row, column, limit, columns,
        CSR, False, STEPS, ENTRIES, BLOCK_I, BLOCK_J,
    )  # fmt: skip


def conv2d_sddmm(
    x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    window: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64:
        return fallback.conv2d_sddmm(x, grad, pattern, layout, window, scale)
    operand = Operand.of(pattern, layout)
    values = x.new_empty(operand.nnz, dtype=torch.float32)
    if operand.nnz == 0:
        return values
    inputs, groups = grad.numel() // operand.rows, window[-1]
    tile = paths.tile("conv2d_sddmm", x.device, x.dtype, operand.rows)
    programs = groups * triton.cdiv(operand.rows // groups, tile.rows)
    programs *= triton.cdiv(operand.columns, tile.outputs)
    splits = paths.splits(tile, programs, inputs, x.device)
    parts = values if splits == 1 else values.new_empty(splits, operand.nnz)
    conv2d_sddmm_kernel[(programs, splits)](
        x, grad, operand.first, operand.second, parts, tuple(x.shape), x.stride(),
        tuple(grad.shape), grad.stride(), tuple(window), inputs, operand.columns, operand.nnz,
        triton.cdiv(triton.cdiv(inputs, splits), tile.inner) * tile.inner, scale,
        CSR=operand.csr,
        STEPS=operand.steps,
        GROUP=GROUP,
        ENTRIES=ENTRIES,
        BLOCK_I=tile.rows,
        BLOCK_J=tile.outputs,
        BLOCK_M=tile.inner,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        add_up(parts, values)
    return values
