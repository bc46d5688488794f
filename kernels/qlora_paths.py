"""Which way a linear goes on a GPU, and in which tiles: tables, data and not code.

    decode    few rows of one expert: the kernel in CUDA, bound by the weight's bytes
    gemm      decodes inside the product: rows of many experts, or too few to decode apart
    panels    decodes 16 MB at a time for the library's product: many rows of one expert
    library   the weight is dense and of one expert: the library's product

What a user's own machine has measured goes before the tables: a file in JSON that `peftkern bench
--tune` writes, `$PEFTKERN_TILES` or `~/.cache/peftkern/tiles.json` (under `$XDG_CACHE_HOME` where
that is set). It goes by `device_key`, and every part is optional:

    {"sm90-132-triton3.6": {"crossover": {"16": 96},
                            "tiles": {"gemm 16": [[32, [32, 64, 64, 4, 4, null]], [null, [...]]]}}}

16 and 32 are the bits of an activation. A list goes by rows, rising: its first entry that is for at
least as many rows, null being any number, gives the fields of a `Tile`; null for `splits` leaves
them to the heuristic.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

PATHS = ("decode", "gemm", "panels", "library")
DECODE_ROWS = 16  # what qlora_decode takes at most
SPLITS = (8, 4, 2)


class Tile(NamedTuple):
    """What one program makes: rows of activations times outputs, `inner` terms of the sum a step.

    splits: programs that share one sum; None for as many as the device has room for.
    """

    rows: int
    outputs: int
    inner: int
    warps: int
    stages: int
    splits: int | None = None


Rows = tuple[tuple[int | None, Tile], ...]

# Rows from which on panels win: what other people's kernels of this kind found on these, by
# architecture; ours were measured on none yet.
CROSSOVERS = {"sm80": 128, "sm86": 256, "sm89": 256, "sm90": 64}
CROSSOVER = 128  # of any other
MEASURED: frozenset[tuple[str, int]] = frozenset()  # architecture and bits, of a committed row

# By kernel and bits, then by architecture; "any" stands for those that are not listed.
TILES: dict[str, dict[str, Rows]] = {
    "gemm 16": {
        "any": (
            (16, Tile(16, 64, 128, 4, 4)),
            (32, Tile(32, 64, 128, 4, 3)),
            (64, Tile(64, 64, 64, 4, 4)),
            (None, Tile(128, 128, 64, 8, 3)),
        ),
        "sm90": (
            (16, Tile(16, 64, 128, 4, 4)),
            (32, Tile(32, 64, 128, 4, 3)),
            (64, Tile(64, 64, 128, 4, 3)),
            (None, Tile(128, 128, 64, 8, 3)),
        ),
    },
    # Of the gradient of x outputs are the weight's columns: a wide tile reads whole sectors.
    "grad_x 16": {
        "any": (
            (32, Tile(32, 128, 64, 4, 3)),
            (64, Tile(64, 128, 64, 8, 3)),
            (None, Tile(128, 64, 64, 8, 3)),
        ),
    },
    "grad_x 32": {"any": ((None, Tile(32, 32, 32, 4, 2)),)},
    "gemm 32": {"any": ((16, Tile(16, 32, 32, 4, 2)), (None, Tile(32, 32, 32, 4, 2)))},
    "down 16": {"any": ((16, Tile(16, 64, 128, 4, 4)), (None, Tile(64, 64, 64, 4, 4)))},
    "down 32": {"any": ((None, Tile(16, 32, 32, 4, 2)),)},
    # onebit's product; codes of one bit are many to a byte, so steps are long.
    "onebit 16": {
        "any": (
            (16, Tile(16, 64, 128, 4, 4)),
            (32, Tile(32, 64, 128, 4, 3)),
            (None, Tile(64, 64, 128, 4, 3)),
        ),
    },
    "onebit 32": {"any": ((16, Tile(16, 32, 32, 4, 2)), (None, Tile(32, 32, 32, 4, 2)))},
    # As many masks as siblings: steps are shorter, or registers run out.
    "siblings_down 16": {"any": ((16, Tile(16, 64, 64, 4, 4)), (None, Tile(64, 64, 32, 4, 6)))},
    "siblings_down 32": {"any": ((None, Tile(16, 32, 32, 4, 2)),)},
    # Of these, `inner` is the widest rank that one launch serves.
    "lora_bwd 16": {"any": ((None, Tile(64, 128, 64, 4, 3)),)},
    "lora_bwd 32": {"any": ((None, Tile(32, 64, 32, 4, 2)),)},
    "grad_a 16": {"any": ((None, Tile(64, 128, 64, 4, 3)),)},
    "grad_a 32": {"any": ((None, Tile(32, 64, 32, 4, 2)),)},
    # And of this one columns of the gradient; a step takes `rows` rows of activations.
    "grad_weight 16": {"any": ((None, Tile(64, 128, 128, 8, 3)),)},
    "grad_weight 32": {"any": ((None, Tile(32, 64, 64, 4, 2)),)},
    # Of bottleneck: a program of the first holds the whole rank of its rows, and of the second
    # `inner` is the widest rank.
    "bottleneck 16": {"any": ((16, Tile(16, 64, 64, 4, 4)), (None, Tile(64, 64, 64, 4, 3)))},
    "bottleneck 32": {"any": ((None, Tile(16, 32, 32, 4, 2)),)},
    "bottleneck_sums 16": {"any": ((None, Tile(64, 128, 64, 4, 3)),)},
    "bottleneck_sums 32": {"any": ((None, Tile(32, 64, 32, 4, 2)),)},
    # Of sparse: rows and columns of the pattern, and tokens a step.
    "sddmm 16": {"any": ((None, Tile(128, 128, 64, 8, 3)),)},
    "sddmm 32": {"any": ((None, Tile(64, 64, 32, 8, 2)),)},
    # Each of a convolution's inputs has an address of its own: steps are short, or registers run
    # out.
    "conv2d_sddmm 16": {"any": ((None, Tile(128, 128, 32, 8, 3)),)},
    "conv2d_sddmm 32": {"any": ((None, Tile(64, 64, 16, 8, 2)),)},
}
# Where blocks straddle rows: each weight has its scale looked up, which larger tiles have no
# registers for.
STRADDLING = {"outputs": 32, "inner": 32, "warps": 4, "stages": 2}
# Each program costs time of its own in the interpreter, whatever its size.
INTERPRETED = Tile(32, 32, 64, 4, 1, 1)


_forced_path: str | None = None
_forced_tile: Tile | None = None


@contextmanager
def forced(path: str | None = None, tile: Tile | None = None) -> Iterator[None]:
    """Every linear inside goes this way, where it can at all, in these tiles; for tests and tuning.

    Raises:
        ValueError: no path of this name.
    """
    global _forced_path, _forced_tile
    if path is not None and path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    before = _forced_path, _forced_tile
    _forced_path, _forced_tile = path, tile
    try:
        yield
    finally:
        _forced_path, _forced_tile = before


def choose(
    device: torch.device, dtype: torch.dtype, rows: int, experts: int, bits: int, decodes: bool
) -> str:
    """The path of a linear.

    Args:
        rows: of x, those of all experts.
        bits: of a code; 0: the weight is dense.
        decodes: whether `qlora_decode` has a kernel for this device, and the call suits it.
    """
    if experts > 1:
        return "gemm"  # where the rows of an expert lie is known on the device alone
    if bits == 0:
        return "library"
    if _forced_path is not None:
        return _forced_path
    if rows <= DECODE_ROWS and decodes:
        return "decode"
    return "gemm" if rows < crossover(device, dtype)[0] else "panels"


def describe(device: torch.device, dtype: torch.dtype, bits: int, decodes: bool) -> str:
    """The paths of a linear of one expert by its rows, and where that comes from, for `explain`."""
    if bits == 0:
        return "the library's product, since the weight is dense"
    limit, source = crossover(device, dtype)
    few = f"decode up to {DECODE_ROWS} rows, " * decodes
    return f"{few}gemm below {limit}, then panels ({source})"


def crossover(device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
    """From how many rows on panels win, and who says so."""
    bits = 8 * dtype.itemsize
    own = _own(device).get("crossover", {}).get(str(bits))
    if own is not None:
        return int(own), "measured on this machine"
    name = architecture(device)
    limit = CROSSOVERS.get(name, CROSSOVER)
    if (name, bits) in MEASURED:
        return limit, f"measured on {name}"
    return limit, f"a heuristic: nobody has measured {name}"


def tile(kernel: str, device: torch.device, dtype: torch.dtype, rows: int) -> Tile:
    """The tile of this kernel for so many rows."""
    if _forced_tile is not None:
        return _forced_tile
    if device.type == "cpu":
        return INTERPRETED
    name = f"{kernel} {8 * dtype.itemsize}"
    own = _own(device).get("tiles", {}).get(name)
    if own is not None:
        return _of_rows([(limit, Tile(*fields)) for limit, fields in own], rows)
    table = TILES[name]
    return _of_rows(table.get(architecture(device), table["any"]), rows)


def _of_rows(table: Sequence[tuple[int | None, Tile]], rows: int) -> Tile:
    return next(tile for limit, tile in table if limit is None or rows <= limit)


def splits(tile: Tile, programs: int, inner: int, device: torch.device) -> int:
    """How many programs share a sum over `inner` terms, where `programs` would work unsplit.

    At most two to a multiprocessor, and four steps at least for each.
    """
    if tile.splits is not None:
        return tile.splits
    room, steps = 2 * multiprocessors(device), inner // tile.inner
    return next((s for s in SPLITS if programs * s <= room and steps >= 4 * s), 1)


@cache
def architecture(device: torch.device) -> str:
    """sm80, sm90, …; for other vendors' GPUs the vendor, and for a CPU Triton's interpreter."""
    if device.type == "cpu":
        return "the interpreter"
    if device.type != "cuda" or torch.version.hip:
        return "AMD" if device.type == "cuda" else device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 64  # of what we cannot ask: enough to split small sums, too few to split large ones
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def device_key(device: torch.device) -> str:
    """What a measurement holds for: architecture, multiprocessors and Triton's version."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return f"{architecture(device)}-{multiprocessors(device)}-triton{version}"


def own_file() -> Path:
    """Where this user's measurements lie."""
    chosen = os.environ.get("PEFTKERN_TILES")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "peftkern" / "tiles.json"


@cache
def _own(device: torch.device) -> Mapping[str, Any]:
    """Read once a process; a file that is not of this form is an error and not passed over."""
    file = own_file()
    if device.type == "cpu" or not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} and no object")
    except ValueError as error:
        raise ValueError(
            f"{file} must hold JSON by device, got {error}: write it again or delete it"
        ) from None
    found: Mapping[str, Any] = content.get(device_key(device), {})
    return found
