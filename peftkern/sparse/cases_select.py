"""What the self-check asks of selection: every op, exactly as in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern import _native
from peftkern._verdict import Case, Verdict, compare
from peftkern.sparse import bits, keys

# Rows of 37 end within a word, and those of 150 within the tile that a bitmap's prefix counts.
SHAPES = ((24, 37), (8, 150))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LIMIT, BINS = 0.5, 64
# Of a key, what is left is an octave's sixteenth.
SHIFTS = {torch.float32: 19, torch.float64: 48}
DENSITY = 0.3


def cases(device: torch.device) -> Iterator[Case]:
    def case(op: str, words: str, verdicts: Callable[..., Iterator[Verdict]], *args: Any) -> Case:
        return Case(words, (op,), partial(verdicts, *args, device))

    for dtype in DTYPES:
        typed = str(dtype).removeprefix("torch.")
        yield case("sparse_histogram", f"sparse_histogram {typed}", _histogram, dtype)
        yield case("sparse_pick", f"sparse_pick {typed}", _pick, dtype)
    yield case("sparse_tile_counts", "sparse_tile_counts", _tile_counts)
    yield case("sparse_columns", "sparse_columns", _columns)
    yield case("sparse_bits", "sparse_bits", _bits)
    yield case("sparse_prefix_", "sparse_prefix_", _prefix)
    yield case("sparse_compact", "sparse_compact", _compact)


def _asked(name: str, *args: Any, device: torch.device) -> Iterator[Verdict]:
    """The op there against its reference here."""
    there = [_moved(arg, device) for arg in args]
    found = getattr(torch.ops.peftkern, name)(*there)
    wanted = _native.references[name](*args)
    for result, truth in zip(_flat(found), _flat(wanted), strict=True):
        yield compare(result, truth)


def _histogram(dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    scores = _scores(dtype)
    wide = keys.compared(scores)
    for largest in (False, True):
        low = keys.of_number(LIMIT, wide, largest)
        args = scores, largest, low, SHIFTS[wide], BINS
        yield from _asked("sparse_histogram", *args, device=device)


def _pick(dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    """All below a limit and some of those that equal it; and the smallest of a band."""
    scores = _scores(dtype)
    wide = keys.compared(scores)
    for largest, width, count in ((False, 1, 5), (True, 1, 5), (False, 1 << SHIFTS[wide], 90)):
        limit = keys.of_number(LIMIT, wide, largest)
        args = scores, largest, limit, limit + width, count
        yield from _asked("sparse_pick", *args, device=device)


def _tile_counts(device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        yield from _asked("sparse_tile_counts", bits.pack(_mask(*shape)), device=device)


def _columns(device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        mask = _mask(*shape)
        args = bits.pack(mask), _starts(mask), shape[1], int(mask.sum())
        yield from _asked("sparse_columns", *args, device=device)


def _bits(device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        mask = _mask(*shape)
        columns = mask.nonzero()[:, 1].to(bits.column_dtype(shape[1]))
        yield from _asked("sparse_bits", _starts(mask), columns, shape[1], device=device)


def _prefix(device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        counts = torch.randint(1, 99, shape, generator=torch.Generator().manual_seed(0)).int()
        there = counts.to(device, copy=True)
        torch.ops.peftkern.sparse_prefix_(there)
        flat = counts.flatten()
        yield compare(there, (flat.cumsum(0) - flat).int().view(shape))


def _compact(device: torch.device) -> Iterator[Verdict]:
    for shape in SHAPES:
        mask = _mask(*shape)
        entries = int(mask.sum())
        kept = _mask(1, entries, seed=1)
        packed = [torch.arange(entries).to(t) for t in (torch.float32, torch.uint8, torch.int16)]
        args = packed, _starts(mask), bits.pack(kept)[0], int(kept.sum())
        yield from _asked("sparse_compact", *args, device=device)


def _scores(dtype: torch.dtype) -> list[Tensor]:
    """Quarters among them, so that many are equal, and what is no number."""
    found = []
    for seed, shape in enumerate(SHAPES):
        score = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        score[::2] = (score[::2] * 4).round() / 4
        score[1, :2] = torch.tensor([torch.nan, torch.inf])
        found.append(score.to(dtype))
    return found


def _mask(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < DENSITY


def _starts(mask: Tensor) -> Tensor:
    return bits.row_starts(mask.sum(1), int(mask.sum()))


def _moved(arg: Any, device: torch.device) -> Any:
    if isinstance(arg, list):
        return [tensor.to(device) for tensor in arg]
    return arg.to(device) if isinstance(arg, Tensor) else arg


def _flat(found: Any) -> list[Tensor]:
    """The tensors of an op's result, lists of them among others."""
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found for tensor in _flat(part)]
