"""The search for tiles, with a clock that says what it is told; kernels run in the interpreter."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftkern import _native
from peftkern.bench import tune, tune_problems
from peftkern.cli import main

pytest.importorskip("triton", reason="needs triton")
from peftkern.kernels import qlora_paths as paths  # noqa: E402

Tile = paths.Tile

CPU = torch.device("cpu")
SHAPES = ((48, 64), (16, 64))
A, B, C = (Tile(16, 16, 16, warps, 1) for warps in (1, 2, 4))

# The last of each is to win.
CHOICES = {
    "gemm": {
        16: (Tile(16, 16, 64, 1, 1, 1), Tile(16, 32, 64, 1, 1, 1)),
        None: (Tile(32, 64, 64, 1, 1, 1), Tile(32, 32, 32, 1, 1, 1)),
    },
    "down": {None: (Tile(16, 16, 64, 1, 1, 1), Tile(64, 16, 64, 1, 1, 1))},
}


@pytest.fixture
def interpreted() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there, and kernels are not interpreted")
    with _native.Instead(_native.launchers):
        yield


def told(seconds: dict[Tile, float]) -> Callable[[Tile, int], float]:
    return lambda tile, rounds: seconds[tile]


def test_the_fastest_wins() -> None:
    assert tune.fastest(A, [B, C], told({A: 3.0, B: 2.0, C: 1.0})) == C


def test_what_is_within_the_noise_changes_nothing() -> None:
    assert tune.fastest(A, [B, C], told({A: 1.0, B: 0.99, C: 1.1})) == A


def test_what_does_not_run_never_wins() -> None:
    never = float("inf")
    assert tune.fastest(A, [B, C], told({A: 1.0, B: never, C: never})) == A
    assert tune.fastest(A, [B, C], told({A: never, B: 1.0, C: never})) == B


def test_one_lucky_look_is_not_enough() -> None:
    def seconds(tile: Tile, rounds: int) -> float:
        return {A: 2.0, B: 1.0 if rounds == tune.ROUNDS else 3.0}[tile]

    assert tune.fastest(A, [B], seconds) == A


@pytest.mark.parametrize(
    ("gemm", "panels", "wanted"),
    [
        ([1, 2, 4, 8], [3, 3, 3, 3], 64),
        ([1, 2, 4, 8], [0, 0, 0, 0], 16),
        ([1, 2, 4, 8], [9, 9, 9, 9], 256),
        ([1, 5, 1, 8], [3, 3, 3, 3], 128),  # once faster is not faster from there on
        ([1, 2, 3, 3], [3, 3, 3, 3], 256),
    ],
)
def test_panels_begin_where_they_are_faster_from_there_on(
    gemm: list[float], panels: list[float], wanted: int
) -> None:
    assert tune.crossing((16, 32, 64, 128), gemm, panels) == wanted


def test_a_search_finds_what_the_clock_says_and_the_tables_read_it(
    interpreted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {kernel: {limit: some[-1] for limit, some in c.items()} for kernel, c in CHOICES.items()}
    monkeypatch.setattr(tune, "CANDIDATES", CHOICES)
    monkeypatch.setattr(tune, "MANY", dict.fromkeys(CHOICES, 24))
    monkeypatch.setattr(tune, "CROSSOVERS", (8, 12, 24))
    wanted = [tile for some in best.values() for tile in some.values()]

    def timer(call: Callable[[], tuple[Tensor, ...]], rounds: int) -> float:
        if paths._forced_path == "panels":
            return 1.1
        return len(call()[0]) / 10 * (1.0 if paths._forced_tile in wanted else 2.0)

    file = tmp_path / "cache" / "tiles.json"
    found = tune.tune(CPU, file, shapes=SHAPES, timer=timer)
    assert found["crossover"] == {"16": 12}
    key = paths.device_key(CPU)
    assert json.loads(file.read_text()) == {key: json.loads(json.dumps(found))}
    gpu = torch.device("cuda")
    monkeypatch.setenv("PEFTKERN_TILES", str(file))
    monkeypatch.setattr(paths, "device_key", lambda device: key)
    monkeypatch.setattr(paths, "_own", paths._own.__wrapped__)
    for kernel, tiles in best.items():
        for rows, limit in ((16, 16), (1000, None)):
            assert paths.tile(kernel, gpu, torch.bfloat16, rows) == tiles.get(limit, tiles[None])
    assert paths.crossover(gpu, torch.bfloat16) == (12, "measured on this machine")


@pytest.mark.parametrize("kernel", tune.CANDIDATES)
def test_each_kernel_is_timed_on_what_it_gets_right(interpreted: None, kernel: str) -> None:
    problem = tune_problems.Problem(kernel, 20, SHAPES, CPU)
    tile = Tile(16, 16, 16, 1, 1, 1)
    assert problem.seconds("gemm", lambda call, rounds: 1.0, tile, 1) == len(SHAPES)


def test_a_result_that_is_off_drops_out(interpreted: None) -> None:
    problem = tune_problems.Problem("gemm", 4, SHAPES, CPU)
    tile = CHOICES["gemm"][16][0]
    assert problem.seconds("gemm", lambda call, rounds: 1.0, tile, 1) == len(SHAPES)
    call, truth = problem.calls[1]
    problem.calls[1] = call, tuple(t * 1.1 for t in truth)
    assert problem.seconds("gemm", lambda call, rounds: 1.0, tile, 1) == float("inf")


def test_a_tile_that_does_not_fit_drops_out(interpreted: None) -> None:
    problem = tune_problems.Problem("down", 4, SHAPES, CPU)
    odd = Tile(16, 16, 48, 1, 1, 1)  # tiles of other sides than powers of two are refused
    assert problem.seconds("gemm", lambda call, rounds: 1.0, odd, 1) == float("inf")


def test_time_that_is_up_ends_the_search(tmp_path: Path) -> None:
    found = tune.tune(CPU, tmp_path / "tiles.json", limit=-1.0, timer=lambda call, rounds: 1.0)
    assert found == {"crossover": {}, "tiles": {}} and not (tmp_path / "tiles.json").exists()


def test_what_time_did_not_allow_keeps_the_tile_of_the_table(
    interpreted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CANDIDATES", {"down": CHOICES["gemm"]})
    now = iter([0.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))

    def timer(call: Callable[[], tuple[Tensor, ...]], rounds: int) -> float:
        return 1.0 if paths._forced_tile == CHOICES["gemm"][16][-1] else 2.0

    found = tune.tune(CPU, tmp_path / "tiles.json", limit=5.0, shapes=SHAPES, timer=timer)
    table = tune.table_tile("down", tune.MANY["down"], CPU)
    assert found["tiles"]["down 16"] == [[16, list(CHOICES["gemm"][16][-1])], [None, list(table)]]


def test_the_file_keeps_what_was_not_searched(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    other = {"crossover": {"16": 96}, "tiles": {"gemm 32": [[None, list(A)]]}}
    file.write_text(json.dumps({"here": other, "there": other}))
    tune.keep({"crossover": {}, "tiles": {"gemm 16": [[None, list(B)]]}}, "here", file)
    stored = json.loads(file.read_text())
    assert stored["there"] == other
    assert stored["here"]["crossover"] == {"16": 96}
    assert set(stored["here"]["tiles"]) == {"gemm 16", "gemm 32"}


def test_lines_to_commit_are_entries_of_the_tables() -> None:
    table = {"gemm 16": [[16, list(A)], [None, list(B._replace(splits=2))]]}
    first, *others = tune.lines({"crossover": {"16": 96}, "tiles": table}, "sm90")
    name, entry = first.split(": ", 1)
    assert name == 'TILES["gemm 16"]'
    assert eval(f"{{{entry}}}") == {"sm90": ((16, A), (None, B._replace(splits=2)))}
    assert others == ['CROSSOVERS: "sm90": 96,', 'MEASURED: ("sm90", 16),']


def test_every_candidate_is_a_tile_that_triton_takes() -> None:
    for kernel, limits in tune.CANDIDATES.items():
        assert f"{kernel} {tune.BITS}" in paths.TILES and list(limits)[-1] is None
        for limit, tiles in limits.items():
            assert (limit or tune.MANY[kernel]) and len(set(tiles)) == len(tiles)
            for tile in tiles:
                sides = (tile.rows, tile.outputs, tile.inner, tile.warps)
                assert all(side & (side - 1) == 0 for side in sides) and min(sides[:3]) >= 16


def test_tuning_without_a_gpu_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--tune"]) == 1
    assert "--tune must have a GPU, got none" in capsys.readouterr().err
