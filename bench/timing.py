"""Rounds: every contender once a round, in a new random order, over the same inputs."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from pytest_benchmark.timers import default_timer

from .gpu import Flush

Calls = Sequence[Callable[[], Any]]  # one for each set of inputs

# Threads that slept while another pool worked take about 0.1 ms to wake. Where that would count, an
# untimed call on other inputs wakes them.
SLEEPY = 2e-2
FLUSH_SECONDS = 4e-5  # the least that a flush takes on any GPU


@dataclass(frozen=True)
class Plan:
    """How long to measure one case."""

    rounds: int
    min_rounds: int  # done even where they take longer than `seconds`
    seconds: float
    round_seconds: float  # calls are repeated until a contender's share of a round lasts this long
    most: int = 1000  # but never more often


FULL = Plan(rounds=40, min_rounds=10, seconds=60.0, round_seconds=5e-3)
QUICK = Plan(rounds=10, min_rounds=3, seconds=3.0, round_seconds=1e-3)
# A GPU's clock is its own, and each call costs a flush besides.
GPU = Plan(rounds=20, min_rounds=7, seconds=2.0, round_seconds=1e-4, most=10)


class Clock:
    """Seconds of one call. On CUDA those of the device alone, by events: before each call the
    second-level cache is flushed, for as long as the host takes to issue the call.
    """

    def __init__(self, device: torch.device, event: Callable[..., Any] | None = None) -> None:
        """`event` makes what stands in for CUDA's events, which tests need."""
        self.device = device
        self.flush = Flush(device)
        self._event = event or (torch.cuda.Event if device.type == "cuda" else None)

    def __call__(self, calls: Calls, first: int, iterations: int) -> float:
        """The mean of `iterations` calls, over the sets of inputs from `first` on."""
        order = [calls[(first + i) % len(calls)] for i in range(iterations)]
        return self._cpu(order) if self._event is None else self._cuda(order, self._event)

    @staticmethod
    def _cpu(order: Calls) -> float:
        start = default_timer()
        for call in order:
            call()
        return float(default_timer() - start) / len(order)

    def _cuda(self, order: Calls, event: Callable[..., Any]) -> float:
        flushes = 1 + ceil(self._cpu(order[:1]) / FLUSH_SECONDS)  # of the host: nothing waits here
        total = 0.0
        for call in order:
            begin, end = event(enable_timing=True), event(enable_timing=True)
            for _ in range(flushes):
                self.flush()
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
        wanted = round(plan.round_seconds / max(once[name], 1e-9))
        iterations[name] = max(1, min(plan.most, wanted))
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
