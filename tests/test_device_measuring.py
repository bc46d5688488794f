"""What is measured on a GPU, with CPU stand-ins for what only a GPU has."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from toy import honest, race, sets, toy_rows

from peftkern import _native
from peftkern.bench import (
    collected,
    drive,
    floors,
    gpu,
    harness,
    machine,
    qlora_gpu,
    record,
    resumed,
    table,
    timing,
)
from peftkern.bench.floors import Floors, Work

CPU = torch.device("cpu")
rows_of_the_toy = cache(toy_rows)


class Bench:
    """A device and a host on one clock, which nothing but calls and flushes moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call_seconds: float) -> None:
        self.now = 0.0
        self.log = ""
        self.call_seconds = call_seconds
        monkeypatch.setattr(timing, "default_timer", lambda: self.now)
        monkeypatch.setattr(gpu.time, "perf_counter", lambda: self.now)

    def call(self) -> None:
        self.log += "c"
        self.now += self.call_seconds

    def flush(self) -> None:
        self.log += "f"
        self.now += 1.0

    def clock(self) -> timing.Clock:
        clock = timing.Clock(CPU, partial(Event, self))
        clock.flush = self.flush  # type: ignore[assignment]
        return clock


class Event:
    """Stands in for torch.cuda.Event."""

    def __init__(self, bench: Bench, enable_timing: bool) -> None:
        assert enable_timing
        self.bench = bench

    def record(self) -> None:
        self.seconds = self.bench.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds)


def test_each_call_finds_the_cache_flushed_and_its_time_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch, call_seconds=timing.FLUSH_SECONDS / 2)
    assert bench.clock()([bench.call], 0, 3) == pytest.approx(bench.call_seconds)
    assert bench.log == "c" + 3 * "ffc", "once to learn what a call costs the host"


def test_a_longer_call_is_hidden_behind_more_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, call_seconds=9.5 * timing.FLUSH_SECONDS)
    bench.clock()([bench.call], 0, 1)
    assert bench.log == "c" + 11 * "f" + "c"


def test_a_flush_does_nothing_on_a_cpu() -> None:
    before = gpu.Flush(CPU)
    before()
    assert not any(isinstance(value, Tensor) for value in vars(before).values())


def test_a_cache_that_keeps_lines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "persisting_bytes", lambda device: 4096)
    with pytest.raises(RuntimeError, match="L2 cache must be 0 bytes, got 4096"):
        gpu.Flush(torch.device("cuda"))


def test_the_host_is_timed_apart_from_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, replays = Bench(monkeypatch, call_seconds=1e-3), []

    def capture(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: replays.append(1)

    facts = gpu.launch_facts(bench.call, lambda call: call() or 2e-6, capture, lambda: None)
    assert facts["host_us"] == pytest.approx(1e3) and facts["graph_ms"] == pytest.approx(2e-3)
    assert len(replays) == gpu.GRAPH_ROUNDS


def test_what_cannot_be_captured_says_why() -> None:
    def refuse(call: Callable[[], object]) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    facts = gpu.launch_facts(lambda: None, lambda call: 0.0, refuse, lambda: None)
    assert "graph_ms" not in facts
    assert facts["graph"] == "RuntimeError: operation not permitted when stream is capturing"


def test_on_a_gpu_one_copy_is_the_floor_of_all_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "COPY_BYTES", 1 << 20)
    monkeypatch.setitem(floors.GEMM_SIZE, "cuda", 64)

    def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *sizes, device, **options: make(*sizes, device="cpu", **options)

    for name in ("ones", "randn"):
        monkeypatch.setattr(torch, name, on_cpu(getattr(torch, name)))
    work = Work(read=3 << 20, written=1 << 20, flops=1 << 28, dtype=torch.bfloat16)
    found = Floors(work, 2, torch.device("cuda"))
    assert set(found.calls) == {"copy", "gemm"}
    assert found.rate("copy", (1e-3,)) == pytest.approx(2e3 * (1 << 20))
    # 4 MiB at 2 MiB a millisecond: two milliseconds of eight.
    assert found.share({"copy": (1e-3,)}, (8e-3,)) == ("copy", pytest.approx(0.25))


def test_rows_of_a_gpu_show_host_and_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(
        rows_of_the_toy()[0], facts={"host_us": 12.34, "graph_ms": 0.5, "clock": "1980 MHz"}
    )
    assert {"12.3", "0.5"} <= set(table.cells(row))
    captured = replace(row, facts={"host_us": 1.0, "graph": "RuntimeError: no"})
    assert "RuntimeError: no" in table.cells(captured)
    heading, _, *lines = table.markdown([row, captured]).splitlines()[-4:]
    assert heading.endswith("| graph ms | host µs |") and lines[0].endswith("| 0.5 | 12.3 |")
    assert all(line.count("|") == heading.count("|") for line in lines)


