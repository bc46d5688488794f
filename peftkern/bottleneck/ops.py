"""bottleneck's index: schema, fake and gradient of its ops, and the function that users call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _inputs, _native
from peftkern.bottleneck import check, fallback
from peftkern.bottleneck.reference import ACTIVATIONS, Norm


def _fake_linear(x: Tensor, down: Tensor, up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = math.prod(x.shape[:-1])
    y = x.new_empty(*x.shape[:-1], up.shape[0])
    return y, x.new_empty(rows, down.shape[0], dtype=dtype)


def _fake_linear_bwd(
    grad: Any, x: Tensor, hidden: Any, down: Tensor, up: Tensor, bias_down: Tensor | None,
    bias_up: Tensor | None, gate: Tensor | None, scale: Any, activation: Any, onto_x: Any,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: Any, dropout: Any, seed: Any,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (x, down, up, bias_down, bias_up, gate, norm_weight, norm_bias)
    found = zip(inputs, needs, strict=True)
    return [torch.empty_like(t) for t, need in found if need and t is not None]


# hidden: h, `[rows, r]`, before the activation; float32, float64 of float64. The scale is
# scale * gate where there is a gate. No eps, no norm. onto_x: the residual is x itself.
_linear_op = _native.define(
    "bottleneck_linear(Tensor x, Tensor down, Tensor up, Tensor? bias_down, Tensor? bias_up, "
    "Tensor? gate, float scale, int activation, Tensor? residual, bool onto_x, "
    "Tensor? norm_weight, Tensor? norm_bias, float? eps, float dropout, Tensor? seed) "
    "-> (Tensor y, Tensor hidden)",
    _fake_linear,
    fallback.linear,
)
_native.register_triton("bottleneck", "linear")
# needs, and what comes: x, down, up, bias_down, bias_up, gate, norm_weight, norm_bias. A residual's
# gradient is grad itself.
_linear_bwd_op = _native.define(
    "bottleneck_linear_bwd(Tensor grad, Tensor x, Tensor hidden, Tensor down, Tensor up, "
    "Tensor? bias_down, Tensor? bias_up, Tensor? gate, float scale, int activation, bool onto_x, "
    "Tensor? norm_weight, Tensor? norm_bias, float? eps, float dropout, Tensor? seed, "
    "bool[] needs) -> Tensor[]",
    _fake_linear_bwd,
    fallback.linear_bwd,
)
_native.register_triton("bottleneck", "linear_bwd")

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_Fixed = tuple[float, int, bool, float | None, float, Tensor | None]


class _Linear(torch.autograd.Function):
    """Keeps references, x and h: neither N(x) nor act(h), and no mask.

    What asks for no gradient comes in one tuple, since each argument of a Function costs time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None,
        bias_up: Tensor | None, gate: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, residual: Tensor | None, fixed: _Fixed,
    ) -> Tensor:  # fmt: skip
        scale, activation, onto_x, *rest = fixed
        y: Tensor
        y, hidden = _linear_op(
            x, down, up, bias_down, bias_up, gate, scale, activation, residual, onto_x,
            norm_weight, norm_bias, *rest,
        )  # fmt: skip
        parameters = (down, up, bias_down, bias_up, gate, norm_weight, norm_bias)
        ctx.save_for_backward(x, hidden, *parameters)
        ctx.fixed = fixed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *parameters = ctx.saved_tensors
        *factors, norm_weight, norm_bias = parameters
        scale, activation, onto_x, *rest = ctx.fixed
        *needs, residual_needs, _ = ctx.needs_input_grad
        found = iter(
            _linear_bwd_op(
                grad.contiguous(), x, hidden, *factors, scale, activation, onto_x,
                norm_weight, norm_bias, *rest, needs,
            )
        )  # fmt: skip
        grads = [next(found) if need else None for need in needs]
        return *grads, grad if residual_needs else None, None


def linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias_down: Tensor | None = None,
    bias_up: Tensor | None = None,
    scale: Tensor | float = 1.0,
    activation: str = "relu",
    residual: Tensor | None = None,
    norm: Norm | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:
    """y = residual + scale * (D(act(N(x) down^T + bias_down)) up^T + bias_up).

    Houlsby et al., adapters (2019); He et al., parallel adapters (2022). Sums run in float32
    (float64 for float64). x is read once and y written once; the backward keeps x and the product
    with `down` alone. D drops elements of the activation's result; which ones depends on the seed
    and the element's place only. Under autocast x is cast as `torch.nn.functional.linear` casts it.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64.
        down: `[r, in]`, any float dtype.
        up: `[out, r]`, any float dtype.
        bias_down: `[r]`, any float dtype.
        bias_up: `[out]`, any float dtype.
        scale: a number, or a tensor of one element, which has a gradient.
        activation: identity, relu, gelu (by erf), gelu_tanh, quickgelu (h * sigmoid(1.702 h)), silu
            or tanh.
        residual: `[..., out]`; x itself costs least. One whose dtype is not that of the branch is
            added as torch adds it, in the wider of both.
        norm: a LayerNorm of x's rows, which the residual does not see.
        dropout: in [0, 1], the share of the activation's result that `up` does not see.
        seed: int64 `[1]` on x's device, or an int; drawn from torch's generator where None.

    Returns:
        `[..., out]` in x's dtype. Differentiable once, in every tensor but the seed.

    Raises:
        TypeError: a dtype that is not float, a seed that is not int64.
        ValueError: a shape, device or range that does not fit; an activation that is not there.
    """
    check.linear(
        x, down, up, bias_down, bias_up, scale, activation, residual, norm, dropout, seed
    )  # fmt: skip
    given = x
    x = _inputs.autocast(x)
    if residual is not None and residual.dtype != x.dtype:
        rest = (bias_down, bias_up, scale, activation, None, norm, dropout, seed)
        return residual + linear(given, down, up, *rest)
    onto_x = residual is given
    seed = _inputs.seed(seed, x.device) if dropout else None
    gate, scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    norm_weight, norm_bias, eps = norm or (None, None, None)
    x = x.contiguous()
    residual = None if residual is None or onto_x else residual.contiguous()
    number = _NUMBERS[activation]
    if torch.is_grad_enabled():
        fixed = (scale, number, onto_x, eps, dropout, seed)
        return _Linear.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, down, up, bias_down, bias_up, gate, norm_weight, norm_bias, residual, fixed
        )
    return _linear_op(  # type: ignore[no-any-return]
        x, down, up, bias_down, bias_up, gate, scale, number, residual, onto_x,
        norm_weight, norm_bias, eps, dropout, seed,
    )[0]  # fmt: skip
