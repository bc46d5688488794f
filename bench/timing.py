"""Rounds: every contender once a round, in a new random order, over the same inputs."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pytest_benchmark.timers import default_timer

Calls = Sequence[Callable[[], Any]]  # one for each set of inputs

# Threads that slept while another pool worked take about 0.1 ms to wake. Where that would count, an
# untimed call on other inputs wakes them.
SLEEPY = 2e-2
L2_BYTES = 256 << 20  # more than any GPU's second-level cache


@dataclass(frozen=True)
class Plan:
    """How long to measure one case."""

    rounds: int
    min_rounds: int  # done even where they take longer than `seconds`
    seconds: float
    round_seconds: float  # calls are repeated until a contender's share of a round lasts this long


FULL = Plan(rounds=40, min_rounds=10, seconds=60.0, round_seconds=5e-3)
QUICK = Plan(rounds=10, min_rounds=3, seconds=3.0, round_seconds=1e-3)


class Clock:
    """Seconds of one call. On CUDA by events, with the second-level cache flushed before each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self._flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device) if cuda else None

    def __call__(self, calls: Calls, first: int, iterations: int) -> float:
        """The mean of `iterations` calls, over the sets of inputs from `first` on."""
        order = [calls[(first + i) % len(calls)] for i in range(iterations)]
        return self._cpu(order) if self._flush is None else self._cuda(order, self._flush)

    @staticmethod
    def _cpu(order: Calls) -> float:
        start = default_timer()
        for call in order:
            call()
        return float(default_timer() - start) / len(order)

    @staticmethod
    def _cuda(order: Calls, flush: torch.Tensor) -> float:
        total = 0.0
        event = cast(Any, torch.cuda.Event)
        for call in order:
            flush.zero_()
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            total += float(begin.elapsed_time(end))
        return total / len(order) / 1e3


@dataclass(frozen=True)
class Times:
    """`seconds[name][r]` is the time of one call in round `r`."""

    seconds: dict[str, tuple[float, ...]]
    iterations: dict[str, int]


def interleave(contenders: Mapping[str, Calls], clock: Clock, plan: Plan, seed: int) -> Times:
    """Contenders come warm. In a round all get the same inputs, in an order that is drawn anew:
    neither a neighbour's load nor what was left in the caches falls on one of them alone.
    """
    draw = random.Random(seed)
    iterations, once = {}, {}
    for name, calls in contenders.items():
        once[name] = clock(calls, 0, 1)
        iterations[name] = max(1, min(1000, round(plan.round_seconds / max(once[name], 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.monotonic()
        for r in range(plan.rounds):
            if r >= plan.min_rounds and time.monotonic() - start > plan.seconds:
                break
            draw.shuffle(order)
            for name in order:
                if once[name] < SLEEPY:
                    clock(contenders[name], r - 1, 1)
                seconds[name].append(clock(contenders[name], r, iterations[name]))
            gc.collect(1)  # between rounds, so that the garbage of one contender burdens nobody
    finally:
        if collecting:
            gc.enable()
    return Times({name: tuple(s) for name, s in seconds.items()}, iterations)
