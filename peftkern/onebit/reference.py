"""The math of onebit, in plain torch: the oracle of every test and the baseline of every benchmark.

    mean, std  of a whole matrix w, std over n - 1
    code       = how many thresholds t have  w - mean > t * (std + 1e-5)     a tie takes the lower
    W          = mean + std * level[code]
    y          = x W^T

Jie, Wang and Deng, Revisiting the Parameter Efficiency of Adapters from the Perspective of
Precision Redundancy (2023). The gradient takes the codes for u = (w - mean) / (std + 1e-5), and so
passes them straight through, and it runs through mean and std. Of float16 and bfloat16 the
statistics are float32, and W is rounded once.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from peftkern.bottleneck import reference as bottleneck

EPS = 1e-5
BITS = (1, 2, 4)


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits values, rising: each the median of the normal distribution in its own cell.

    Cells end midway between levels, so the levels are a fixed point; 500 steps from zero, as
    published, leave the last of them 1e-9 from it at 4 bits and nothing at fewer.
    """
    normal = NormalDist()
    values = [0.0] * 2**bits
    for _ in range(500):
        middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
        ends = [0.0, *map(normal.cdf, middles), 1.0]
        values = [normal.inv_cdf((a + b) / 2) for a, b in zip(ends, ends[1:], strict=False)]
    # The published distribution is symmetric; the last digits of its sums are not.
    return tuple((a - b) / 2 for a, b in zip(values, reversed(values), strict=True))


@cache
def thresholds(bits: int) -> tuple[float, ...]:
    """Midway between the levels."""
    values = levels(bits)
    return tuple((a + b) / 2 for a, b in zip(values, values[1:], strict=False))


def statistics(weight: Tensor) -> Tensor:
    """-> mean and std `[2]`, at least float32.

    A std that is nothing but rounding, at most 8 eps * max(1, |mean|), is 0, as is that of a single
    element. What is not finite spoils both.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    count = wide.numel()
    if count == 0:
        return wide.new_zeros(2)
    mean = wide.mean()
    std = (wide - mean).square().sum().div(max(count - 1, 1))
    flat = std.detach().sqrt() <= 8 * torch.finfo(wide.dtype).eps * mean.detach().abs().clamp(min=1)
    # Through a root that is never that of zero, whose gradient is infinite.
    return torch.stack([mean, torch.where(flat, 0.0, torch.where(flat, 1.0, std).sqrt())])


def codes(weight: Tensor, statistics: Tensor, bits: int) -> Tensor:
    """-> uint8 of the weight's shape; zeros where std is 0, and for what is no number."""
    mean, std = statistics.detach().unbind()
    above = weight.detach().to(mean.dtype) - mean
    steps = statistics.new_tensor(thresholds(bits))
    limits = torch.where(std == 0, torch.inf, steps * (std + EPS))
    return (above[..., None] > limits).sum(-1, dtype=torch.uint8)


def values(codes: Tensor, statistics: Tensor, bits: int) -> Tensor:
    """W = mean + std * level[code], in the dtype of the statistics."""
    mean, std = statistics.unbind()
    return (mean + std * statistics.new_tensor(levels(bits)))[codes.long()]


def quantize(weight: Tensor, bits: int) -> Tensor:
    """-> W, dense, in the weight's dtype; its gradient is that of the published module."""
    found = statistics(weight)
    mean, std = found.unbind()
    u = (weight.to(mean.dtype) - mean) / (std + EPS)
    level = found.new_tensor(levels(bits))[codes(weight, found, bits).long()]
    return (mean + std * (level + (u - u.detach()))).to(weight.dtype)


def quantize_bwd(
    grad: Tensor, weight: Tensor, statistics: Tensor, bits: int, chosen: Tensor | None = None
) -> Tensor:
    """What autograd makes of `quantize`, in closed form: grad -> the gradient of the weight.

        r = std / (std + 1e-5)
        r * grad + (1 - r) * S1 / n + (w - mean) / ((n - 1) * std) * S2
        S1 = sum(grad),  S2 = sum(grad * (level[code] - r * u))

    Where std is 0 the first term and the last are none. `chosen`: the codes, which float64 would
    choose anew.
    """
    mean, std = statistics.unbind()
    wide, count = grad.to(mean.dtype), weight.numel()
    if count == 0:
        return torch.zeros_like(weight)
    centred = weight.to(mean.dtype) - mean
    ratio = std / (std + EPS)
    chosen = codes(weight, statistics, bits) if chosen is None else chosen
    level = statistics.new_tensor(levels(bits))[chosen.long()]
    along = (wide * (level - ratio * (centred / (std + EPS)))).sum()
    slope = torch.where(std == 0, 0.0, along / (max(count - 1, 1) * std))
    return (ratio * wide + (1 - ratio) * wide.sum() / count + slope * centred).to(weight.dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[..., width]` -> `[..., ceil(width * bits / 8)]`.

    With n = 8 / bits, code i of a row stands in byte i // n, from bit bits * (i % n) on; what is
    left of a row's last byte is zero.
    """
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes & (2**bits - 1), (0, -codes.shape[-1] % per_byte))
    groups = padded.view(*codes.shape[:-1], padded.shape[-1] // per_byte, per_byte)
    return torch.sum(groups << _shifts(bits, codes), -1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The way back: uint8 `[..., ceil(width * bits / 8)]` -> `[..., width]`."""
    codes = torch.bitwise_and(packed[..., None] >> _shifts(bits, packed), 2**bits - 1)
    return codes.flatten(-2)[..., :width].contiguous()


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)


def dequantize(packed: Tensor, statistics: Tensor, bits: int, width: int) -> Tensor:
    """bytes `[out, ceil(width * bits / 8)]` -> W `[out, width]` in the dtype of the statistics."""
    return values(unpack(packed, bits, width), statistics.view(2), bits)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, bits: int = 1) -> Tensor:
    """x `[..., in]`, the latent weight `[out, in]` -> `[..., out]` in x's dtype."""
    y = x @ quantize(weight, bits).to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


def adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float = 1.0,
    residual: Tensor | None = None,
    activation: str = "relu",
    p: float = 0.0,
    seed: Tensor | None = None,
    bits: int = 1,
) -> Tensor:
    """residual + scale * D(act(x Down^T)) Up^T, each of the two quantised; as bottleneck.linear."""
    quantized_down, quantized_up = (quantize(weight, bits) for weight in (down, up))
    return bottleneck.linear(
        x, quantized_down, quantized_up, None, None, scale, activation, residual, None, p, seed
    )
