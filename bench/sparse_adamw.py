"""A step of packed AdamW against dense AdamW whose gradients are masked, of several matrices.

Traffic: of each entry value, gradient and moments are read, and all but the gradient written back;
and of the weights those lines in which an entry lies. Steps go on from call to call, and weights
with them; what is compared does not: with betas of 0 the moments are the gradient and its square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.sparse import Pattern, adamw

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .row import Row

MATRICES, SIZE, QUICK_SIZE = 4, 5000, 1000
DENSITIES, LINE = (0.05, 0.01), 16  # a line of the caches, in weights
RATES = (1e-4, 0.0, 0.0, 1e-8, 1e-2)  # lr, betas, eps and decay

Moments = Sequence[tuple[Tensor, Tensor]]


def moments(found: Moments) -> tuple[Tensor, Tensor]:
    first, second = zip(*found, strict=True)
    return torch.cat(first), torch.cat(second)


def reference(weights: Tensor, mask: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(grads)
    return adamw.reference(weights[mask], grads, zero, zero, 1, *RATES)[1:]


def ours(weights: Tensor, mask: Tensor, grads: Tensor) -> Callable[[], Moments]:
    patterns = [Pattern.from_mask(m) for m in mask]
    mine = [w.clone() for w in weights]
    values = [w[m] for w, m in zip(mine, mask, strict=True)]
    packed = list(grads.split([p.nnz for p in patterns]))
    first, second = ([torch.zeros_like(v) for v in values] for _ in range(2))
    operands = [pattern.operand() for pattern in patterns]
    tensors = [tensor for found, _ in operands for tensor in found]
    layouts = [number for _, layout in operands for number in layout]

    def step() -> Moments:
        adamw.step_op(mine, values, packed, first, second, [], tensors, layouts, 1, *RATES)
        return list(zip(first, second, strict=True))

    return step


def dense(**options: Any) -> Callable[..., Callable[[], Any]]:
    def build(weights: Tensor, mask: Tensor, grads: Tensor) -> Callable[[], Any]:
        parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        whole = torch.zeros_like(weights).masked_scatter_(mask, grads)
        lr, *betas, eps, decay = RATES
        rates = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": decay}
        optimizer = torch.optim.AdamW(parameters, **rates, **options)
        for parameter, grad in zip(parameters, whole, strict=True):
            parameter.grad = grad

        def step() -> Any:
            for parameter, m in zip(parameters, mask, strict=True):
                assert parameter.grad is not None
                parameter.grad.mul_(m)
            optimizer.step()
            return optimizer, mask

        return step

    return build


def dense_moments(found: Any) -> tuple[Tensor, Tensor]:
    optimizer, mask = found
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    pairs = zip(states, mask, strict=True)
    return moments([(s["exp_avg"][m], s["exp_avg_sq"][m]) for s, m in pairs])


def draw(size: int, density: float, sets: int = 2) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(sets):
        weights = torch.randn(MATRICES, size, size, generator=generator)
        mask = torch.rand(weights.shape, generator=generator) < density
        yield weights, mask, torch.randn(int(mask.sum()), generator=generator)


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if device != "cpu":
        return
    size = QUICK_SIZE if quick else SIZE
    count = MATRICES * size * size
    for density in DENSITIES:
        entries = int(density * count)
        touched = int(count * (1 - (1 - density) ** LINE)) * 4
        yield from measure(
            "sparse_adamw", "step", f"{density:.0%} of {count // 10**6} M",
            {
                "peftkern": Contender(ours, view=moments),
                "torch, fused, masked": Contender(dense(fused=True), view=dense_moments),
                "torch, loop, masked": Contender(dense(foreach=False), view=dense_moments),
            },
            [Inputs(drawn) for drawn in draw(size, density)],
            reference, baseline="torch, fused, masked", device=device, quick=quick,
            work=Work(read=16 * entries + touched, written=12 * entries + touched),
        )  # fmt: skip
