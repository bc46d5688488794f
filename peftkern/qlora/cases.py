"""What the self-check asks of qlora: every op, in every format, against its reference.

Weights come from the reference of `quantize`, so that one wrong kernel spoils its own lines alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern import _native, qlora
from peftkern._verdict import Case, Verdict, compare, judge
from peftkern.qlora import QuantizedWeight, formats, reference
from peftkern.qlora.siblings import Sibling, siblings

# Blocks of 64 straddle rows of 96; one row of activations and forty take different kernels.
OUTPUTS, INPUTS, RANK, EXPERTS, ROWS = 24, 96, 4, 3, (1, 40)
SCALE, DROPOUT, SEED = 0.5, 0.25, 7
STEP = ("qlora_linear", "qlora_linear_bwd")

Verdicts = Callable[..., Iterator[Verdict]]


def cases(device: torch.device) -> Iterator[Case]:
    def case(ops: tuple[str, ...], words: str, verdicts: Verdicts, *args: Any) -> Case:
        return Case(words, ops, partial(verdicts, *args, device))

    for name in formats:
        yield case(("qlora_quantize",), f"qlora.quantize {name}", _quantize, name)
        yield case(("qlora_dequantize",), f"qlora.dequantize {name}", _dequantize, name)
    for base in (*formats, "dense"):
        for dtype in (torch.float32, torch.bfloat16):
            words = f"{base} {str(dtype).removeprefix('torch.')}"
            yield case(STEP, f"qlora.linear {words}", _linear, base, dtype)
            yield case(STEP, f"qlora.expert_linear {words}", _expert_linear, base, dtype)
            if base != "dense":
                yield case(("qlora_decode",), f"qlora_decode {words}", _decode, base, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        words = f"qlora siblings {str(dtype).removeprefix('torch.')}"
        yield case(("qlora_siblings", "qlora_siblings_bwd"), words, _siblings, dtype)


def _quantize(name: str, device: torch.device) -> Iterator[Verdict]:
    for shape in ((OUTPUTS, INPUTS), (3, 37)):  # the last byte of the second is half a byte
        weight = _random(1, *shape)
        found = qlora.quantize(weight.to(device), name)
        yield from map(compare, found.buffers, _quantized(name, weight).buffers)


def _dequantize(name: str, device: torch.device) -> Iterator[Verdict]:
    for nested in _nestings(name):
        for shape in ((OUTPUTS, INPUTS), (3, 37)):
            weight = _quantized(name, _random(1, *shape), nested)
            found, dense = weight.to(device), _dense(weight)
            yield compare(qlora.dequantize(found, torch.float32), dense)
            # By tolerance: Triton's interpreter cuts off where a GPU rounds to nearest.
            yield from judge([qlora.dequantize(found, torch.bfloat16)], _rounded, dense)


def _linear(base: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    functions = (qlora.linear, reference.linear)
    for rows in ROWS:
        operands = _operands(rows, dtype)
        yield from _judge_step(*functions, (), _base(base, OUTPUTS, INPUTS), operands, device)


def _expert_linear(base: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    functions = (qlora.expert_linear, reference.expert_linear)
    weight = _base(base, EXPERTS, OUTPUTS, INPUTS)
    for rows in ROWS:
        offsets = torch.tensor([0, rows // 3, rows // 3, rows])  # the second expert has no row
        adapter = torch.arange(rows, dtype=torch.int32) % (EXPERTS + 1) - 1
        operands = _operands(rows, dtype, EXPERTS)
        yield from _judge_step(*functions, (offsets, adapter), weight, operands, device)


def _decode(base: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    """What linear calls for few rows on a GPU; rows of 96 share blocks of 64, rows of 192 none."""
    for rows, inputs in ((1, INPUTS), (16, 2 * INPUTS)):
        weight = _quantized(base, _random(1, OUTPUTS, inputs), _nestings(base)[-1])
        shapes = ([rows, inputs], [OUTPUTS], [OUTPUTS, RANK])
        x, bias, b = (_random(seed, *shape).to(dtype) for seed, shape in enumerate(shapes, 2))
        down = _random(5, rows, RANK)
        there, *others = (t.to(device) for t in (x, bias, down, b))
        y = torch.ops.peftkern.qlora_decode(
            there, weight.to(device).buffers, weight.layout, *others, SCALE
        )
        yield from judge([y], _plain_decode, x, _dense(weight), bias, down, b)


def _plain_decode(x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, b: Tensor) -> list[Tensor]:
    return [reference.linear(x, weight, bias) + SCALE * (down.to(x.dtype) @ b.t())]


def _siblings(dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    """One of every format, and a dense one."""
    weights = [_base(base, OUTPUTS, INPUTS) for base in (*formats, "dense")]

    def ours(x: Tensor, weights: list[Any], bias: Tensor, a: Tensor, b: Tensor) -> Any:
        return siblings(x, [Sibling(w, bias, a, b, SCALE) for w in weights])

    def plain(x: Tensor, weights: list[Any], bias: Tensor, a: Tensor, b: Tensor) -> Any:
        return tuple(reference.linear(x, w, bias, a, b, SCALE) for w in weights)

    def step(
        run: Callable[..., Any], weights: list[Any], grad: Tensor, *operands: Tensor
    ) -> list[Tensor]:
        x, *rest = leaves = [t.detach().requires_grad_() for t in operands]
        ys = run(x, weights, *rest)
        grads = torch.autograd.grad(ys, leaves, [grad] * len(ys))
        return [y.detach() for y in ys] + list(grads)

    def reference_step(*operands: Tensor) -> list[Tensor]:
        return step(plain, list(operands[: len(weights)]), *operands[len(weights) :])

    for rows in ROWS:
        operands = _operands(rows, dtype)
        there = [t.to(device) for t in operands]
        found = step(ours, [w.to(device) for w in weights], *there)
        yield from judge(found, reference_step, *map(_dense, weights), *operands)


def _judge_step(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    groups: tuple[Tensor, ...],
    weight: QuantizedWeight | Tensor,
    operands: list[Tensor],
    device: torch.device,
) -> Iterator[Verdict]:
    """On y, and on the gradient of each operand and of a dense weight."""
    trains = isinstance(weight, Tensor)
    found = _step(ours, groups, trains, weight.to(device), *(t.to(device) for t in operands))
    with _one_thread():
        yield from judge(found, partial(_step, plain, groups, trains), _dense(weight), *operands)


def _step(
    linear: Callable[..., Tensor],
    groups: tuple[Tensor, ...],
    trains: bool,
    weight: QuantizedWeight | Tensor,
    grad: Tensor,
    *operands: Tensor,
) -> list[Tensor]:
    """y and the gradients; an op and its reference take the same arguments in the same order."""
    leaves = [t.detach().requires_grad_() for t in operands]
    x, *parameters = leaves
    if trains:
        assert isinstance(weight, Tensor)
        weight = weight.detach().requires_grad_()
        leaves.append(weight)
    offsets, adapter = [t.to(x.device) for t in groups[:1]], [t.to(x.device) for t in groups[1:]]
    options = (SCALE, DROPOUT, torch.tensor([SEED], device=x.device))
    y = linear(x, weight, *offsets, *parameters, *options, *adapter)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


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
    """The gradient of y, x, bias, lora_a, lora_b."""
    lead = [experts] if experts else []
    adapter = [[*lead, RANK, INPUTS], [*lead, OUTPUTS, RANK]]
    shapes = ([rows, OUTPUTS], [rows, INPUTS], [*lead, OUTPUTS], *adapter)
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
        return qlora.quantize(weight, name, nested=nested)


def _dense(weight: QuantizedWeight | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    with _native.Instead(_native.references):
        return qlora.dequantize(weight, torch.float32)


def _rounded(dense: Tensor) -> list[Tensor]:
    return [dense if dense.dtype == torch.float64 else dense.bfloat16()]
