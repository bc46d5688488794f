"""Linears that read one and the same x, such as q, k and v: one pass over it, one gradient of it.

    y_i = x W_i^T + bias_i + scale_i * (D_i(x) A_i^T) B_i^T          for each sibling i
    grad_x = sum of what each gives

The same numbers as one by one, up to the order in which grad_x is added up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _inputs, _native
from peftkern.qlora import check, fallback
from peftkern.qlora.ops import operand
from peftkern.qlora.weight import QuantizedWeight


class Sibling(NamedTuple):
    """The operands of one linear, as `qlora.linear` takes them; a dense weight does not train."""

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def _fake(x: Tensor, weights: Any, layouts: Any, biases: Any, lora_a: Any, *rest: Any) -> Any:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], out) for out in layouts[2::6]]
    return ys + [x.new_empty(rows, a.shape[0], dtype=dtype) for a in lora_a]


def _fake_bwd(
    grads: Any, x: Any, downs: Any, weights: Any, layouts: Any, biases: Any, lora_a: Any,
    lora_b: Any, scales: Any, dropout: Any, seeds: Any, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    parameters = [p for three in zip(biases, lora_a, lora_b, strict=True) for p in three]
    like = [grads[0].new_empty(*grads[0].shape[:-1], layouts[3]), *parameters]
    return [torch.empty_like(t) for t, need in zip(like, needs, strict=True) if need]


def split_weights(weights: Any, layouts: Any) -> list[tuple[list[Tensor], list[int]]]:
    """Tensors and layout of each weight."""
    split, first = [], 0
    for i in range(0, len(layouts), 6):
        count, *layout = layouts[i : i + 6]
        split.append((weights[first : first + count], layout))
        first += count
    return split


def _fallback(
    x: Tensor, weights: Any, layouts: Any, biases: Any, lora_a: Any, lora_b: Any, scales: Any,
    dropout: float, seeds: Any,
) -> list[Tensor]:  # fmt: skip
    parts = zip(
        split_weights(weights, layouts), biases, lora_a, lora_b, scales,
        seeds or [None] * len(scales), strict=True,
    )  # fmt: skip
    found = [
        fallback.linear(x, weight, layout, bias, a, b, scale, dropout, seed, None, None)
        for (weight, layout), bias, a, b, scale, seed in parts
    ]
    return [y for y, _ in found] + [down for _, down in found]


def _fallback_bwd(
    grads: Any, x: Any, downs: Any, weights: Any, layouts: Any, biases: Any, lora_a: Any,
    lora_b: Any, scales: Any, dropout: float, seeds: Any, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    need_x, *others = needs
    grad_x, found = None, []
    seeds = seeds or [None] * len(scales)
    for i, (weight, layout) in enumerate(split_weights(weights, layouts)):
        need_bias, need_a, need_b = others[3 * i : 3 * i + 3]
        result = fallback.linear_bwd(
            grads[i], x, downs[i], weight, layout, biases[i], lora_a[i], lora_b[i], scales[i],
            dropout, seeds[i], None, None, [need_x, False, need_bias, need_a, need_b],
        )  # fmt: skip
        if need_x:
            grad_x = result[0] if grad_x is None else grad_x + result[0]
        found += result[int(need_x) :]
    return found if grad_x is None else [grad_x, *found]


_ARGUMENTS = (
    "Tensor[] weights, int[] layouts, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b, "
    "float[] scales, float dropout, Tensor[] seeds"
)
_siblings_op = _native.define(
    f"qlora_siblings(Tensor x, {_ARGUMENTS}) -> Tensor[]", _fake, _fallback
)
_siblings_bwd_op = _native.define(
    f"qlora_siblings_bwd(Tensor[] grads, Tensor? x, Tensor[] downs, {_ARGUMENTS}, bool[] needs) "
    "-> Tensor[]",
    _fake_bwd,
    _fallback_bwd,
)
_native.register_triton("qlora", "siblings")
_native.register_triton("qlora", "siblings_bwd")


class _Siblings(torch.autograd.Function):
    """Keeps what each would keep alone, and x once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: Any, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, layouts, *rest = fixed
        three = parameters[::3], parameters[1::3], parameters[2::3]
        found = _siblings_op(x, weights, layouts, *three, *rest)
        ys, downs = found[: len(three[0])], found[len(three[0]) :]
        a_trains = any(ctx.needs_input_grad[3::3])
        ctx.save_for_backward(x if a_trains else None, *downs, *parameters)
        ctx.fixed = fixed
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        downs, parameters = kept[: len(grads)], kept[len(grads) :]
        weights, layouts, *rest = ctx.fixed
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        found = iter(
            _siblings_bwd_op(
                [grad.contiguous() for grad in grads], x, downs, weights, layouts,
                parameters[::3], parameters[1::3], parameters[2::3], *rest, needs,
            )
        )  # fmt: skip
        grad_x, *others = [next(found) if need else None for need in needs]
        return grad_x, None, *others


def siblings(x: Tensor, parts: Sequence[Sibling], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """y_i = x W_i^T + bias_i + scale_i * (D_i(x) A_i^T) B_i^T for all parts, in their order.

    As `qlora.linear` for each, with a seed of its own each where there is dropout, drawn in the
    order of the parts.

    Args:
        x: `[..., in]`, as in `qlora.linear`.
        parts: at least one; all weights `[out_i, in]`.
        dropout: in [0, 1], the same for all.

    Returns:
        `[..., out_i]` for each part, in x's dtype; differentiable once in x, biases, lora_a and
        lora_b.

    Raises:
        TypeError, ValueError: as `qlora.linear`.
    """
    for part in parts:
        check.linear(x, part.weight, 2, part.bias, part.lora_a, part.lora_b, dropout, None)
    x = _inputs.autocast(x)
    weights: list[Tensor] = []
    layouts: list[int] = []
    for part in parts:
        tensors, layout = operand(part.weight)
        weights += tensors
        layouts += [len(tensors), *layout]
    seeds = [_inputs.seed(None, x.device) for _ in parts] if dropout else []
    scales = [part.scale for part in parts]
    x = x.contiguous()
    if torch.is_grad_enabled():
        parameters = [p for part in parts for p in (part.bias, part.lora_a, part.lora_b)]
        fixed = (weights, layouts, scales, dropout, seeds)
        return _Siblings.apply(x, fixed, *parameters)  # type: ignore[no-any-return, no-untyped-call]
    _, biases, lora_a, lora_b, _ = zip(*parts, strict=True)
    found = _siblings_op(x, weights, layouts, biases, lora_a, lora_b, scales, dropout, seeds)
    return tuple(found[: len(parts)])
