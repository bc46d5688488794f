"""What the self-check asks of qlora: every op, in every format, against its reference.

Weights come from the reference of `quantize`, so that one wrong kernel spoils its own lines alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from peftkern import _native
from peftkern._verdict import Case, Verdict, compare, judge
from peftkern.qlora import ops, reference
from peftkern.qlora.weight import QuantizedWeight, formats

# Blocks of 64 straddle rows of 96; one row of activations and forty take different kernels.
OUTPUTS, INPUTS, RANK, EXPERTS, ROWS = 24, 96, 4, 3, (1, 40)
SCALE, DROPOUT, SEED = 0.5, 0.25, 7
STEP = ("qlora_linear", "qlora_linear_bwd")


def cases(device: torch.device) -> Iterator[Case]:
    for name in formats:
        yield Case(f"qlora.quantize {name}", ("qlora_quantize",), partial(_quantize, name, device))
        yield Case(
            f"qlora.dequantize {name}", ("qlora_dequantize",), partial(_dequantize, name, device)
        )
    for base in (*formats, "dense"):
        for dtype in (torch.float32, torch.bfloat16):
            words = f"{base} {str(dtype).removeprefix('torch.')}"
            yield Case(f"qlora.linear {words}", STEP, partial(_linear, base, dtype, device))
            yield Case(
                f"qlora.expert_linear {words}", STEP, partial(_expert_linear, base, dtype, device)
            )


def _quantize(name: str, device: torch.device) -> Iterator[Verdict]:
    for shape in ((OUTPUTS, INPUTS), (3, 37)):  # the last byte of the second is half a byte
        weight = _random(1, *shape)
        found = ops.quantize(weight.to(device), name)
        yield from map(compare, found.buffers, _quantized(name, weight).buffers)


def _dequantize(name: str, device: torch.device) -> Iterator[Verdict]:
    for nested in _nestings(name):
        for shape in ((OUTPUTS, INPUTS), (3, 37)):
            weight = _quantized(name, _random(1, *shape), nested)
            found, dense = weight.to(device), _dense(weight)
            yield compare(ops.dequantize(found, torch.float32), dense)
            # By tolerance: Triton's interpreter cuts off where a GPU rounds to nearest.
            yield from judge([ops.dequantize(found, torch.bfloat16)], _rounded, dense)


def _linear(base: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    weight = _base(base, OUTPUTS, INPUTS)
    seed = torch.tensor([SEED])

    def kernel(x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        ours = weight.to(device)
        return ops.linear(x, ours, bias, lora_a, lora_b, SCALE, DROPOUT, seed.to(device))

    def plain(dense: Tensor, x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return reference.linear(x, dense, bias, lora_a, lora_b, SCALE, DROPOUT, seed)

    for rows in ROWS:
        yield from _judge_step(kernel, plain, _dense(weight), _operands(rows, dtype), device)


def _expert_linear(base: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    weight = _base(base, EXPERTS, OUTPUTS, INPUTS)
    seed = torch.tensor([SEED])
    for rows in ROWS:
        offsets = torch.tensor([0, rows // 3, rows // 3, rows])  # the second expert has no row
        adapter = torch.arange(rows, dtype=torch.int32) % (EXPERTS + 1) - 1

        def kernel(
            x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor,
            groups: tuple[Tensor, ...] = (offsets, adapter),
        ) -> Tensor:  # fmt: skip
            starts, chosen = (t.to(device) for t in groups)
            options = (SCALE, DROPOUT, seed.to(device), chosen)
            return ops.expert_linear(x, weight.to(device), starts, bias, lora_a, lora_b, *options)

        def plain(
            dense: Tensor, x: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor,
            groups: tuple[Tensor, ...] = (offsets, adapter),
        ) -> Tensor:  # fmt: skip
            options = (SCALE, DROPOUT, seed, groups[1])
            return reference.expert_linear(x, dense, groups[0], bias, lora_a, lora_b, *options)

        operands = _operands(rows, dtype, EXPERTS)
        yield from _judge_step(kernel, plain, _dense(weight), operands, device)


def _judge_step(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    dense: Tensor,
    operands: list[Tensor],
    device: torch.device,
) -> Iterator[Verdict]:
    """On the output and the gradient of every operand."""

    def step(forward: Callable[..., Tensor], grad: Tensor, *operands: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in operands]
        y = forward(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    def expected(dense: Tensor, grad: Tensor, *operands: Tensor) -> list[Tensor]:
        with _one_thread():
            return step(partial(plain, dense), grad, *operands)

    x = operands[0]
    grad = _random(9, len(x), OUTPUTS).to(x.dtype)
    found = step(kernel, *(t.to(device) for t in (grad, *operands)))
    yield from judge(found, expected, dense, grad, *operands)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch forks for every row of index_add, which takes seconds where threads outnumber cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _operands(rows: int, dtype: torch.dtype, experts: int = 0) -> list[Tensor]:
    """x, bias, lora_a, lora_b."""
    lead = [experts] if experts else []
    shapes = ([rows, INPUTS], [*lead, OUTPUTS], [*lead, RANK, INPUTS], [*lead, OUTPUTS, RANK])
    return [_random(seed, *shape).to(dtype) for seed, shape in enumerate(shapes, 2)]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _nestings(name: str) -> tuple[bool, ...]:
    """8 bits have a scale a row, too few of them to quantise."""
    return (False, True) if formats[name].bits == 4 else (False,)


def _base(name: str, *shape: int) -> QuantizedWeight | Tensor:
    weight = _random(1, *shape)
    return weight if name == "dense" else _quantized(name, weight, _nestings(name)[-1])


def _quantized(name: str, weight: Tensor, nested: bool = False) -> QuantizedWeight:
    with _native.Instead(_native.references):
        return ops.quantize(weight, name, nested=nested)


def _dense(weight: QuantizedWeight | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    with _native.Instead(_native.references):
        return ops.dequantize(weight, torch.float32)


def _rounded(dense: Tensor) -> list[Tensor]:
    return [dense if dense.dtype == torch.float64 else dense.bfloat16()]
