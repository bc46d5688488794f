"""The ops in plain torch, with the gradient by hand, for devices that have no kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftkern.bottleneck.reference import ACTIVATIONS, Norm, normalize
from peftkern.qlora.reference import dropout


def _gelu_slope(h: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-h / math.sqrt(2)) + h * (-h * h / 2).exp() / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(h: Tensor) -> Tensor:
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(factor * (h + cubic * h**3))
    return (1 + tanh) / 2 * (1 + h * (1 - tanh) * factor * (1 + 3 * cubic * h * h))


def _sigmoid_slope(h: Tensor, factor: float) -> Tensor:
    """Of h * sigmoid(factor * h)."""
    sigmoid = torch.sigmoid(factor * h)
    return sigmoid * (1 + factor * h * (1 - sigmoid))


# In the order of ACTIVATIONS.
SLOPES: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.ones_like,
    lambda h: (h > 0).to(h.dtype),
    _gelu_slope,
    _gelu_tanh_slope,
    lambda h: _sigmoid_slope(h, 1.702),
    lambda h: _sigmoid_slope(h, 1.0),
    lambda h: 1 - torch.tanh(h) ** 2,
)


def linear(
    x: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None, bias_up: Tensor | None,
    gate: Tensor | None, scale: float, activation: int, residual: Tensor | None, onto_x: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None, dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sums = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(sums)
    normed = flat if eps is None else normalize(flat, Norm(norm_weight, norm_bias, eps))
    hidden = normed @ down.to(sums).t()
    if bias_down is not None:
        hidden = hidden + bias_down.to(sums)
    y = _activated(hidden, activation, dropout, seed) @ up.to(sums).t()
    if bias_up is not None:
        y = y + bias_up.to(sums)
    y = _scale(scale, gate, sums) * y
    if residual is not None:
        y = residual.reshape(y.shape).to(sums) + y
    elif onto_x:
        y = flat + y
    return y.to(x.dtype).view(*x.shape[:-1], len(up)), hidden


def linear_bwd(
    grad: Tensor, x: Tensor, hidden: Tensor, down: Tensor, up: Tensor, bias_down: Tensor | None,
    bias_up: Tensor | None, gate: Tensor | None, scale: float, activation: int, onto_x: bool,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float | None, dropout: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    sums, rows = hidden.dtype, len(hidden)
    g, flat = (t.reshape(rows, t.shape[-1]).to(sums) for t in (grad, x))
    normed = flat if eps is None else normalize(flat, Norm(norm_weight, norm_bias, eps))
    factor = _scale(scale, gate, sums)
    activated = _activated(hidden, activation, dropout, seed)
    reached = g @ up.to(sums)  # by act(h), before the scale
    grad_hidden = _dropped(factor * reached, dropout, seed) * SLOPES[activation](hidden)
    grad_normed = grad_hidden @ down.to(sums)
    grad_gate = scale * (activated * reached).sum()
    if bias_up is not None:
        grad_gate = grad_gate + scale * (g.sum(0) @ bias_up.to(sums))
    grads: list[tuple[Tensor | None, Tensor | None]] = [
        (x, _grad_x(grad_normed, flat, norm_weight, eps) + (g if onto_x else 0)),
        (down, grad_hidden.t() @ normed),
        (up, factor * (g.t() @ activated)),
        (bias_down, grad_hidden.sum(0)),
        (bias_up, factor * g.sum(0)),
        (gate, grad_gate),
        (norm_weight, None if eps is None else (grad_normed * _centred(flat, eps)).sum(0)),
        (norm_bias, grad_normed.sum(0)),
    ]
    return [
        found.to(like.dtype).reshape(like.shape)
        for (like, found), need in zip(grads, needs, strict=True)
        if need and like is not None and found is not None
    ]


def _activated(hidden: Tensor, activation: int, p: float, seed: Tensor | None) -> Tensor:
    return _dropped(list(ACTIVATIONS.values())[activation](hidden), p, seed)


_dropped = dropout  # the ops have an argument of that name


def _scale(scale: float, gate: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return scale if gate is None else scale * gate.to(dtype).reshape(())


def _centred(x: Tensor, eps: float) -> Tensor:
    """Rows with mean 0 and variance 1: a norm without weight and bias."""
    return normalize(x, Norm(eps=eps))


def _grad_x(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
    """Through the norm, where there is one; both means are over the row."""
    if eps is None:
        return grad
    centred = _centred(x, eps)
    inner = grad if weight is None else grad * weight.to(grad.dtype)
    along = (inner * centred).mean(1, keepdim=True)
    apart = x - x.mean(1, keepdim=True)
    deviation = ((apart * apart).mean(1, keepdim=True) + eps).sqrt()
    return (inner - inner.mean(1, keepdim=True) - along * centred) / deviation
