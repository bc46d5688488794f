"""How A and B start. With W `[out, in]` and c the scale, what a start aims at:

pissa    c B A = U_r S_r V_r^T                  W = U S V^T
olora    B A = Q_r R_r                          W = Q R
corda    c B A = (U S V^T)_r C^-1               W C = U S V^T, C the inputs' second moment
loftq    c B A = (U S V^T)_r                    W - Q = U S V^T, Q the quantised base
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.qlora.codes import dequantize
from peftkern.qlora.config import LoraConfig, quantized_base
from peftkern.qlora.weight import QuantizedWeight

Factors = tuple[Tensor, Tensor]

# Directions beyond r that the subspace iteration follows, which the last of the r need to settle
# (Halko, Martinsson and Tropp, 2011, advise 5 to 10).
OVERSAMPLING = 8
BASIS_SEED = 0  # of the one basis that "orthogonal_N" cuts its rows from


def factors(weight: Tensor | QuantizedWeight, config: LoraConfig) -> Factors:
    """A `[r, in]` and B `[out, r]` as the config wants them, float32 or float64.

    Args:
        weight: `[out, in]`, before it is quantised where that is at hand.
        config: rank, scale and start.

    Raises:
        ValueError: a rank that the start cannot fill, or a start that needs more than the weight.
    """
    start = config.start
    if start == "corda":
        raise ValueError("init_lora_weights 'corda' must come through peftkern.corda, got no data")
    if start == "loftq":
        raise ValueError(f"init_lora_weights 'loftq' must have a float weight, got {_kind(weight)}")
    _check_rank(config, weight)
    if start == "pissa":
        return _pissa(_dense(weight), config)
    if start == "olora":
        q, rest = torch.linalg.qr(_dense(weight))
        return rest[: config.r].contiguous(), q[:, : config.r].contiguous()
    rows, columns = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    options: dict[str, Any] = {"device": weight.device, "dtype": dtype}
    a = torch.empty(config.r, columns, **options)
    b = torch.zeros(rows, config.r, **options)
    if start == "orthogonal":
        return _orthonormal_rows(config, columns).to(a), b
    if start == "gaussian":
        nn.init.normal_(a, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if config.init_lora_weights is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return a, b


def _check_rank(config: LoraConfig, weight: Tensor | QuantizedWeight) -> None:
    if reason := config.start_obstacle(*weight.shape):
        raise ValueError(f"init_lora_weights must fit the weight, got {reason}")


def loftq(weight: Tensor, config: LoraConfig) -> tuple[QuantizedWeight, Factors]:
    """The quantised base, and A and B that make up for what it lost.

    Each round quantises what A and B leave of the weight, then fits them to the rest anew.

    Args:
        weight: `[out, in]`, float.
        config: its `base` is the format, its `start_number` the rounds (1 where there is none).
    """
    assert config.base is not None
    _check_rank(config, weight)
    dense = _dense(weight)
    rest = dense
    for _ in range(config.start_number or 1):
        base = quantized_base(rest, config)
        a, b = _largest(dense - dequantize(base), config)
        rest = dense - config.scaling * (b @ a)
    return replace(base, dtype=weight.dtype), (a, b)


def corda(
    weight: Tensor | QuantizedWeight,
    moment: Tensor,
    config: LoraConfig,
    mode: str = "ipm",
    metric: str = "corda",
) -> Factors:
    """Yang et al., CorDA (2024): the split of W that heeds the inputs.

    The moment is damped until it can be inverted: C' = C + d mean(diag C) I, with d from 0.01,
    doubled until |C' C'^-1 - I| < 0.05. C counts relative to the mean of its diagonal, so neither
    the scale of the inputs nor their number shifts weight between A and B; inputs that are all
    zero count as white, which is "pissa".

    Args:
        weight: `[out, in]`.
        moment: C `[in, in]`, the sum of x x^T over the inputs, at any scale.
        config: rank and scale.
        mode: "ipm": the largest singular values; "kpm": the smallest, which keeps what the inputs
            use out of the adapter.
        metric: "corda": W C is decomposed; "whitened": W L with C = L L^T, whose truncation loses
            the least output.

    Raises:
        ValueError: a rank above what the weight has.
    """
    _check_rank(config, weight)
    dense = _dense(weight)
    moment = moment.to(dense)
    mean = moment.diagonal().mean()
    identity = torch.eye(len(moment), dtype=dense.dtype, device=dense.device)
    moment = moment / mean if mean > 0 else identity
    factor, inverse = _invertible(moment, identity)
    if metric == "whitened":
        factor = torch.linalg.cholesky(factor)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    u, s, v = torch.linalg.svd(dense @ factor, full_matrices=False)
    chosen = slice(0, config.r) if mode == "ipm" else slice(len(s) - config.r, None)
    root = (s[chosen] / config.scaling).sqrt()
    return root[:, None] * (v[chosen] @ inverse), u[:, chosen] * root


def _invertible(moment: Tensor, identity: Tensor) -> Factors:
    damping = 0.01
    while True:
        damped = moment + damping * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        damping *= 2


def _pissa(weight: Tensor, config: LoraConfig) -> Factors:
    if config.start_number is None:
        return _largest(weight, config)
    sampled = min(config.r + OVERSAMPLING, *weight.shape)
    u, s, v = torch.svd_lowrank(weight, sampled, niter=config.start_number)
    root = (s[: config.r] / config.scaling).sqrt()
    return root[:, None] * v[:, : config.r].t(), u[:, : config.r] * root


def _largest(matrix: Tensor, config: LoraConfig) -> Factors:
    """c B A is the rank-r matrix nearest to this one; A and B share its singular values."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = (s[: config.r] / config.scaling).sqrt()
    return root[:, None] * v[: config.r], u[:, : config.r] * root


def _orthonormal_rows(config: LoraConfig, columns: int) -> Tensor:
    """Normal rows, made orthonormal in float64."""
    if (block := config.start_number) is None:
        rows = torch.randn(config.r, columns, dtype=torch.float64)
        return _orthonormal(rows.t()).t()
    generator = torch.Generator().manual_seed(BASIS_SEED)
    last = (block + 1) * config.r
    drawn = [
        torch.randn(columns, dtype=torch.float64, generator=generator) for _ in range(last)
    ]  # one call a row: how many rows a call draws would change their values
    return _orthonormal(torch.stack(drawn, 1)).t()[last - config.r :]


def _orthonormal(columns: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(columns)[0]
    return q


def _dense(weight: Tensor | QuantizedWeight) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, QuantizedWeight):
        return dequantize(weight, dtype)
    return weight.detach().to(dtype)


def _kind(weight: Tensor | QuantizedWeight) -> str:
    return weight.format.name if isinstance(weight, QuantizedWeight) else "a base left in float"