def test_launches_are_measured_for_those_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose device the toy's tensors do not have."""
    monkeypatch.setattr(
        gpu, "launch_facts", lambda call, timed: {"host_us": 1.0, "result": call().shape}
    )
    oracle = SimpleNamespace(sets=sets())
    entrant = harness._Entrant(
        "honest",
        harness.Contender(honest),
        oracle,
        rows_of_the_toy()[0],  # type: ignore[arg-type]
    )
    clock = timing.Clock(CPU)
    harness._add_launches(entrant, clock, {"clock": "1 MHz"})
    assert entrant.row.facts == {}
    entrant.build()
    harness._add_launches(entrant, clock, {"clock": "1 MHz"})
    assert entrant.row.facts == {"clock": "1 MHz", "host_us": 1.0, "result": (4, 48)}


def test_facts_of_the_card_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    values = [f"v{i}" for i in range(len(gpu.QUERIES))]
    tool.write_text(f"#!/bin/sh\necho \"$@\" >{tmp_path}/asked\necho '{', '.join(values)}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu.state() == dict(zip(gpu.QUERIES, values, strict=True))
    asked = (tmp_path / "asked").read_text()
    assert "--query-gpu=" in asked and " -" not in asked.replace(" --", ""), "queries, no settings"


def test_a_commit_may_be_told_where_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "get_commit_info", lambda name: {"id": "unversioned"})
    monkeypatch.setenv("PEFTKERN_COMMIT", "0123456789ab")
    assert machine.commit_info.__wrapped__()["id"] == "0123456789ab"


def test_the_cases_are_those_that_the_goals_name() -> None:
    names = list(qlora_gpu.jobs("cuda"))
    for outputs, inputs in qlora_gpu.SHAPES:
        for rows in (1, 2, 4, 8, 16):
            assert f"decode: {outputs} x {inputs}, {rows} row{'s' * (rows > 1)}" in names
    for rows in (2048, 4096, 8192):
        for dropout in (", dropout 0.1", ""):
            assert f"training: 4096 x 4096, {rows} rows, r 16{dropout}" in names
    assert names[0].endswith("1 row") and len(names) == len(set(names))
    packed = [case.packed_bytes / 1e6 for case in qlora_gpu.DECODE_LORA]
    assert packed == pytest.approx([9.4, 33.0, 132.1], abs=0.1)


def test_jobs_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    path, ran = tmp_path / "rows.json", []

    def job(name: str, fails: bool = False) -> Callable[[], Iterator[object]]:
        def run() -> Iterator[object]:
            ran.append(name)
            if fails:
                raise KeyboardInterrupt
            yield from rows_of_the_toy()

        return run

    with pytest.raises(KeyboardInterrupt):
        resumed.run({"one": job("one"), "two": job("two", fails=True)}, path)
    rows = resumed.run({"one": job("one"), "two": job("two")}, path)
    assert ran == ["one", "two", "two"] and len(rows) == 2 * len(rows_of_the_toy())
    assert resumed.read(path) == rows


def test_what_parts_left_behind_becomes_one_file(tmp_path: Path) -> None:
    resumed.run({"toy": lambda: iter(race({}))}, tmp_path / "rows.json")
    (tmp_path / "build.mark").write_text('{"status": "done", "seconds": 1.0, "note": "sm90"}')
    (tmp_path / "source").write_text("abc")
    assert collected.collect(tmp_path, tmp_path / "results.json") == 1
    facts = json.loads((tmp_path / "results.json").read_text())["peftkern"]
    assert facts["parts"]["build"]["note"] == "sm90" and facts["source"] == "abc"
    (row,) = record.load(tmp_path / "results.json")
    assert row.contender == "honest" and row.seconds
    assert "honest" in table.markdown([row])


def test_nothing_measured_is_a_results_file_too(tmp_path: Path) -> None:
    assert collected.collect(tmp_path, tmp_path / "results.json") == 0
    assert record.load(tmp_path / "results.json") == []


@pytest.fixture
def few_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "SHAPES", ((3, 16),))
    monkeypatch.setattr(drive, "WAYS", drive.WAYS[:2])
    monkeypatch.setattr(drive, "ROWS", (1, 9))


def test_every_op_that_a_cuda_kernel_serves_is_driven(few_ways: None) -> None:
    with _native.Instead(_native.references):
        assert drive.drive(CPU, ["qlora_dequantize", "qlora_decode"]) == []
        assert drive.drive(CPU, ["qlora_new"]) == ["qlora_new must have a case, got none"]


def test_a_kernel_that_is_wrong_under_the_sanitizer_is_told(few_ways: None) -> None:
    def wrong(*args: object) -> Tensor:
        return _native.references["qlora_decode"](*args) * 1.1

    with _native.Instead({**_native.references, "qlora_decode": wrong}):
        assert any(line.startswith("qlora_decode") for line in drive.drive(CPU, ["qlora_decode"]))
