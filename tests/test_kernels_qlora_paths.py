"""Which path and which tile a linear takes on a GPU: tables, and what a user's machine measured."""

import json

import pytest
import torch

from peftkern.kernels import qlora_paths as paths

HOPPER = torch.device("cuda", 7)  # no machine of ours has one, nor eight of any other
FLOATS = (torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def hopper(monkeypatch, tmp_path):
    """An H200 as far as the tables can see, and a user's file of its own."""
    monkeypatch.setattr(paths, "architecture", lambda device: "sm90")
    monkeypatch.setattr(paths, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(paths, "device_key", lambda device: "sm90-132-triton3.6")
    monkeypatch.setenv("PEFTKERN_TILES", str(tmp_path / "tiles.json"))
    paths._own.cache_clear()
    yield tmp_path / "tiles.json"
    paths._own.cache_clear()


def choose(rows, dtype=torch.bfloat16, experts=1, bits=4, decodes=True):
    return paths.choose(HOPPER, dtype, rows, experts, bits, decodes)


def test_the_number_of_rows_decides():
    assert [choose(rows) for rows in (1, 16, 17, 63, 64, 9999)] == [
        "decode", "decode", "gemm", "gemm", "panels", "panels",
    ]  # fmt: skip
    assert choose(1, decodes=False) == "gemm"
    assert choose(9999, experts=8) == "gemm" and choose(1, experts=8) == "gemm"
    assert choose(1, bits=0) == "library" and choose(1, bits=0, experts=8) == "gemm"


@pytest.mark.parametrize(
    ("architecture", "rows"), [("sm80", 128), ("sm86", 256), ("sm89", 256), ("sm120", 128)]
)
def test_the_crossover_is_that_of_the_architecture(architecture, rows, monkeypatch):
    monkeypatch.setattr(paths, "architecture", lambda device: architecture)
    assert (choose(rows - 1), choose(rows)) == ("gemm", "panels")


def test_a_device_that_nobody_measured_is_told_so(monkeypatch):
    text = paths.describe(HOPPER, torch.bfloat16, 4, True)
    assert text == (
        "decode up to 16 rows, gemm below 64, then panels (a heuristic: nobody has measured sm90)"
    )
    monkeypatch.setattr(paths, "MEASURED", frozenset({("sm90", 16)}))
    assert paths.describe(HOPPER, torch.bfloat16, 4, False) == (
        "gemm below 64, then panels (measured on sm90)"
    )
    assert "nobody has measured" in paths.describe(HOPPER, torch.float32, 4, False)
    assert "dense" in paths.describe(HOPPER, torch.bfloat16, 0, True)


def test_what_this_machine_measured_goes_first(hopper):
    own = {
        "crossover": {"16": 96},
        "tiles": {"gemm 16": [[32, [32, 64, 64, 4, 4, 2]], [None, [64] * 3 + [8, 3]]]},
    }
    hopper.write_text(json.dumps({"sm90-132-triton3.6": own, "sm80-108-triton3.6": {}}))
    assert (choose(95), choose(96)) == ("gemm", "panels")
    assert "measured on this machine" in paths.describe(HOPPER, torch.float16, 4, True)
    assert paths.crossover(HOPPER, torch.float32)[0] == 64
    assert paths.tile("gemm", HOPPER, torch.bfloat16, 32) == paths.Tile(32, 64, 64, 4, 4, 2)
    assert paths.tile("gemm", HOPPER, torch.bfloat16, 33) == paths.Tile(64, 64, 64, 8, 3, None)
    table = paths.TILES["gemm 32"]["any"]
    assert paths.tile("gemm", HOPPER, torch.float32, 10**6) == table[-1][1]


def test_another_machine_s_measurements_are_passed_over(hopper):
    hopper.write_text(json.dumps({"sm80-108-triton3.6": {"crossover": {"16": 96}}}))
    assert choose(95) == "panels"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_of_another_form_is_an_error(hopper, content):
    hopper.write_text(content)
    with pytest.raises(ValueError, match=f"{hopper} must hold JSON by device, got .*: write it ag"):
        choose(95)


@pytest.mark.parametrize("name", paths.TILES)
def test_every_table_serves_any_number_of_rows(name):
    for table in paths.TILES[name].values():
        limits = [limit for limit, _ in table]
        assert limits[-1] is None and limits[:-1] == sorted(limits[:-1])
        for _, tile in table:
            sizes = (tile.rows, tile.outputs, tile.inner)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    kernel, bits = name.split()
    dtype = FLOATS[bits == "32"]
    assert paths.tile(kernel, HOPPER, dtype, 10**9) == table[-1][1]


@pytest.mark.parametrize(
    ("programs", "inner", "splits"),
    [(16, 4096, 8), (64, 4096, 4), (132, 4096, 2), (133, 4096, 1), (16, 512, 2), (16, 64, 1)],
)
def test_a_sum_is_split_where_multiprocessors_would_idle(programs, inner, splits):
    tile = paths.Tile(16, 64, 64, 4, 4)
    assert paths.splits(tile, programs, inner, HOPPER) == splits
    assert paths.splits(tile._replace(splits=3), programs, inner, HOPPER) == 3


def test_a_path_can_be_forced_and_is_set_free_again():
    tile = paths.Tile(16, 16, 16, 4, 1)
    with paths.forced("panels", tile):
        assert choose(1) == "panels" and choose(1, experts=2) == "gemm"
        assert paths.tile("gemm", HOPPER, torch.bfloat16, 1) == tile
    assert choose(1) == "decode" and paths.tile("gemm", HOPPER, torch.bfloat16, 1) != tile
    with pytest.raises(ValueError, match="path must be one of decode, gemm"), paths.forced("fast"):
        pass
