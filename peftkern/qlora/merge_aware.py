"""The forward of a layer that trains for its merge into few bits.

    W' = Q(W + scale * B A)        y = x W'^T + bias

Q is what merging stores. Backward goes straight through it: grad_x = g W', and lora_a, lora_b and
bias have the gradients of plain LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _inputs, _native
from peftkern.qlora import check, merging, ops
from peftkern.qlora.format import find_format
from peftkern.qlora.ops import _linear_bwd_op, _linear_op
from peftkern.qlora.weight import QuantizedWeight

_Fixed = tuple[list[Tensor], list[int], float]
_REST = (0.0, None, None, None)  # no dropout, no seed, no experts, no adapters by row


class _StraightThrough(torch.autograd.Function):
    """Keeps x and references; the requantised weight of its forward among them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, fixed: _Fixed
    ) -> Tensor:
        buffers, layout, _ = fixed
        ctx.save_for_backward(x, bias, lora_a, lora_b)
        ctx.fixed = fixed
        y, _ = _linear_op(x, buffers, layout, bias, None, None, 1.0, *_REST)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, lora_a, lora_b = ctx.saved_tensors
        buffers, layout, scale = ctx.fixed
        grad, (need_x, *needs, _) = grad.contiguous(), ctx.needs_input_grad
        grad_x, grads = None, iter(())
        if need_x:  # without the term, of which W' has its part
            no_term = (x.new_empty(0, dtype=_sums(x)), buffers, layout, None, None, None, 1.0)
            (grad_x,) = _linear_bwd_op(grad, x, *no_term, *_REST, [True, *[False] * 4])
        if any(needs):
            term = (_down(x, lora_a, lora_b), buffers, layout, bias, lora_a, lora_b, scale)
            grads = iter(_linear_bwd_op(grad, x, *term, *_REST, [False, False, *needs]))
        return grad_x, *[next(grads) if need else None for need in needs], None


def _down(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """x A^T `[rows, r]`, by a linear of no outputs."""
    nothing = ops.operand(x.new_empty(0, x.shape[-1]))
    return _linear_op(x, *nothing, None, lora_a, lora_b[:0], 1.0, *_REST)[1]  # type: ignore[no-any-return]


def _sums(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def linear(
    x: Tensor, base: QuantizedWeight, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor,
    scale: float, cache: Cache,
) -> Tensor:  # fmt: skip
    """y = x W'^T + bias, as `ops.linear` of the requantised weight, and differentiable as above."""
    check.linear(x, base, 2, bias, lora_a, lora_b, 0.0, None)
    a, b = lora_a.detach(), lora_b.detach()
    if torch.compiler.is_compiling():
        parts = _requantize_op(base.buffers, base.layout, base.format.name, a, b, scale)
        weight = merging.replaced(base, *parts)
    else:
        weight = cache.get(base, a, b, scale)
    if not torch.is_grad_enabled():
        return ops.linear(x, weight, bias)
    x = _inputs.autocast(x)
    fixed = (weight.buffers, weight.layout, scale)
    return _StraightThrough.apply(x.contiguous(), bias, lora_a, lora_b, fixed)  # type: ignore[no-any-return, no-untyped-call]


class Cache:
    """The last requantised weight, and what it was made of.

    A and B are compared by value: a write through `.data`, as averaging of weights makes, or
    through a pointer, as 8-bit optimisers make, leaves no trace in a tensor's version. That reads
    r * (in + out) elements and, on a GPU, waits for it. A graph of torch.compile cannot compare, so
    it requantises at every call; merging spares it that.
    """

    def __init__(self) -> None:
        self.entry: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()  # copies and pickles make their own

    def get(self, base: QuantizedWeight, a: Tensor, b: Tensor, scale: float) -> QuantizedWeight:
        if (entry := self.entry) is not None:
            weight, old_base, old_scale, old_a, old_b = entry
            # A layer makes its weight anew for each call, of the same tensors.
            same = old_base.packed is base.packed and old_base.absmax is base.absmax
            same = same and old_scale == scale
            if same and _equal(a, old_a) and _equal(b, old_b):
                return weight  # type: ignore[no-any-return]
        parts = merging.requantized(base, merging.adding(a, b, scale))
        weight = merging.replaced(base, *parts)
        # In one step, since threads may share it.
        self.entry = (weight, base, scale, a.clone(), b.clone())
        return weight


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _requantize(
    buffers: list[Tensor], layout: list[int], format: str, a: Tensor, b: Tensor, scale: float
) -> list[Tensor]:
    shape, block_size, (packed, absmax, *tables) = layout[1:3], layout[3] or None, buffers
    codebook, nested = (tables[0], tables[1:]) if tables else (None, [])
    base = QuantizedWeight(
        packed, absmax, codebook, torch.Size(shape), torch.float32, find_format(format),
        block_size, *nested,
    )  # fmt: skip
    return merging.requantized(base, merging.adding(a, b, scale))


_requantize_op = _native.compose(
    "qlora_requantize(Tensor[] weight, int[] layout, str format, Tensor lora_a, Tensor lora_b, "
    "float scale) -> Tensor[]",
    lambda weight, *rest: [torch.empty_like(weight[i]) for i in (0, 1, 3, 5) if i < len(weight)],
    _requantize,
)
