"""bottleneck against the same module in plain torch: a linear, an activation, a linear, a residual.

Traffic of a branch: x is read once and y written once, its factors are small beside them; backward,
the gradient of y and x are read and the gradient of x is written. Operations: 4 M r N forward, as
much again for each of the gradients of x and of the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import bottleneck
from peftkern.bottleneck import ACTIVATIONS, Norm

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .row import Row

SCALE = 0.1
SUMMED = "the gradient of bias_up summed row by row"


@dataclass(frozen=True)
class Branch:
    """An adapter on a stream of this width."""

    name: str
    rows: int
    width: int
    rank: int
    activation: str = "relu"
    norm: bool = False
    dtype: torch.dtype = torch.float32

    def work(self, passes: int) -> Work:
        activations = self.dtype.itemsize * self.rows * self.width
        flops = 4 * self.rows * self.rank * self.width
        return Work(passes * activations, passes * activations, passes * flops, self.dtype)


BRANCHES = (
    Branch("ViT-B, 1576 tokens, 768-32-768", 1576, 768, 32),
    Branch("ViT-B, 1576 tokens, 768-64-768, gelu, norm", 1576, 768, 64, "gelu", norm=True),
    Branch("one token, 768-32-768", 1, 768, 32),
    Branch("MAM, 512 tokens, 1024-512-1024", 512, 1024, 512),
    Branch("ViT-B, 1576 tokens, 768-32-768, bf16", 1576, 768, 32, dtype=torch.bfloat16),
)
# The gradient of one token is nobody's training step.
TRAINED = tuple(branch for branch in BRANCHES if branch.rows > 1)


def in_torch(branch: Branch) -> Callable[..., Tensor]:
    def run(
        x: Tensor, down: Tensor, up: Tensor, bias_down: Tensor, bias_up: Tensor, *norm: Tensor
    ) -> Tensor:
        z = nn.functional.layer_norm(x, x.shape[-1:], *norm) if norm else x
        hidden = ACTIVATIONS[branch.activation](nn.functional.linear(z, down, bias_down))
        return x + SCALE * nn.functional.linear(hidden, up, bias_up)

    return run


def ours(branch: Branch) -> Callable[..., Tensor]:
    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        norm = Norm(*parameters[4:]) if branch.norm else None
        return bottleneck.linear(
            x, *parameters[:4], scale=SCALE, activation=branch.activation, residual=x, norm=norm
        )

    return run


def forward(run: Callable[..., Tensor], compiled: bool = False) -> Callable[..., Any]:
    def build(*parameters: Tensor) -> Callable[[Tensor], Tensor]:
        call = _compiled(run) if compiled else run
        return lambda x: call(x, *parameters)

    return build


def trained(run: Callable[..., Tensor], compiled: bool = False) -> Callable[..., Any]:
    """y, and the gradients of x and of the parameters."""

    def build(*parameters: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        call = _compiled(run) if compiled else run
        leaves = [t.detach().clone().requires_grad_() for t in parameters]

        def step(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            y = call(x, *leaves)
            return y, *torch.autograd.grad(y, (x, *leaves), grad)

        return step

    return build


def _compiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True)


def sets(branch: Branch, live: int) -> list[Inputs]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def one() -> Inputs:
        width, rank = branch.width, branch.rank
        parameters = [
            draw(rank, width) / width**0.5, draw(width, rank) / rank**0.5, draw(rank), draw(width),
        ]  # fmt: skip
        parameters += [1 + draw(width) / 8, draw(width)] if branch.norm else []
        activations = [draw(branch.rows, width) for _ in range(live)]
        return Inputs(*(tuple(t.to(branch.dtype) for t in ts) for ts in (parameters, activations)))

    return [one(), one()]


def passes(branches: tuple[Branch, ...], direction: str, quick: bool) -> Iterator[Row]:
    wrap, live, count = (forward, 1, 1) if direction == "forward" else (trained, 2, 3)
    for branch in branches:
        plain = in_torch(branch)
        exact = direction == "forward" or branch.dtype != torch.float32
        yield from measure(
            "bottleneck", "linear", branch.name,
            {
                "peftkern": Contender(wrap(ours(branch))),
                "torch": Contender(wrap(plain)),
                "torch.compile": Contender(
                    wrap(plain, compiled=True), *(() if exact else (SUMMED, 1e-5))
                ),
            },
            sets(branch, live),
            lambda *given, plain=plain: wrap(plain)(*given[:-live])(*given[-live:]),
            baseline="peftkern", direction=direction, work=branch.work(count), quick=quick,
        )  # fmt: skip


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be cpu for bottleneck, got {device}")
    yield from passes(BRANCHES, "forward", quick)
    yield from passes(TRAINED, "forward+backward", quick)
