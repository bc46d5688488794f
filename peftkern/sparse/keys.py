"""What selection orders by, and its ops in plain torch, for devices that have no kernel.

    key      = the bits of |score|, without its sign: they rise with it
             = those of infinity less them, where the largest come first
    counts   [0] of keys below low, [1 + b] of those with b = (key - low) >> shift < bins, [-1] of
             those above; a NaN, whose key is above infinity's, is counted nowhere
    picked   keys below low; and of those in [low, high) the `count` smallest, equal ones in the
             order of the scores

Keys are those of float32, in which 16-bit scores are exact, and of float64 where any of the scores
is: so all of a model are compared as what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftkern.sparse import bits

_PANEL = 2**22  # elements whose keys are made at a time
_INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_WIDTH = {torch.float32: 31, torch.float64: 63}
# Of float32's key the low bits that are 0 in every key of that dtype.
_ZEROS = {torch.bfloat16: 16, torch.float16: 13}


def compared(scores: Sequence[Tensor]) -> torch.dtype:
    """As what they are compared: float64 where one of them is, else float32."""
    wide = any(score.dtype == torch.float64 for score in scores)
    return torch.float64 if wide else torch.float32


def width(scores: Sequence[Tensor]) -> tuple[int, int]:
    """-> the bits of their keys, and how many of the lowest are the same in all of them."""
    found = compared(scores)
    if found == torch.float64:
        return _WIDTH[found], 0
    return _WIDTH[found], min((_ZEROS.get(score.dtype, 0) for score in scores), default=0)


def of_number(number: float, dtype: torch.dtype, largest: bool) -> int:
    """The key of a threshold, rounded as torch rounds a number that it compares with."""
    return int(of(torch.tensor([number], dtype=dtype), dtype, largest))


def above_all(dtype: torch.dtype) -> int:
    """One more than the last key of a number."""
    return _INFINITY[dtype] + 1


def of(score: Tensor, dtype: torch.dtype, largest: bool) -> Tensor:
    """int32, or int64 of float64, in the score's shape."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    keys = score.to(dtype).abs().view(integers)
    if not largest:
        return keys
    # A NaN's stays above infinity's.
    return torch.where(keys > _INFINITY[dtype], keys, _INFINITY[dtype] - keys)


def _panels(scores: Sequence[Tensor], largest: bool) -> Iterator[tuple[int, slice, Tensor]]:
    """Which of the scores, which rows of it, and their keys."""
    dtype = compared(scores)
    for i, score in enumerate(scores):
        height = max(1, _PANEL // max(1, score.shape[1]))
        for row in range(0, score.shape[0], height):
            rows = slice(row, min(row + height, score.shape[0]))
            yield i, rows, of(score[rows], dtype, largest).long()


def histogram(scores: Sequence[Tensor], largest: bool, low: int, shift: int, bins: int) -> Tensor:
    counts = torch.zeros(bins + 2, dtype=torch.int64, device=scores[0].device)
    end = above_all(compared(scores))
    for _, _, keys in _panels(scores, largest):
        numbers = keys[keys < end]
        place = ((numbers - low) >> shift).clamp_(-1, bins)
        counts += (place + 1).bincount(minlength=bins + 2)
    return counts


def pick(
    scores: Sequence[Tensor], largest: bool, low: int, high: int, count: int
) -> tuple[list[Tensor], Tensor]:
    found = [
        score.new_zeros(score.shape[0], bits.words(score.shape[1]), dtype=torch.int32)
        for score in scores
    ]
    counts = torch.zeros(len(scores), dtype=torch.int64, device=scores[0].device)
    limit, left = _band_limit(scores, largest, low, high, count)
    for i, rows, keys in _panels(scores, largest):
        picked = keys < limit
        if left:
            equal = keys == limit
            first = equal & (equal.flatten().cumsum(0) <= left).view(equal.shape)
            left -= int(first.sum())
            picked |= first
        found[i][rows] = bits.pack(picked)
        counts[i] += picked.sum()
    return found, counts


def _band_limit(
    scores: Sequence[Tensor], largest: bool, low: int, high: int, count: int
) -> tuple[int, int]:
    """The key up to which all are picked, and how many of those that equal it."""
    if count == 0 or high == low + 1:
        return low, count
    band = [keys[(keys >= low) & (keys < high)] for _, _, keys in _panels(scores, largest)]
    smallest = torch.cat(band).sort().values[:count]
    if not len(smallest):
        return low, 0
    limit = int(smallest[-1])
    return limit, int((smallest == limit).sum())


def compact(packed: Sequence[Tensor], row_start: Tensor, kept: Tensor, count: int) -> list[Tensor]:
    mask = bits.unpack(kept[None], len(packed[0]))[0]
    before = torch.nn.functional.pad(mask.cumsum(0, dtype=row_start.dtype), (1, 0))
    return [before[row_start.long()], *(values[mask] for values in packed)]
