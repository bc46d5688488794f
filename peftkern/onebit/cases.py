"""What the self-check asks of onebit: every op, of every number of bits, against its reference.

What an op is given comes from references, so that one wrong kernel spoils its own lines alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern import _native, onebit
from peftkern._verdict import Case, Verdict, compare, judge
from peftkern.onebit import codes, fallback, reference

# Rows of 37 leave a byte half full; one row of activations and forty take different kernels.
SHAPES, INPUTS, RANK, ROWS = ((24, 37), (8, 96)), 37, 6, (1, 40)
SCALE, DROPOUT, SEED = 0.5, 0.25, 7
LATENT = (
    "onebit_statistics", "onebit_quantize", "onebit_quantize_bwd", "qlora_linear",
    "qlora_linear_bwd",
)  # fmt: skip
PACKED = ("onebit_lay_out", "onebit_linear", "onebit_dequantize")
ADAPTER = ("onebit_statistics", "onebit_adapter", "onebit_adapter_bwd")

Verdicts = Callable[..., Iterator[Verdict]]


def cases(device: torch.device) -> Iterator[Case]:
    def case(ops: tuple[str, ...], words: str, verdicts: Verdicts, *args: Any) -> Case:
        return Case(words, ops, partial(verdicts, *args, device))

    yield case(("onebit_statistics",), "onebit statistics", _statistics)
    for bits in reference.BITS:
        words = f"{bits} bit" if bits == 1 else f"{bits} bits"
        yield case(("onebit_quantize",), f"onebit_quantize {words}", _quantize, bits)
        yield case(("onebit_quantize_bwd",), f"onebit_quantize_bwd {words}", _slope, bits)
        yield case(("onebit_encode",), f"onebit_encode {words}", _encode, bits)
        yield case(("onebit_pack",), f"onebit.pack {words}", _pack, bits)
        yield case(("onebit_unpack",), f"onebit.unpack {words}", _unpack, bits)
        yield case(("onebit_dequantize",), f"onebit.dequantize {words}", _dequantize, bits)
        for dtype in (torch.float32, torch.bfloat16):
            typed = f"{words} {str(dtype).removeprefix('torch.')}"
            yield case(LATENT, f"onebit.linear latent {typed}", _latent, bits, dtype)
            yield case(PACKED, f"onebit.linear packed {typed}", _packed, bits, dtype)
            yield case(("onebit_decode",), f"onebit_decode {typed}", _decode, bits, dtype)
            yield case(ADAPTER, f"onebit.adapter {typed}", _adapter, bits, dtype)


def _statistics(device: torch.device) -> Iterator[Verdict]:
    weights = _weights()
    found = codes.statistics([w.to(device) for w in weights])
    for row, weight in zip(found, weights, strict=True):
        yield from judge([row], lambda weight: [reference.statistics(weight)], weight)


def _quantize(bits: int, device: torch.device) -> Iterator[Verdict]:
    weights = _weights()
    statistics = fallback.statistics(weights)
    there = [w.to(device) for w in weights]
    found = codes.quantize_op(there, statistics.to(device), bits)
    for dense, weight, row in zip(found, weights, statistics, strict=True):
        chosen = reference.codes(weight, row, bits)
        yield from judge([dense], partial(_values, bits), chosen, row)


def _slope(bits: int, device: torch.device) -> Iterator[Verdict]:
    weights = _weights()
    grads, statistics = _weights(11), fallback.statistics(weights)
    lists = [[t.to(device) for t in tensors] for tensors in (grads, weights)]
    found = codes.quantize_bwd_op(*lists, statistics.to(device), bits)
    for slope, grad, weight, row in zip(found, grads, weights, statistics, strict=True):
        chosen = reference.codes(weight, row, bits)
        yield from judge([slope], partial(_plain_slope, bits), grad, weight, row, chosen)


def _plain_slope(
    bits: int, grad: Tensor, weight: Tensor, row: Tensor, chosen: Tensor
) -> list[Tensor]:
    return [reference.quantize_bwd(grad, weight, row, bits, chosen)]


def _encode(bits: int, device: torch.device) -> Iterator[Verdict]:
    for weight in _weights():
        row = reference.statistics(weight)
        found = torch.ops.peftkern.onebit_encode(weight.to(device), row.to(device), bits)
        yield compare(found, fallback.encode(weight, row, bits))


def _pack(bits: int, device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        chosen = _codes(bits, *shape)
        yield compare(onebit.pack(chosen.to(device), bits), reference.pack(chosen, bits))


def _unpack(bits: int, device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        packed = reference.pack(_codes(bits, *shape), bits).to(device)
        yield compare(onebit.unpack(packed, bits, shape[1]), _codes(bits, *shape))


def _dequantize(bits: int, device: torch.device) -> Iterator[Verdict]:
    for weight in _weights():
        found = _quantized(weight, bits)
        chosen = reference.unpack(found.packed, bits, weight.shape[1])
        dense = onebit.dequantize(found.to(device))
        yield from judge([dense], partial(_values, bits), chosen, found.statistics[0])


def _latent(bits: int, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    for rows in ROWS:
        x, grad = _random(2, rows, INPUTS).to(dtype), _random(3, rows, SHAPES[0][0]).to(dtype)
        operands = (grad, x, _weights()[0], _random(4, SHAPES[0][0]))
        found = _step(partial(onebit.linear, bits=bits), *(t.to(device) for t in operands))
        yield from judge(found, partial(_step, partial(reference.linear, bits=bits)), *operands)


def _packed(bits: int, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    weight = _quantized(_weights()[0], bits)
    with _native.Instead(_native.references):
        dense = weight.dequantize()
    there = weight.to(device)

    def plain(x: Tensor, bias: Tensor, dense: Tensor) -> Tensor:
        return x @ dense.to(x.dtype).t() + bias.to(x.dtype)

    def plain_step(grad: Tensor, dense: Tensor, *operands: Tensor) -> list[Tensor]:
        return _step(lambda x, bias: plain(x, bias, dense), grad, *operands)

    for rows in ROWS:
        x, grad = _random(2, rows, INPUTS).to(dtype), _random(3, rows, SHAPES[0][0]).to(dtype)
        operands = (grad, x, _random(4, SHAPES[0][0]))
        found = _step(
            lambda x, bias: onebit.linear(x, there, bias), *(t.to(device) for t in operands)
        )
        yield from judge(found, plain_step, grad, dense, *operands[1:])


def _decode(bits: int, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    """What linear calls for few rows on a GPU; rows of 640 can be copied by 16 bytes, those of 37
    cannot."""
    for rows, width in ((1, INPUTS), (3, 640), (16, 640)):
        chosen, statistics = _codes(bits, 24, width), torch.tensor([[0.1, 0.6]])
        x, bias = _random(2, rows, width).to(dtype), _random(4, 24).to(dtype)
        laid_out = fallback.in_words(reference.pack(chosen, bits))
        there, *others = (t.to(device) for t in (x, laid_out, statistics))
        y = torch.ops.peftkern.onebit_decode(there, *others, bits, 24, bias.to(device))
        dense = reference.values(chosen, statistics[0], bits)
        yield from judge([y], _plain_decode, x, dense, bias)


def _plain_decode(x: Tensor, dense: Tensor, bias: Tensor) -> list[Tensor]:
    return [x @ dense.to(x.dtype).t() + bias]


def _adapter(bits: int, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    for rows in ROWS:
        x, grad = (_random(seed, rows, INPUTS).to(dtype) for seed in (2, 3))
        operands = (grad, x, _random(4, RANK, INPUTS), _random(5, INPUTS, RANK))
        found = _step(partial(_branch, onebit.adapter, bits), *(t.to(device) for t in operands))
        yield from judge(
            found, partial(_step, partial(_branch, reference.adapter, bits)), *operands
        )


def _branch(
    adapter: Callable[..., Tensor], bits: int, x: Tensor, down: Tensor, up: Tensor
) -> Tensor:
    seed = torch.tensor([SEED], device=x.device)
    return adapter(x, down, up, SCALE, x, "gelu", DROPOUT, seed, bits)


def _step(function: Callable[..., Tensor], grad: Tensor, *operands: Tensor) -> list[Tensor]:
    """y, and the gradient of each operand."""
    leaves = [t.detach().requires_grad_() for t in operands]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _values(bits: int, chosen: Tensor, row: Tensor) -> list[Tensor]:
    return [reference.values(chosen, row, bits)]


def _quantized(weight: Tensor, bits: int) -> onebit.OneBitWeight:
    with _native.Instead(_native.references):
        return onebit.quantize(weight, bits)


def _weights(seed: int = 0) -> list[Tensor]:
    return [_random(seed + i, *shape) for i, shape in enumerate(SHAPES, 1)]


def _codes(bits: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
