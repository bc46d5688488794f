"""The loop: the same for ours and for the peers, so that only the layers differ."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.demo import memory

HELD_OUT_WINDOWS = 64  # at most; a reading of them takes about as long as five steps


@dataclass(frozen=True)
class Recipe:
    steps: int = 100
    batch: int = 4
    length: int = 128
    learning_rate: float = 1e-3
    warmup: int = 10
    largest_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a run measured. Losses are means over tokens, in nats."""

    losses: list[float]
    seconds: list[float]
    held_out_before: float
    held_out_after: float
    peak_memory: int
    peak_of_training: bool  # else of the whole process
    trainable: int

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self.seconds)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond that a float overflows


def run(
    model: nn.Module,
    parameters: list[nn.Parameter],
    train: Tensor,
    held_out: Tensor,
    recipe: Recipe,
    progress: AbstractContextManager[Callable[[int, float], None]],
    optimizer: torch.optim.Optimizer | None = None,
) -> Result:
    """Evaluates, takes the recipe's steps within `progress`, and evaluates again."""
    before = evaluate(model, held_out, recipe.batch)
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    losses: list[float] = []
    seconds: list[float] = []
    of_training = memory.reset_peak()
    with progress as report:
        for batch in batches(train, recipe):
            start = time.perf_counter()
            loss = _loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, recipe.largest_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            report(len(losses), losses[-1])
    peak = memory.peak()
    after = evaluate(model, held_out, recipe.batch)
    trainable = sum(parameter.numel() for parameter in parameters)
    return Result(losses, seconds, before, after, peak, of_training, trainable)


def evaluate(model: nn.Module, windows: Tensor, batch: int) -> float:
    """Mean loss, over windows spread evenly where there are too many."""
    count = min(len(windows), HELD_OUT_WINDOWS)
    chosen = windows[torch.linspace(0, len(windows) - 1, count).long()]
    total = 0.0
    with torch.no_grad():
        for part in torch.split(chosen, batch):
            total += _loss(model, part).item() * len(part)
    return total / count


def batches(windows: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """`[batch, length]` a step; every window once before any comes again."""
    generator = torch.Generator().manual_seed(recipe.seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch:
            queue = torch.cat([queue, torch.randperm(len(windows), generator=generator)])
        yield windows[queue[: recipe.batch]]
        queue = queue[recipe.batch :]


def rate(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: up over the warm-up, then straight down to nothing."""
    return min((step + 1) / recipe.warmup, 1.0) * (1 - step / recipe.steps)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Any = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss  # type: ignore[no-any-return]
