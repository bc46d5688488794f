"""The backward launcher of qlora: what the gradient g of y gives to each operand.

    t = scale * g B         grad_x = g W + D(t A)          grad_a    = t^T D(x)
                            grad_b = scale * g^T down      grad_bias = sum of g

The first by the forward's product with the sides of W swapped, or by panels; the others by the
kernels of qlora_sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_panels as panels
from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.common import dot, narrow, rows_of
from peftkern.kernels.qlora_gemm import gemm
from peftkern.kernels.qlora_strips import Groups, by_adapter
from peftkern.kernels.qlora_sums import grad_a, lora_bwd
from peftkern.qlora import fallback


@triton.jit
def grad_weight_kernel(
    grad_ptr,  # [rows, outputs]
    x_ptr,  # [rows, columns]
    offsets_ptr,  # [experts + 1]
    out_ptr,  # [experts, outputs, columns]
    outputs,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of g^T x over the rows of one expert.

    Floor: g and x read, the gradient written; 2 * rows * outputs * columns operations.
    """
    tiles = tl.cdiv(columns, BLOCK_K)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.program_id(1).to(tl.int64)
    is_n, is_k = (n < outputs)[None, :], (k < columns)[None, :]
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    sum = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(begin, end, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        grad = tl.load(grad_ptr + row * outputs + n[None, :], mask=(row < end) & is_n, other=0)
        x = tl.load(x_ptr + row * columns + k[None, :], mask=(row < end) & is_k, other=0)
        sum = dot(tl.trans(grad), x, sum)
    to = out_ptr + (expert * outputs + n)[:, None] * columns + k[None, :]
    tl.store(to, narrow(sum, out_ptr.dtype.element_ty), mask=(n < outputs)[:, None] & is_k)


def _product(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """g^T x, rounded once."""
    if dtype == x.dtype or len(x) == 0:
        return torch.mm(grad.t(), x).to(dtype)
    if x.is_cuda and dtype == torch.float32:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    sums = torch.promote_types(x.dtype, torch.float32)  # the CPU, for the interpreter, has no other
    return torch.mm(grad.t().to(sums), x.to(sums)).to(dtype)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
    """The gradient of a dense weight, in its shape and dtype."""
    outputs, columns = weight.shape[-2:]
    if offsets is None or len(offsets) == 2:
        return _product(grad, x, weight.dtype).view(weight.shape)
    out = torch.empty_like(weight)
    tile = paths.tile("grad_weight", x.device, x.dtype, len(x))
    programs = triton.cdiv(outputs, tile.outputs) * triton.cdiv(columns, tile.inner)
    if programs:
        grad_weight_kernel[(programs, len(weight))](
            grad, x, offsets, out, outputs, columns,
            BLOCK_M=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def gradients(
    grad: Tensor, x: Tensor | None, down: Tensor, weight: Sequence[Tensor], layout: Sequence[int],
    bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scale: float,
    dropout: float, seed: Tensor | None, offsets: Tensor | None, adapter: Tensor | None,
    needs: Sequence[bool], grad_x: Tensor | None, add: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Writes grad_x `[rows, columns]`, or adds to it, where it is given; returns the others."""
    _, needs_weight, needs_bias, needs_a, needs_b = needs
    groups = by_expert = Groups(layout[0], offsets)
    if lora_a is not None and adapter is not None:
        groups = by_adapter(adapter, len(lora_a))
    found = []
    if needs_weight and x is not None:
        found.append(grad_weight(grad, x, weight[0], offsets))
    t = None
    if lora_a is not None and (grad_x is not None or needs_a):
        t = grad.new_empty(len(grad), lora_a.shape[-2], dtype=torch.float32)
    grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else None
    grad_b = torch.empty_like(lora_b) if needs_b and lora_b is not None else None
    if groups is by_expert:
        lora_bwd(grad, down, lora_b, scale, groups, t, grad_b, grad_bias)
    else:
        lora_bwd(grad, down, lora_b, scale, groups, t, grad_b, None)
        lora_bwd(grad, down, None, scale, by_expert, None, None, grad_bias)
    if grad_bias is not None:
        found.append(grad_bias)
    if needs_a and lora_a is not None and t is not None and x is not None:
        found.append(grad_a(t, x, dropout, seed, groups, torch.empty_like(lora_a)))
    if grad_b is not None:
        found.append(grad_b)
    if grad_x is not None:
        experts, *_, bits = layout
        path = paths.choose(grad.device, grad.dtype, len(grad), experts, bits, decodes=False)
        low_rank = (t, lora_a, 1.0, offsets, adapter, dropout, seed)  # t has the scale already
        if path == "gemm":
            gemm(grad, weight, layout, grad_x, None, *low_rank, over_rows=True, add=add)
        else:
            panels.grad_x(grad, weight, layout, grad_x, *low_rank, add)
    return found


def linear_bwd(
    grad: Tensor, x: Tensor | None, down: Tensor, weight: Sequence[Tensor], layout: Sequence[int],
    bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scale: float,
    dropout: float, seed: Tensor | None, offsets: Tensor | None, adapter: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    if grad.dtype == torch.float64:
        return fallback.linear_bwd(
            grad, x, down, weight, layout, bias, lora_a, lora_b, scale, dropout, seed, offsets,
            adapter, needs,
        )  # fmt: skip
    grad_x = grad.new_empty(*grad.shape[:-1], layout[2]) if needs[0] else None
    found = gradients(
        rows_of(grad), rows_of(x), down, weight, layout, bias, lora_a, lora_b, scale, dropout, seed,
        offsets, adapter, needs, rows_of(grad_x),
    )  # fmt: skip
    return found if grad_x is None else [grad_x, *found]
