"""Runs the families and keeps what they measured, as pytest-benchmark's JSON.

`pytest-benchmark compare FILE …` reads it. What that format has no place for (ratios, floors, the
rows with no times) stands in each benchmark's `extra_info` and under `peftkern` at the top.
"""

from __future__ import annotations

import datetime
import json
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from pytest_benchmark import __version__ as format_version
from pytest_benchmark.stats import Metadata

from .machine import commit_info, device_name, machine_info, slug
from .row import Row, Run
from .statistics import Ratio

RESULTS = Path(__file__).resolve().parent / "results"


def families() -> dict[str, ModuleType]:
    """The modules here that define `rows(device, quick)`, by name."""
    package = __package__ or "bench"
    names = sorted(m.name for m in pkgutil.iter_modules(import_module(package).__path__))
    modules = {name: import_module(f"{package}.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "rows")}


def run(
    families: Sequence[str] = (),
    quick: bool = False,
    out: Path | None = None,
    device: str = "cpu",
    each: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measures the families named, or all, and returns their rows.

    Args:
        quick: fewer rounds and fewer copies of the inputs, to see that all works; no figures.
        out: a file, or a folder that gets `<date>-<device>.json`. None writes nothing.
        each: called with every row as soon as it is there.

    Raises:
        ValueError: a family that is not there.
    """
    known = globals()["families"]()
    for name in families:
        if name not in known:
            raise ValueError(f"family must be one of {', '.join(known)}, got {name}")
    rows: list[Row] = []
    for name in families or known:
        for found in known[name].rows(device, quick):
            rows.append(found)
            if each is not None:
                each(found)
    if out is not None:
        save(rows, result_path(out, device) if out.is_dir() else out)
    return rows


def result_path(folder: Path = RESULTS, device: str = "cpu") -> Path:
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return folder / f"{date}-{slug(device_name(device))}.json"


def _benchmark(row: Row) -> dict[str, Any]:
    """A row in pytest-benchmark's words."""
    facts = asdict(row)
    del facts["seconds"]  # they are the statistics' data
    benchmark = SimpleNamespace(
        name=row.contender,
        fullname=f"{row.group} {row.contender}",
        group=row.group,
        param=None,
        params=None,
        extra_info=facts,
        cprofile_stats=None,
        has_error=False,
    )
    metadata = Metadata(benchmark, iterations=row.iterations, options={"interleaved": True})
    for seconds in row.seconds:
        metadata.stats.update(seconds)
    result: dict[str, Any] = metadata.as_dict(include_data=True)
    return result


def as_json(rows: Iterable[Row]) -> dict[str, Any]:
    rows = list(rows)
    return {
        "machine_info": machine_info(),
        "commit_info": commit_info(),
        "benchmarks": [_benchmark(row) for row in rows if row.seconds],
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "version": format_version,
        "peftkern": {"untimed": [asdict(row) for row in rows if not row.seconds]},
    }


def save(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(rows), indent=1) + "\n")


def row(facts: dict[str, Any], seconds: Iterable[float] = ()) -> Row:
    """What `asdict` made of a row; `seconds` where they were kept elsewhere."""
    kinds = {"run": Run, "ratio": Ratio, "noise": Ratio}
    made = {key: kind(**facts[key]) for key, kind in kinds.items() if facts[key] is not None}
    return Row(**{**facts, **made, "seconds": tuple(seconds or facts.get("seconds", ()))})


def load(path: Path) -> list[Row]:
    """The rows of a results file: those with times in the order of the run, then the others.

    Raises:
        ValueError: a file of another kind, such as a prediction.
    """
    data = json.loads(path.read_text())
    if "kind" in data:
        raise ValueError(f"{path} must hold measured rows, got a {data['kind']}")
    timed = [row(b["extra_info"], b["stats"]["data"]) for b in data["benchmarks"]]
    return timed + [row(facts) for facts in data["peftkern"]["untimed"]]
