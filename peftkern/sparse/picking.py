"""The k smallest or largest of many tensors, exactly: the ops of selection, and the search.

The search narrows the keys (keys.py) down, counting all scores in `BINS` bins at a time; it starts
from where a sample says that the last one to be picked lies, so that mostly the scores are read
twice: to count them, and to pick. No score is copied, moved or sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peftkern import _native
from peftkern.sparse import bits, keys
from peftkern.sparse.pattern import CSR_BELOW, Pattern

_STEP = 12  # bits of the keys that one histogram tells
BINS = 2**_STEP  # spelled once more, in csrc/sparse/select.h, as is the next
BAND = 32768  # a pick may choose among so many scores, or among those of one key
_SAMPLE = 2**15
_DEVIATIONS = 5  # of the sample's own error, on either side

Range = tuple[int, int, int]  # low, shift and bins of a histogram


def _fake_pick(
    scores: Sequence[Tensor], largest: Any, low: Any, high: Any, count: Any
) -> tuple[list[Tensor], Tensor]:
    found = [s.new_empty(s.shape[0], bits.words(s.shape[1]), dtype=torch.int32) for s in scores]
    return found, scores[0].new_empty(len(scores), dtype=torch.int64)


histogram_op = _native.define(
    "sparse_histogram(Tensor[] scores, bool largest, int low, int shift, int bins) -> Tensor",
    lambda scores, largest, low, shift, bins: scores[0].new_empty(bins + 2, dtype=torch.int64),
    keys.histogram,
)
# The bits of each, and how many are set in each.
pick_op = _native.define(
    "sparse_pick(Tensor[] scores, bool largest, int low, int high, int count) "
    "-> (Tensor[], Tensor)",
    _fake_pick,
    keys.pick,
)
# A csr's row starts, and what is left of tensors of an entry each, where the `count` entries stay
# whose bit is set in `kept`.
compact_op = _native.define(
    "sparse_compact(Tensor[] packed, Tensor row_start, Tensor kept, int count) -> Tensor[]",
    lambda packed, row_start, kept, count: [
        torch.empty_like(row_start),
        *(p.new_empty(count) for p in packed),
    ],
    keys.compact,
)


def below(scores: Sequence[Tensor], threshold: float, side: str) -> tuple[list[Tensor], Tensor]:
    """Those whose magnitude is `side` ("<", "<=", ">" or ">=") of the threshold; as `sparse_pick`.

    Args:
        scores: matrices.
    """
    largest = side[0] == ">"
    limit = keys.of_number(threshold, keys.compared(scores), largest) + (len(side) == 2)
    return pick_op(scores, largest, limit, limit + 1, 0)  # type: ignore[no-any-return]


def first(
    scores: Sequence[Tensor], count: int, largest: bool = False,
    group: dist.ProcessGroup | None = None,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """The `count` smallest or largest magnitudes of all scores, equal ones in their order.

    Args:
        scores: matrices on one device.
        count: how many; all that are numbers where there are fewer.
        largest: and not the smallest.
        group: its processes have a part of the scores each, in the order of their ranks; `count`
            is that of all.

    Returns:
        As `sparse_pick`: the bits of each, int32 `[rows, words]`, and how many are set, `[n]`.
    """
    end = keys.above_all(keys.compared(scores))
    if count <= 0:
        return pick_op(scores, largest, 0, 1, 0)  # type: ignore[no-any-return]
    width, zeros = keys.width(scores)
    range_ = _whole(width, zeros) if group else _guess(scores, count, largest, width, zeros)
    while True:
        low, shift, bins = range_
        own = histogram_op(scores, largest, low, shift, bins)
        counts = own if group is None else _summed(own, group)
        up_to = counts.cumsum(0)
        if up_to[-1] <= count:
            return pick_op(scores, largest, end, end + 1, 0)  # type: ignore[no-any-return]
        # The first bin that with all before it has `count`.
        place = int(torch.searchsorted(up_to, count))
        if not 0 < place <= bins:  # the sample has not told the truth
            range_ = _whole(width, zeros)
            continue
        left, held = count - int(up_to[place - 1]), int(counts[place])
        low += (place - 1) << shift
        if shift <= zeros or (held <= BAND and group is None):
            if group is not None:
                left = _own_part(int(own[place]), left, group, own.device)
            high = low + (1 if shift <= zeros else 1 << shift)
            return pick_op(scores, largest, low, high, left)  # type: ignore[no-any-return]
        range_ = low, max(zeros, shift - _STEP), min(BINS, 1 << (shift - zeros))


def _whole(width: int, zeros: int) -> Range:
    return 0, max(zeros, width - _STEP), BINS


def _guess(scores: Sequence[Tensor], count: int, largest: bool, width: int, zeros: int) -> Range:
    """In which the last one to be picked lies, most likely."""
    total = sum(score.numel() for score in scores)
    # Odd, or it would stay in few columns of a matrix whose width is a power of two.
    stride = total // _SAMPLE | 1
    if stride == 1:
        return _whole(width, zeros)
    dtype, parts, start = keys.compared(scores), [], 0
    for score in scores:
        parts.append(keys.of(score.view(-1)[-start % stride :: stride], dtype, largest))
        start += score.numel()
    sample = torch.cat(parts).sort().values
    sample = sample[sample < keys.above_all(dtype)]
    share = min(1.0, count / total)
    place, spread = share * len(sample), (share * (1 - share) * len(sample)) ** 0.5
    margin = int(_DEVIATIONS * spread) + _DEVIATIONS
    first, last = int(place) - margin, int(place) + margin
    low = int(sample[first]) if first >= 0 else 0
    end = int(sample[last]) + 1 if last < len(sample) else keys.above_all(dtype)
    shift = max(zeros, (end - low - 1).bit_length() - _STEP)
    return low, shift, ((end - low - 1) >> shift) + 1


def _summed(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = counts.clone()
    dist.all_reduce(total, group=group)
    return total


def _own_part(held: int, left: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """Of `left` equal ones, those that are this process's, where it holds so many."""
    own = torch.tensor([held], device=device)
    all_held = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_held, own, group=group)
    before = sum(int(other) for other in all_held[: dist.get_rank(group)])
    return max(0, min(held, left - before))


def patterns(
    scores: Sequence[Tensor], found: tuple[list[Tensor], Tensor], kind: str | None = None
) -> list[Pattern]:
    """What was picked of each; the bits are gone afterwards, one after the other."""
    every, _ = found
    every.reverse()
    shapes = [(score.shape[0], score.shape[1]) for score in scores]
    return [Pattern.from_bits(every.pop(), shape, kind) for shape in shapes]


def subset(
    pattern: Pattern, kept: Tensor, count: int, packed: Sequence[Tensor]
) -> tuple[Pattern, list[Tensor]]:
    """The entries whose bit is set, and what belongs to them, in the same order.

    Args:
        kept: int32 `[ceil(nnz / 32)]`, an entry's bit as in a bitmap of one row.
        count: of bits that are set.
        packed: tensors `[nnz]` of any dtype: values, moments, ages.
    """
    row_start, columns = pattern.csr().tensors
    starts, mine, *others = compact_op([columns, *packed], row_start, kept, count)
    starts = starts.to(bits.index_dtype(count))
    csr = Pattern("csr", pattern.shape, count, (starts, mine))
    return csr if csr.density < CSR_BELOW else csr.bitmap(), others
