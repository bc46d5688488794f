"""A toy op to measure: a product of small matrices, in three sets of inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftkern import bench
from peftkern.bench import Contender, Inputs, Row, Work


def reference(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight.t()


def honest(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.linear(x, weight)


def sets(count: int = 3) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, 48, 32, generator=generator) for _ in range(count)]
    return [Inputs((w[0].contiguous(),), (w[1, :4].contiguous(),)) for w in draw]


def race(
    contenders: dict[str, Callable[..., Callable[..., object]]], **options: object
) -> list[Row]:
    entrants = {name: Contender(build) for name, build in contenders.items()}
    everyone = {"honest": Contender(honest)} | entrants
    arguments = {"baseline": "honest", "quick": True, "seed": 1} | options
    return list(
        bench.measure("toy", "product", "48 x 32", everyone, sets(), reference, **arguments)
    )


def slightly_wrong(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: reference(weight, x) * (1 + 2e-5)


def toy_rows() -> list[Row]:
    return race({"twin": honest, "cheat": slightly_wrong}, work=Work(flops=1 << 27))  # too many
