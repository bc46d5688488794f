"""onebit's index: `linear`, its ops and their gradient. codes.py has what makes a weight's codes,
branch.py the adapter of two such weights.

A quantised weight is never kept for a backward: it is made again from the latent weight and its
statistics `[n, 2]`, the mean and the std of each matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _inputs, _native
from peftkern.onebit import check, codes, fallback
from peftkern.onebit.weight import OneBitWeight
from peftkern.qlora.ops import operand

# A bijection: the same codes in the order in which the device's `onebit_linear` reads them.
_native.define(
    "onebit_lay_out(Tensor packed, int bits, int width) -> Tensor",
    lambda packed, bits, width: packed.new_empty(fallback.laid_out_bytes(packed, bits, width)),
    fallback.lay_out,
)
_native.register_triton("onebit", "lay_out")
_linear_op = _native.define(
    "onebit_linear(Tensor x, Tensor laid_out, Tensor statistics, int bits, int rows, Tensor? bias) "
    "-> Tensor",
    lambda x, laid_out, statistics, bits, rows, bias: x.new_empty(*x.shape[:-1], rows),
    fallback.linear,
)
_native.register_triton("onebit", "linear")
# What linear's launcher calls on a GPU for few rows (at most 16) of x `[rows, in]`, which is not
# float64; `laid_out` as that launcher's own kernels read it.
_native.define(
    "onebit_decode(Tensor x, Tensor laid_out, Tensor statistics, int bits, int rows, Tensor? bias) "
    "-> Tensor",
    lambda x, laid_out, statistics, bits, rows, bias: x.new_empty(*x.shape[:-1], rows),
    fallback.decode,
    devices=("cuda",),
)
_PANEL = 2**22  # elements of a weight that are dequantised at a time


class _Latent(torch.autograd.Function):
    """Keeps the latent weight and its statistics, and x where the weight trains."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, statistics: Tensor | None,
        bits: int,
    ) -> Tensor:  # fmt: skip
        if statistics is None:
            statistics = codes.statistics_op([weight])
        dense = codes.quantize_op([weight], statistics, bits)
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if weight_trains else None, weight, bias if bias_trains else None, statistics
        )
        ctx.bits = bits
        return _product(x, dense, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dense = codes.quantize_op([weight], statistics, ctx.bits)[0] if needs[0] else weight
        # As wide as sums are, so that the gradient of a 16-bit weight is rounded once.
        wide = dense.to(statistics.dtype)
        rows, sums = math.prod(grad.shape[:-1]), torch.promote_types(grad.dtype, torch.float32)
        layout, none = operand(wide)[1], grad.new_empty(rows, 0, dtype=sums)
        found = iter(
            torch.ops.peftkern.qlora_linear_bwd(
                grad.contiguous(), x, none, [wide], layout, bias, None, None,
                1.0, 0.0, None, None, None, [*needs, False, False],
            )
        )  # fmt: skip
        grads = [next(found) if need else None for need in needs]
        if grads[1] is not None:
            grads[1] = codes.quantize_bwd_op([grads[1]], [weight], statistics, ctx.bits)[0]
        return *grads, None, None


def _product(x: Tensor, dense: list[Tensor], bias: Tensor | None) -> Tensor:
    layout, rest = operand(dense[0])[1], (None, None, 1.0, 0.0, None, None, None)
    return torch.ops.peftkern.qlora_linear(x, dense, layout, bias, *rest)[0]  # type: ignore[no-any-return]


_Bits = tuple[Tensor, Tensor, Tensor, int, int]


class _Packed(torch.autograd.Function):
    """Keeps the bits alone: x has a gradient without itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, fixed: _Bits) -> Tensor:
        _, laid_out, statistics, bits, rows = fixed
        ctx.fixed, ctx.columns = fixed, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear_op(x, laid_out, statistics, bits, rows, bias)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, _, statistics, bits, rows = ctx.fixed
        sums = torch.promote_types(grad.dtype, torch.float32)
        flat = grad.reshape(math.prod(grad.shape[:-1]), rows).to(sums)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = flat.new_zeros(len(flat), ctx.columns)
            height = max(1, _PANEL // max(1, ctx.columns))
            for begin in range(0, rows, height):
                some = slice(begin, begin + height)
                panel = codes.dequantize_op(packed[some], statistics, bits, ctx.columns, sums)
                grad_x.addmm_(flat[:, some], panel)
            grad_x = grad_x.to(grad.dtype).view(*grad.shape[:-1], ctx.columns)
        if ctx.needs_input_grad[1]:
            grad_bias = flat.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


def linear(
    x: Tensor,
    weight: Tensor | OneBitWeight,
    bias: Tensor | None = None,
    bits: int = 1,
    statistics: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias, W = mean + std * level[code] of the weight.

    Jie, Wang and Deng (2023). A latent weight trains: the gradient passes its codes straight
    through, and runs through mean and std. A OneBitWeight serves inference, on the bits. Sums run
    in float32 (float64 for float64). Under autocast x is cast as `torch.nn.functional.linear` casts
    it, and mean and std stay what they are.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64.
        weight: `[out, in]`, the latent float weight, or a OneBitWeight. Latent weights want
            float32: in 16 bits small steps of an optimiser never change a bit.
        bias: `[out]`, any float dtype.
        bits: 1, 2 or 4, of a latent weight; a OneBitWeight has its own.
        statistics: `[1, 2]` of a latent weight, as `statistics` returns them; computed where None.

    Returns:
        `[..., out]` in x's dtype. Differentiable once, in x, bias and a latent weight.

    Raises:
        TypeError: a dtype that is not float, a weight that is neither.
        ValueError: a shape, layout or device that does not fit, bits that there are not.
    """
    check.linear(x, weight, bias, statistics, bits)
    x = _inputs.autocast(x).contiguous()
    if not isinstance(weight, OneBitWeight):
        return _Latent.apply(x, weight, bias, statistics, bits)  # type: ignore[no-any-return, no-untyped-call]
    rows = weight.shape[0]
    fixed = (weight.packed, weight.laid_out(), weight.statistics, weight.bits, rows)
    if torch.is_grad_enabled():
        return _Packed.apply(x, bias, fixed)  # type: ignore[no-any-return, no-untyped-call]
    return _linear_op(x, *fixed[1:], bias)  # type: ignore[no-any-return]
