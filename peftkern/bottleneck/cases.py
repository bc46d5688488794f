"""What the self-check asks of bottleneck: every activation, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from peftkern import bottleneck
from peftkern._verdict import Case, Verdict, judge
from peftkern.bottleneck import ACTIVATIONS, Norm, reference

# One row and seventy take different ways; ranks and widths that fill no vector.
ROWS, WIDTH, OUTPUTS, RANK = (1, 70), 72, 40, 9
DROPOUT, SEED = 0.25, 7
STEP = ("bottleneck_linear", "bottleneck_linear_bwd")


def cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        words = str(dtype).removeprefix("torch.")
        for activation in ACTIVATIONS:
            name = f"bottleneck.linear {activation} {words}"
            yield Case(name, STEP, partial(_step, activation, False, dtype, device))
        name = f"bottleneck.linear with a norm, onto x {words}"
        yield Case(name, STEP, partial(_step, "gelu", True, dtype, device))


def _step(
    activation: str, normed: bool, dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    for rows in ROWS:
        operands = _operands(rows, normed, dtype)
        there = [t.to(device) for t in operands]
        seed = torch.tensor([SEED])
        ours = partial(bottleneck.linear, activation=activation, dropout=DROPOUT)
        plain = partial(reference.linear, activation=activation, p=DROPOUT, seed=seed)
        found = _gradients(partial(ours, seed=seed.to(device)), normed, *there)
        yield from judge(found, partial(_gradients, plain, normed), *operands)


def _gradients(
    linear: Callable[..., Tensor], normed: bool, grad: Tensor, *operands: Tensor
) -> list[Tensor]:
    """y and the gradient of every operand."""
    leaves = [t.detach().requires_grad_() for t in operands]
    x, down, up, bias_down, bias_up, scale, *rest = leaves
    options = {"residual": x, "norm": Norm(rest[0], rest[1])} if normed else {"residual": rest[0]}
    y = linear(x, down, up, bias_down, bias_up, scale, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _operands(rows: int, normed: bool, dtype: torch.dtype) -> list[Tensor]:
    """The gradient of y, x, down, up, bias_down, bias_up, scale; then the norm's parameters, or the
    residual."""
    generator = torch.Generator().manual_seed(rows)
    outputs = WIDTH if normed else OUTPUTS
    rest = ([WIDTH], [WIDTH]) if normed else ([rows, outputs],)
    shapes = (
        [rows, outputs], [rows, WIDTH], [RANK, WIDTH], [outputs, RANK], [RANK], [outputs], [1],
        *rest,
    )  # fmt: skip
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
