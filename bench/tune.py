"""`peftkern bench --tune`: which tiles and which path are fastest on this GPU, in bfloat16 on NF4.

What it finds goes into the user's own file, which the kernels' tables read (qlora_paths.py), after
every step, so a search that was stopped has kept what it had. It prints the same as lines for those
tables. Candidates whose result is off, or that do not fit the device, drop out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftkern.kernels import qlora_paths as paths

from .statistics import quantile
from .timing import Clock
from .tune_problems import Problem, Timer

Tile = paths.Tile
Problems = Callable[[str, int], Problem]
Table = dict[str, Any]  # of one device, in the form of the user's file

BITS = 16
SHAPES = ((4096, 4096), (14336, 4096))  # outputs and inputs, of Llama 3 8B
# The rows that stand for any number: panels take over from the product, and the others train.
MANY = {"gemm": 256, "down": 2048, "lora_bwd": 2048, "grad_a": 2048}
CROSSOVERS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
# rows, outputs, inner, warps, stages: those that a GPU of today has registers and memory for.
CANDIDATES: dict[str, dict[int | None, tuple[Tile, ...]]] = {
    "gemm": {
        16: (
            Tile(16, 32, 128, 4, 4), Tile(16, 64, 64, 4, 5), Tile(16, 64, 256, 4, 3),
            Tile(16, 128, 64, 4, 4), Tile(16, 128, 128, 8, 3),
        ),
        32: (
            Tile(32, 32, 128, 4, 4), Tile(32, 64, 128, 4, 3), Tile(32, 128, 64, 4, 4),
            Tile(32, 128, 128, 8, 3),
        ),
        64: (
            Tile(32, 128, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 128, 64, 4, 4),
            Tile(64, 128, 64, 8, 4), Tile(64, 128, 128, 8, 3),
        ),
        None: (
            Tile(64, 128, 64, 8, 4), Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3),
            Tile(128, 128, 64, 4, 4), Tile(256, 64, 64, 8, 3), Tile(128, 256, 64, 8, 3),
        ),
    },
    "down": {
        16: (Tile(16, 16, 256, 4, 4), Tile(16, 16, 512, 8, 3), Tile(16, 16, 128, 2, 5)),
        None: (
            Tile(32, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3), Tile(128, 64, 64, 8, 3),
            Tile(16, 64, 256, 4, 3),
        ),
    },
    "lora_bwd": {
        None: (
            Tile(32, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 4, 3),
            Tile(128, 128, 64, 8, 3),
        ),
    },
    "grad_a": {
        None: (
            Tile(32, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 4, 3),
            Tile(128, 128, 64, 8, 3),
        ),
    },
}  # fmt: skip
GAIN = 0.98  # of the incumbent's time, below which another must be: what lies between is noise
FINALISTS = 2
ROUNDS, FINAL_ROUNDS = 3, 15


def timer_on(device: torch.device) -> Timer:
    clock = Clock(device)
    return lambda call, rounds: quantile([clock([call], 0, 1) for _ in range(rounds)], 0.5)


def fastest(incumbent: Tile, others: Sequence[Tile], seconds: Callable[[Tile, int], float]) -> Tile:
    """The incumbent, unless another is clearly faster in both looks."""
    once = {tile: seconds(tile, ROUNDS) for tile in others if tile != incumbent}
    finalists = [t for t in sorted(once, key=once.__getitem__) if once[t] < float("inf")]
    found, least = incumbent, seconds(incumbent, FINAL_ROUNDS) * GAIN
    for tile in finalists[:FINALISTS]:
        took = seconds(tile, FINAL_ROUNDS)
        if took < least:
            found, least = tile, took
    return found


def crossing(rows: Sequence[int], gemm: Sequence[float], panels: Sequence[float]) -> int:
    """From how many rows on panels are faster, at these and all that follow; twice the last where
    they are not faster even there.
    """
    found = 2 * rows[-1]
    for count, one, other in reversed(list(zip(rows, gemm, panels, strict=True))):
        if not other < one:
            break
        found = count
    return found


def table_tile(kernel: str, count: int, device: torch.device) -> Tile:
    """That of the committed table, whatever the user's file says."""
    table = paths.TILES[f"{kernel} {BITS}"]
    return paths._of_rows(table.get(paths.architecture(device), table["any"]), count)


def search_tiles(
    kernel: str, problem: Problems, timer: Timer, device: torch.device, end: float
) -> list[Any]:
    """A whole list: where time is up, the entries that are left keep the table's tile."""
    found = []
    for limit, candidates in CANDIDATES[kernel].items():
        count = limit or MANY[kernel]
        tile = table_tile(kernel, count, device)
        if time.monotonic() < end:
            seconds = partial(problem(kernel, count).seconds, "gemm", timer)
            tile = fastest(tile, candidates, seconds)
        found.append([limit, list(tile)])
    return found


def search_crossover(tiles: list[Any], problem: Problems, timer: Timer) -> int:
    table = [(limit, Tile(*fields)) for limit, fields in tiles]
    took: dict[str, list[float]] = {"gemm": [], "panels": []}
    for count in CROSSOVERS:
        here, tile = problem("gemm", count), paths._of_rows(table, count)
        for path, seconds in took.items():
            seconds.append(here.seconds(path, timer, tile, FINAL_ROUNDS))
    return crossing(CROSSOVERS, took["gemm"], took["panels"])


def tune(
    device: torch.device,
    file: Path,
    limit: float = float("inf"),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    timer: Timer | None = None,
) -> Table:
    """Searches, and keeps each finding in `file` at once; after `limit` seconds it comes to an end.

    Returns:
        What it found for this device.
    """
    end, timer = time.monotonic() + limit, timer or timer_on(device)
    problem = partial(Problem, shapes=shapes, device=device)
    found: Table = {"crossover": {}, "tiles": {}}
    for kernel in CANDIDATES:
        if time.monotonic() >= end:
            break
        name = f"{kernel} {BITS}"
        found["tiles"][name] = search_tiles(kernel, problem, timer, device, end)
        if kernel == "gemm":
            found["crossover"][str(BITS)] = search_crossover(found["tiles"][name], problem, timer)
        keep(found, paths.device_key(device), file)
    return found


def keep(found: Table, key: str, file: Path) -> None:
    """Beside what the file says of other devices, and of what was not searched on this one."""
    stored: dict[str, Table] = json.loads(file.read_text()) if file.exists() else {}
    before = stored.get(key, {})
    stored[key] = {part: before.get(part, {}) | found[part] for part in found}
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(stored, indent=1) + "\n")
    fresh.replace(file)


def lines(found: Table, architecture: str) -> list[str]:
    """As the tables of qlora_paths.py have them."""
    said = []
    for name, entries in found["tiles"].items():
        tiles = ", ".join(f"({limit}, Tile{tuple(fields)})" for limit, fields in entries)
        said.append(f'TILES["{name}"]: "{architecture}": ({tiles}),'.replace(", None)),", ")),"))
    for bits, count in found["crossover"].items():
        said.append(f'CROSSOVERS: "{architecture}": {count},')
        said.append(f'MEASURED: ("{architecture}", {bits}),')
    return said
