"""A family's jobs one by one, each kept as soon as it is done: what was stopped goes on.

python -m peftkern.bench.resumed ROWS.json --device cuda [--quick]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from . import qlora_gpu, record
from .qlora_gpu import Job
from .row import Row


def run(jobs: Mapping[str, Job], path: Path) -> list[Row]:
    """Runs those jobs that the file does not know yet; returns the rows of all."""
    done = _read(path)
    for name, job in jobs.items():
        if name not in done:
            print(name, flush=True)
            done[name] = list(job())
            _write(done, path)
    return [row for name in jobs for row in done[name]]


def _read(path: Path) -> dict[str, list[Row]]:
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    return {name: [record.row(facts) for facts in rows] for name, rows in stored.items()}


def _write(done: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Whole or not at all: the time of the job may end here."""
    fresh = path.with_suffix(".new")
    stored = {name: [asdict(row) for row in rows] for name, rows in done.items()}
    fresh.write_text(json.dumps(stored))
    fresh.replace(path)


def read(path: Path) -> list[Row]:
    return [row for rows in _read(path).values() for row in rows]


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    kinds = [row.status for row in rows if not row.contender.startswith("floor:")]
    for kind in dict.fromkeys(kinds):
        yield f"{kinds.count(kind)} {kind}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("peftkern.bench.resumed", description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args(argv)
    rows = run(qlora_gpu.jobs(arguments.device, arguments.quick), arguments.path)
    ours = [row for row in rows if row.contender.startswith("peftkern") and row.status != "ok"]
    for row in ours:
        print(f"{row.group}: {row.contender} {row.status}, {row.note}")
    print(f"{len(rows)} rows: {', '.join(_summary(rows))}")
    return 1 if ours else 0


if __name__ == "__main__":
    raise SystemExit(main())
