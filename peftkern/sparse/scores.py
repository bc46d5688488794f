"""What the rules of selection compare: named weights, or scores beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from peftkern import _check
from peftkern.sparse import picking
from peftkern.sparse.pattern import Pattern, matrix_shape

Weights = Mapping[str, Tensor]


def first(
    weights: Weights, count: int, largest: bool, group: dist.ProcessGroup | None
) -> dict[str, Pattern]:
    every = matrices(weights)
    total = elements(every, group)
    if count > total:
        raise ValueError(f"count must be at most {total}, all elements, got {count}")
    found = picking.first(every, count, largest, group)
    return dict(zip(weights, picking.patterns(every, found), strict=True))


def matrices(weights: Weights) -> list[Tensor]:
    return [w.detach().reshape(matrix_shape(w.shape)).contiguous() for w in weights.values()]


def elements(scores: Sequence[Tensor], group: dist.ProcessGroup | None) -> int:
    total = sum(score.numel() for score in scores)
    if group is None:
        return total
    summed = torch.tensor([total], device=scores[0].device)
    dist.all_reduce(summed, group=group)
    return int(summed)


def check(weights: Weights) -> None:
    if not weights:
        raise ValueError("weights must hold a tensor at least, got none")
    first = next(iter(weights.values()))
    for name, weight in weights.items():
        _check.dtype(name, weight)
        _check.device(name, weight, first)


def of(kind: str, found: Mapping[str, Tensor | None], weights: Weights) -> Weights:
    scores: dict[str, Tensor] = {}
    for name, weight in weights.items():
        score = found[name]
        if score is None:
            raise ValueError(f"{kind} must have one for {name}, got none")
        _check.dtype(f"{kind}[{name!r}]", score)
        _check.shape(f"{kind}[{name!r}]", score, list(weight.shape))
        _check.device(f"{kind}[{name!r}]", score, weight)
        scores[name] = score
    return scores
