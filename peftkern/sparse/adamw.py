"""AdamW on packed values: its equation, and the op that makes a step of all tensors at once.

    age        = step - born
    value     *= 1 - lr * weight_decay
    exp_avg    = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad^2
    value     -= lr / (1 - beta1^age) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^age)) + eps)
    weight[i_k, j_k] = value[k]

Loshchilov and Hutter (2019). `born` is what `step` was when an entry came in, so that a late one is
corrected for the moments that it has not had; an entry whose age is below 1 stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import _native
from peftkern.sparse.pattern import Pattern


def reference(
    value: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, age: Tensor | int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> value, exp_avg and exp_avg_sq after the step; all of one shape and dtype."""
    age = torch.as_tensor(age, dtype=torch.float64, device=value.device).expand(value.shape)
    live = age >= 1
    correction1, correction2 = ((1 - beta**age).to(value.dtype) for beta in (beta1, beta2))
    first = beta1 * exp_avg + (1 - beta1) * grad
    second = beta2 * exp_avg_sq + (1 - beta2) * grad.square()
    step = lr / correction1 * first / ((second / correction2).sqrt() + eps)
    found = (value * (1 - lr * weight_decay) - step, first, second)
    before = (value, exp_avg, exp_avg_sq)
    new, first, second = (
        torch.where(live, after, old) for after, old in zip(found, before, strict=True)
    )
    return new, first, second


def fallback(
    weights: Sequence[Tensor], values: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], born: Sequence[Tensor],
    patterns: Sequence[Tensor], layouts: Sequence[int], step: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    rates = (lr, beta1, beta2, eps, weight_decay)
    for i, packed in enumerate(zip(values, grads, exp_avg, exp_avg_sq, strict=True)):
        age = step - born[i] if born else step
        value, _, first, second = packed
        for target, found in zip(
            (value, first, second), reference(*packed, age, *rates), strict=True
        ):
            target.copy_(found)
        if weights:
            pattern = Pattern.of(patterns[2 * i : 2 * i + 2], layouts[4 * i : 4 * i + 4])
            rows, columns = pattern.indices().long()
            matrix = weights[i].view(pattern.shape)
            matrix[rows, columns] = value.to(matrix.dtype)


# weights and born: one for each of values, or none at all; values then go nowhere, and are all as
# old as the optimiser. born is int32. patterns and layouts: two tensors and four integers of each
# weight, as `Pattern.operand` has them. Values and what goes with them are float32, or float64 of
# a float64 weight.
step_op = _native.define(
    "sparse_adamw_(Tensor(a!)[] weights, Tensor(b!)[] values, Tensor[] grads, "
    "Tensor(c!)[] exp_avg, Tensor(d!)[] exp_avg_sq, Tensor[] born, Tensor[] patterns, "
    "int[] layouts, int step, float lr, float beta1, float beta2, float eps, float weight_decay) "
    "-> ()",
    lambda *_: None,
    fallback,
)
_native.register_triton("sparse", "adamw_")
