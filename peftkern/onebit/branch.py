"""The adapter of two quantised weights: its op, its gradient, and what users call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _inputs, _native
from peftkern.bottleneck.reference import ACTIVATIONS
from peftkern.onebit import check, codes, fallback
from peftkern.onebit.statistics import count_backward


def _fake_adapter(x: Tensor, down: Tensor, up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(
        math.prod(x.shape[:-1]), down.shape[0], dtype=torch.promote_types(x.dtype, torch.float32)
    )
    return x.new_empty(*x.shape[:-1], up.shape[0]), hidden


def _fake_adapter_bwd(
    grad: Any, x: Tensor, hidden: Any, down: Tensor, up: Tensor, statistics: Any, bits: Any,
    scale: Any, activation: Any, onto_x: Any, dropout: Any, seed: Any, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (x, down, up)
    return [torch.empty_like(t) for t, need in zip(inputs, needs, strict=True) if need]


# As bottleneck_linear, on the two quantised; statistics `[2, 2]`.
_adapter_op = _native.define(
    "onebit_adapter(Tensor x, Tensor down, Tensor up, Tensor statistics, int bits, float scale, "
    "int activation, Tensor? residual, bool onto_x, float dropout, Tensor? seed) "
    "-> (Tensor y, Tensor hidden)",
    _fake_adapter,
    fallback.adapter,
)
_native.register_triton("onebit", "adapter")
# needs: x, down, up.
_adapter_bwd_op = _native.define(
    "onebit_adapter_bwd(Tensor grad, Tensor x, Tensor hidden, Tensor down, Tensor up, "
    "Tensor statistics, int bits, float scale, int activation, bool onto_x, float dropout, "
    "Tensor? seed, bool[] needs) -> Tensor[]",
    _fake_adapter_bwd,
    fallback.adapter_bwd,
)
_native.register_triton("onebit", "adapter_bwd")

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_Fixed = tuple[Tensor | None, int, float, int, bool, float, Tensor | None]


class _Adapter(torch.autograd.Function):
    """Keeps references, x and the product with `down`: no quantised weight, and no mask."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, residual: Tensor | None, fixed: _Fixed
    ) -> Tensor:
        statistics, *options = fixed
        if statistics is None:
            statistics = codes.statistics_op([down, up])
        y: Tensor
        y, hidden = _run(x, down, up, residual, statistics, options)
        ctx.save_for_backward(x, hidden, down, up, statistics)
        ctx.options = options
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            count_backward()
        *needs, residual_needs, _ = ctx.needs_input_grad
        found = iter(_adapter_bwd_op(grad.contiguous(), *ctx.saved_tensors, *ctx.options, needs))
        grads = [next(found) if need else None for need in needs]
        return *grads, grad if residual_needs else None, None


def _run(
    x: Tensor, down: Tensor, up: Tensor, residual: Tensor | None, statistics: Tensor,
    options: Sequence[Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op, which has the residual among the options that its backward shares."""
    bits, scale, activation, *rest = options
    return _adapter_op(  # type: ignore[no-any-return]
        x, down, up, statistics, bits, scale, activation, residual, *rest
    )


def adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    residual: Tensor | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    bits: int = 1,
    statistics: Tensor | None = None,
) -> Tensor:
    """y = residual + scale * D(act(x Down^T)) Up^T, Down and Up being down and up quantised.

    Bi-AdaptFormer and, with the identity, Bi-LoRA (Jie, Wang and Deng, 2023): `bottleneck.linear`
    with the quantiser in front, in one op. The backward keeps x and the product with `down`, and
    quantises again; its gradients are those of `linear`.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64.
        down: the latent weight `[r, in]`, float.
        up: the latent weight `[out, r]`, float.
        scale: a number.
        residual: `[..., out]`; x itself costs least.
        activation: identity, relu, gelu (by erf), gelu_tanh, quickgelu (h * sigmoid(1.702 h)), silu
            or tanh.
        dropout: in [0, 1], the share of the activation's result that `up` does not see.
        seed: int64 `[1]` on x's device, or an int; drawn from torch's generator where None.
        bits: 1, 2 or 4.
        statistics: `[2, 2]` of down and up, as `statistics` returns them; computed where None.

    Returns:
        `[..., out]` in x's dtype. Differentiable once, in x, down, up and residual.

    Raises:
        TypeError: a dtype that is not float, a seed that is not int64, a scale that is a Tensor.
        ValueError: a shape, layout, device or range that does not fit; an activation or bits that
            there are not.
    """
    check.adapter(x, down, up, scale, residual, activation, dropout, seed, bits, statistics)
    given, x = x, _inputs.autocast(x)
    if residual is not None and residual.dtype != x.dtype:
        rest = (scale, None, activation, dropout, seed, bits, statistics)
        return residual + adapter(given, down, up, *rest)
    onto_x = residual is given
    x = x.contiguous()
    residual = None if residual is None or onto_x else residual.contiguous()
    drawn = _inputs.seed(seed, x.device) if dropout else None
    fixed = (statistics, bits, scale, _NUMBERS[activation], onto_x, dropout, drawn)
    if torch.is_grad_enabled():
        return _Adapter.apply(x, down, up, residual, fixed)  # type: ignore[no-any-return, no-untyped-call]
    found = codes.statistics_op([down, up]) if statistics is None else statistics
    return _run(x, down, up, residual, found, fixed[1:])[0]
