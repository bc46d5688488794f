"""Between a weight and its codes: statistics, quantize, pack and their ways back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkern import _check, _native
from peftkern.onebit import check, fallback, reference
from peftkern.onebit.weight import OneBitWeight


def _bytes(width: int, bits: int) -> int:
    return (width * bits + 7) // 8


def _fake_statistics(weights: Sequence[Tensor]) -> Tensor:
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    return weights[0].new_empty(len(weights), 2, dtype=dtype)


def _fake_pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], _bytes(codes.shape[-1], bits))


def _fake_dequantize(
    packed: Tensor, statistics: Any, bits: Any, width: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(packed.shape[0], width, dtype=dtype)


def _fake_encode(weight: Tensor, statistics: Any, bits: int) -> Tensor:
    return weight.new_empty(weight.shape[0], _bytes(weight.shape[1], bits), dtype=torch.uint8)


statistics_op = _native.define(
    "onebit_statistics(Tensor[] weights) -> Tensor", _fake_statistics, fallback.statistics
)
_native.register_triton("onebit", "statistics")
quantize_op = _native.define(
    "onebit_quantize(Tensor[] weights, Tensor statistics, int bits) -> Tensor[]",
    lambda weights, statistics, bits: [torch.empty_like(w) for w in weights],
    fallback.quantize,
)
_native.register_triton("onebit", "quantize")
quantize_bwd_op = _native.define(
    "onebit_quantize_bwd(Tensor[] grads, Tensor[] weights, Tensor statistics, int bits) "
    "-> Tensor[]",
    lambda grads, weights, statistics, bits: [torch.empty_like(w) for w in weights],
    fallback.quantize_bwd,
)
_native.register_triton("onebit", "quantize_bwd")
_encode_op = _native.define(
    "onebit_encode(Tensor weight, Tensor statistics, int bits) -> Tensor",
    _fake_encode,
    fallback.encode,
)
_native.register_triton("onebit", "encode")
_pack_op = _native.define(
    "onebit_pack(Tensor codes, int bits) -> Tensor", _fake_pack, reference.pack
)
_native.register_triton("onebit", "pack")
_unpack_op = _native.define(
    "onebit_unpack(Tensor packed, int bits, int width) -> Tensor",
    lambda packed, bits, width: packed.new_empty(*packed.shape[:-1], width),
    reference.unpack,
)
_native.register_triton("onebit", "unpack")
dequantize_op = _native.define(
    "onebit_dequantize(Tensor packed, Tensor statistics, int bits, int width, ScalarType dtype) "
    "-> Tensor",
    _fake_dequantize,
    fallback.dequantize,
)
_native.register_triton("onebit", "dequantize")


class _Quantize(torch.autograd.Function):
    """Keeps the latent weight and its statistics."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, statistics: Tensor | None, bits: int) -> Tensor:
        if statistics is None:
            statistics = statistics_op([weight])
        ctx.save_for_backward(weight, statistics)
        ctx.bits = bits
        return quantize_op([weight], statistics, bits)[0]  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, statistics = ctx.saved_tensors
        grads = quantize_bwd_op([grad.contiguous()], [weight], statistics, ctx.bits)
        return grads[0], None, None


def statistics(weights: Sequence[Tensor]) -> Tensor:
    """The mean and the std of each matrix, in one pass over all of them.

    What `linear` and `adapter` compute for themselves where none are given: the layers of a model
    share one call.

    Args:
        weights: latent weights `[out, in]`, float; all float64, or none of them.

    Returns:
        `[n, 2]`, float32, or float64 of float64. Not differentiable: the functions that take it
        have the gradient through both.

    Raises:
        TypeError: a dtype that is not float, or float64 beside others.
        ValueError: a shape or layout that does not fit; no weights.
    """
    if not weights:
        raise ValueError("weights must hold a Tensor at least, got none")
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check.latent(name, weight)
        _check.device(name, weight, weights[0])
    check.statistics(None, weights)
    with torch.no_grad():
        return statistics_op(weights)  # type: ignore[no-any-return]


