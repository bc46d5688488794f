"""Paired comparison: the ratio of two contenders in the same round, and how sure it is.

Rounds drift together (a neighbour's load, a clock that steps down), so the ratio within a round is
far steadier than the ratio of two medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 2000
CONFIDENCE = 0.95


def quantile(values: Sequence[float], p: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), p))


@dataclass(frozen=True)
class Ratio:
    """Median of `time / baseline time` over rounds, with a bootstrap interval."""

    median: float
    low: float
    high: float

    def verdict(self, noise: Ratio | None = None) -> str:
        """Whether time is saved: "same" where the interval spans 1, or reaches into what the
        baseline shows against itself, since so small a difference is none of the contenders'.
        """
        low, high = (min(1.0, noise.low), max(1.0, noise.high)) if noise else (1.0, 1.0)
        if self.low > high:
            return "slower"
        return "faster" if self.high < low else "same"


def paired_ratio(times: Sequence[float], baseline: Sequence[float], seed: int = 0) -> Ratio:
    """Resamples rounds, not times, so that what belongs together stays together."""
    ratios = torch.tensor(times, dtype=torch.float64) / torch.tensor(baseline, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(ratios), (RESAMPLES, len(ratios)), generator=generator)
    medians = ratios[draws].quantile(0.5, dim=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Ratio(float(ratios.quantile(0.5)), low, high)
