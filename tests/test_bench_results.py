"""What a run leaves behind: pytest-benchmark's JSON, tables, the README."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy import toy_rows

from peftkern import bench
from peftkern.bench import record, table
from peftkern.bench.machine import this_run


def test_results_are_what_pytest_benchmark_reads(tmp_path: Path) -> None:
    rows = toy_rows()
    path = tmp_path / "2026-01-01-toy.json"
    record.save(rows, path)
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path)],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert "twin" in compared.stdout and "toy product, forward: 48 x 32" in compared.stdout
    assert sorted(record.load(path), key=repr) == sorted(rows, key=repr)
    assert "node" not in json.loads(path.read_text())["machine_info"], "no names of machines"


def test_the_readme_gets_a_table_with_the_losses(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    rows = toy_rows()
    table.write_readme(rows, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| twin |" in text and "wrong: " in text and this_run().device in text
    table.write_readme(rows, readme)
    assert readme.read_text() == text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="must hold"):
        table.write_readme(rows, readme)


@pytest.mark.parametrize("rich", [True, False])
def test_a_table_prints_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "200")
    bench.show([replace(row, note="") for row in toy_rows()])
    printed = capsys.readouterr().out
    assert "twin" in printed and "GFLOP/s" in printed and "wrong" in printed


def test_families_are_the_modules_that_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"qlora", "model"} <= set(bench.families())
    with pytest.raises(ValueError, match="family must be one of"):
        bench.run(["nothing"])
    seen: list[str] = []
    for module in bench.families().values():
        monkeypatch.setattr(module, "rows", lambda device, quick: iter(toy_rows()))
    rows = bench.run(["qlora"], quick=True, each=lambda row: seen.append(row.contender))
    assert seen == [row.contender for row in rows]