def quantized(weight: Tensor, bits: int = 1, statistics: Tensor | None = None) -> Tensor:
    """W = mean + std * level[code], dense: what `linear` multiplies by.

    Args:
        weight: the latent weight `[out, in]`, float.
        bits: 1, 2 or 4.
        statistics: `[1, 2]`, as `statistics` returns them; computed where None.

    Returns:
        `[out, in]` in the weight's dtype; its gradient reaches the latent weight as in `linear`.

    Raises:
        TypeError, ValueError: as `linear`.
    """
    check.latent("weight", weight)
    check.bits(bits)
    check.statistics(statistics, [weight])
    return _Quantize.apply(weight, statistics, bits)  # type: ignore[no-any-return, no-untyped-call]


def quantize(weight: Tensor, bits: int = 1) -> OneBitWeight:
    """code = how many thresholds t have w - mean > t * (std + 1e-5); W = mean + std * level[code].

    Jie, Wang and Deng (2023): mean and std of the whole matrix, and of 2^bits levels each the
    median of a normal distribution in its own cell. A value on a threshold takes the lower code.
    Where all elements are equal, and of a single one, the std is 0, and W the mean.

    Args:
        weight: `[out, in]`, float32, bfloat16, float16 or float64; not empty.
        bits: 1, 2 or 4.

    Returns:
        A `OneBitWeight` on the weight's device. Not differentiable.

    Raises:
        TypeError: a weight that is not float.
        ValueError: a shape or layout that does not fit, bits that there are not; a weight that is
            not finite, which is looked at on the CPU alone.
    """
    check.latent("weight", weight)
    check.bits(bits)
    latent = weight.detach()
    found = statistics_op([latent])
    check.finite(found)
    packed = _encode_op(latent, found, bits)
    return OneBitWeight(packed, found[0, 0], found[0, 1], weight.shape, bits, weight.dtype)


def dequantize(weight: OneBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """W = mean + std * level[code], in the dtype of the mean and rounded once.

    Args:
        weight: what `quantize` made.
        dtype: float32, bfloat16, float16 or float64; the dtype it had where none is given.

    Returns:
        `[out, in]`. Not differentiable.

    Raises:
        TypeError: not a OneBitWeight, or a dtype that is not float.
    """
    if not isinstance(weight, OneBitWeight):
        raise TypeError(f"weight must be a OneBitWeight, got {type(weight).__name__}")
    wanted = dtype or weight.dtype
    if wanted not in _check.FLOATS:
        raise TypeError(f"dtype must be a float dtype, got {wanted}")
    return dequantize_op(  # type: ignore[no-any-return]
        weight.packed, weight.statistics, weight.bits, weight.shape[1], wanted
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """byte[i // n] gets code[i] at bit bits * (i % n), n = 8 / bits: the lowest bits come first.

    Args:
        codes: uint8 `[..., width]`, of which the low `bits` bits count.
        bits: 1, 2 or 4.

    Returns:
        uint8 `[..., ceil(width * bits / 8)]`; what is left of a row's last byte is zero.

    Raises:
        TypeError: codes that are not uint8.
        ValueError: bits that there are not, or no dimension.
    """
    check.codes("codes", codes)
    check.bits(bits)
    return _pack_op(codes.contiguous(), bits)  # type: ignore[no-any-return]


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """code[i] = byte[i // n] >> bits * (i % n) & (2^bits - 1), n = 8 / bits: what `pack` undoes.

    Args:
        packed: uint8 `[..., ceil(width * bits / 8)]`.
        bits: 1, 2 or 4.
        width: codes of a row.

    Returns:
        uint8 `[..., width]`.

    Raises:
        TypeError: bytes that are not uint8.
        ValueError: bits that there are not, or rows of another length.
    """
    check.codes("packed", packed)
    check.bits(bits)
    if width < 0 or packed.shape[-1] != _bytes(width, bits):
        raise ValueError(
            f"packed must have rows of {_bytes(max(width, 0), bits)} bytes for {width} codes, got "
            f"{list(packed.shape)}"
        )
    return _unpack_op(packed.contiguous(), bits, width)  # type: ignore[no-any-return]
