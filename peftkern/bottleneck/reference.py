"""The math of bottleneck, in plain torch: the oracle of every test and the baseline of every
benchmark.

    h = N(x) down^T + bias_down                                       N a LayerNorm, or nothing
    y = residual + scale * (D(act(h)) up^T + bias_up)                 D drops elements of act(h)

Differentiable by torch's own autograd, in any floating dtype, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from peftkern.qlora.reference import dropout

# In the order of the numbers by which ops and kernels know them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda h: functional.gelu(h, approximate="tanh"),
    "quickgelu": lambda h: h * torch.sigmoid(1.702 * h),
    "silu": functional.silu,
    "tanh": torch.tanh,
}


class Norm(NamedTuple):
    """A LayerNorm of x's rows, before anything else.

    Args:
        weight, bias: `[in]`, any float dtype, or None.
        eps: what is added to a row's variance.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


def normalize(x: Tensor, norm: Norm) -> Tensor:
    weight, bias = (None if t is None else t.to(x.dtype) for t in norm[:2])
    return functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)


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
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x `[..., in]`, down `[r, in]`, up `[out, r]` -> `[..., out]` in x's dtype."""
    hidden = (x if norm is None else normalize(x, norm)) @ down.to(x.dtype).t()
    if bias_down is not None:
        hidden = hidden + bias_down.to(x.dtype)
    y = dropout(ACTIVATIONS[activation](hidden), p, seed) @ up.to(x.dtype).t()
    if bias_up is not None:
        y = y + bias_up.to(x.dtype)
    y = y * (scale.to(x.dtype).reshape(()) if isinstance(scale, Tensor) else scale)
    return y if residual is None else residual + y
