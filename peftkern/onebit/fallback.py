"""The ops in plain torch, with the gradient by hand, for devices that have no kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.bottleneck import fallback as bottleneck
from peftkern.onebit import reference


def statistics(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([reference.statistics(weight) for weight in weights])


def quantize(weights: Sequence[Tensor], statistics: Tensor, bits: int) -> list[Tensor]:
    return [
        reference.values(reference.codes(weight, found, bits), found, bits).to(weight.dtype)
        for weight, found in zip(weights, statistics, strict=True)
    ]


def quantize_bwd(
    grads: Sequence[Tensor], weights: Sequence[Tensor], statistics: Tensor, bits: int
) -> list[Tensor]:
    each = zip(grads, weights, statistics, strict=True)
    return [reference.quantize_bwd(grad, weight, found, bits) for grad, weight, found in each]


def encode(weight: Tensor, statistics: Tensor, bits: int) -> Tensor:
    return reference.pack(reference.codes(weight, statistics.view(2), bits), bits)


def dequantize(
    packed: Tensor, statistics: Tensor, bits: int, width: int, dtype: torch.dtype
) -> Tensor:
    return reference.dequantize(packed, statistics, bits, width).to(dtype)


def laid_out_bytes(packed: Tensor, bits: int, width: int) -> int:
    """Of whole words and of tiles of 16 rows, whatever order a device has them in."""
    return -(-packed.shape[0] // 16) * 16 * (-(-width * bits // 32) * 4)


def lay_out(packed: Tensor, bits: int, width: int) -> Tensor:
    """The canonical bytes: what follows has no kernel either."""
    out = packed.new_zeros(laid_out_bytes(packed, bits, width))
    out[: packed.numel()] = packed.flatten()
    return out


def linear(
    x: Tensor, laid_out: Tensor, statistics: Tensor, bits: int, rows: int, bias: Tensor | None
) -> Tensor:
    sums = torch.promote_types(x.dtype, torch.float32)
    width = x.shape[-1]
    size = (width * bits + 7) // 8
    packed = laid_out[: rows * size].view(rows, size)
    weight = reference.dequantize(packed, statistics, bits, width).to(sums)
    y = x.to(sums) @ weight.t()
    return (y if bias is None else y + bias.to(sums)).to(x.dtype)


def in_words(packed: Tensor) -> Tensor:
    """The bytes as GPUs have them: rows of whole 32-bit words, which are copied while others are
    multiplied.

    What is left of a row's last word is zero, as are the rows up to a multiple of 16, which make
    the bytes as many as those of other kernels.
    """
    rows, bytes = packed.shape
    return torch.nn.functional.pad(packed, (0, -bytes % 4, 0, -rows % 16)).view(-1)


def decode(
    x: Tensor, laid_out: Tensor, statistics: Tensor, bits: int, rows: int, bias: Tensor | None
) -> Tensor:
    """`linear` of such bytes."""
    bytes = -(-x.shape[-1] * bits // 8)
    packed = laid_out.as_strided((rows, bytes), (-(-bytes // 4) * 4, 1))
    return linear(x, packed.reshape(-1), statistics, bits, rows, bias)


def adapter(
    x: Tensor, down: Tensor, up: Tensor, statistics: Tensor, bits: int, scale: float,
    activation: int, residual: Tensor | None, onto_x: bool, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    quantized_down, quantized_up = quantize([down, up], statistics, bits)
    return bottleneck.linear(
        x, quantized_down, quantized_up, None, None, None, scale, activation, residual, onto_x,
        None, None, None, dropout, seed,
    )  # fmt: skip


def adapter_bwd(
    grad: Tensor, x: Tensor, hidden: Tensor, down: Tensor, up: Tensor, statistics: Tensor,
    bits: int, scale: float, activation: int, onto_x: bool, dropout: float, seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    latents = [down, up]
    # In the sums' own dtype: what a 16-bit latent gets is rounded once, at the end.
    wide_down, wide_up = (w.to(hidden.dtype) for w in quantize(latents, statistics, bits))
    grads = iter(
        bottleneck.linear_bwd(
            grad, x, hidden, wide_down, wide_up, None, None, None, scale, activation, onto_x,
            None, None, None, dropout, seed, [*needs, *[False] * 5],
        )
    )  # fmt: skip
    found = [next(grads)] if needs[0] else []
    for weight, row, need in zip(latents, statistics, needs[1:], strict=True):
        if need:
            found.append(reference.quantize_bwd(next(grads), weight, row, bits))
    return found
