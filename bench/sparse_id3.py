"""ID3's candidates of one matrix against its dense gradient, scored, masked and sorted by topk.

Operations: 2 M N K, those of the dense gradient, which both make. Traffic: x, its gradient and the
weight are read; what is written is as long as the list of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from peftkern.sparse import Pattern, candidates

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .row import Row

SIZE, TOKENS, DENSITY, COUNT = 4096, 512, 0.01, 300
SCALE = (1.0, 0.1)  # exponent and eps


def dense(weight: Tensor, mask: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    scores = candidates.score(grad.t() @ x, weight, *SCALE).masked_fill_(mask, -1)
    return scores.flatten().topk(COUNT).values


def built(weight: Tensor, mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(dense, weight, mask)


def ours(weight: Tensor, mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    operand = Pattern.from_mask(mask).operand()

    def call(x: Tensor, grad: Tensor) -> Tensor:
        none = x.new_zeros(1)  # as for a model's first tensor: nothing is known of its best
        return candidates.candidates_op(x, grad, weight, *operand, *SCALE, none, COUNT)[0]

    return call


def draw(sets: int = 2) -> Iterator[Inputs]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(sets):
        weight = torch.randn(SIZE, SIZE, generator=generator)
        mask = torch.rand(SIZE, SIZE, generator=generator) < DENSITY
        x, grad = (torch.randn(TOKENS, SIZE, generator=generator) for _ in range(2))
        yield Inputs((weight, mask), (x, grad))


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if device != "cpu":
        return
    yield from measure(
        "sparse_id3", "candidates", f"{COUNT} of {SIZE} x {SIZE}, {TOKENS} tokens",
        {"peftkern": Contender(ours), "torch, dense, topk": Contender(built)},
        list(draw()), dense, baseline="torch, dense, topk", device=device, quick=quick,
        work=Work(flops=2 * TOKENS * SIZE**2, read=4 * SIZE * (SIZE + 2 * TOKENS)),
    )  # fmt: skip
