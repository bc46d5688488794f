"""What the self-check asks of the optimiser's step: values, moments and weights, of every age."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from peftkern import _native
from peftkern._verdict import Case, Verdict, compare, judge
from peftkern.sparse import adamw
from peftkern.sparse.pattern import Pattern

# Rows whose last words and tiles are not full; one of them as long as two threads' ranges.
SHAPES, STEP, RATES = ((24, 37), (3, 9001)), 7, (1e-2, 0.9, 0.999, 1e-8, 1e-2)


def cases(device: torch.device) -> Iterator[Case]:
    for kind in ("csr", "bitmap"):
        for dtype in (torch.float32, torch.bfloat16):
            words = f"sparse_adamw_ {kind} {str(dtype).removeprefix('torch.')}"
            yield Case(words, ("sparse_adamw_",), partial(_step, kind, dtype, device))


def _step(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    with _native.Instead(_native.references):
        patterns = [Pattern.from_mask(_random(1, *shape) < 0, kind) for shape in SHAPES]
        operands = [pattern.to(device).operand() for pattern in patterns]
        places = [pattern.indices().long().unbind() for pattern in patterns]
    weights = [_random(2, *shape).to(dtype) for shape in SHAPES]
    # Values, gradients and moments, of which the second is a square.
    packed = [[_random(seed, p.nnz) for p in patterns] for seed in (3, 4, 5, 6)]
    packed[3] = [square.square() for square in packed[3]]
    born = [torch.arange(p.nnz, dtype=torch.int32) % (STEP + 1) for p in patterns]
    found, mine = ([t.to(device, copy=True) for t in list_] for list_ in (weights, packed[0]))
    grads, first, second = ([t.to(device, copy=True) for t in list_] for list_ in packed[1:])
    adamw.step_op(
        found, mine, grads, first, second, [age.to(device) for age in born],
        [tensor for tensors, _ in operands for tensor in tensors],
        [number for _, layout in operands for number in layout], STEP, *RATES,
    )  # fmt: skip
    for i, (rows, columns) in enumerate(places):
        before = [list_[i] for list_ in packed]
        plain = _plain(STEP - born[i])
        yield from judge([mine[i], first[i], second[i]], plain, *before)
        written = weights[i].index_put((rows, columns), mine[i].cpu().to(dtype))
        yield compare(found[i], written)


def _plain(age: Tensor) -> Callable[..., list[Tensor]]:
    def plain(value: Tensor, grad: Tensor, first: Tensor, second: Tensor) -> list[Tensor]:
        return list(adamw.reference(value, grad, first, second, age, *RATES))

    return plain


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
