"""Rows as a table: in the terminal, and in the README from a committed results file.

python -m peftkern.bench.table RESULTS.json...           prints
python -m peftkern.bench.table RESULTS.json... README.md puts it between the README's two marks
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from .record import load
from .row import Row

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEADINGS = (
    "contender", "p50 ms", "p20 to p80", "time / baseline", "peak MiB", "rate", "of floor",
    "graph ms", "host µs", "error", "ops", "allocations", "note",
)  # fmt: skip


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    if row.contender == row.baseline:
        return f"baseline; noise {row.noise.low:.2f} to {row.noise.high:.2f}" if row.noise else "1"
    r = row.ratio
    return f"{r.median:.3g} [{r.low:.3g}, {r.high:.3g}] {r.verdict(row.noise)}"


def cells(row: Row) -> tuple[str, ...]:
    """The row's line under `HEADINGS`."""
    inexact = " (inexact)" if row.note and row.status == "ok" else ""
    note = row.note if row.status == "ok" else f"{row.status}: {row.note}"
    p20, p50, p80 = row.milliseconds or (None, None, None)
    return (
        row.contender + inexact,
        "" if p50 is None else f"{p50:.4g}",
        "" if p20 is None else f"{p20:.4g} to {p80:.4g}",
        _ratio(row),
        "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
        "" if row.rate is None else f"{row.rate:.4g} {row.unit}",
        "" if row.share is None else f"{row.share:.0%} {row.floor}",
        f"{row.facts['graph_ms']:.4g}" if "graph_ms" in row.facts else row.facts.get("graph", ""),
        f"{row.facts['host_us']:.1f}" if "host_us" in row.facts else "",
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.dispatched is None else str(row.dispatched),
        "" if row.allocations is None else str(row.allocations),
        note,
    )


def by_case(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of one case together, the untimed ones among them."""
    rows = list(rows)
    order = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    rows.sort(key=lambda row: order[row.group])
    return [(group, list(some)) for group, some in groupby(rows, key=lambda row: row.group)]


def show(rows: Iterable[Row]) -> None:
    """Prints a table a case."""
    for group, some in by_case(rows):
        lines = [cells(row) for row in some]
        used = [i for i in range(len(HEADINGS)) if any(line[i] for line in lines)]
        headings = [HEADINGS[i] for i in used]
        print_table(group, headings, [[line[i] for i in used] for line in lines])


def print_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """With rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        print(f"\n{title}")
        for line in (headings, *lines):
            print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*headings, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:  # a file has room for whole words
        console.width = 200
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """Every contender that ran, the losses too; floors are left to the share of them."""
    if not rows:
        raise ValueError("rows must hold at least one row, got none")
    runs = dict.fromkeys(
        f"{row.family}: {row.run.device}; torch {row.run.torch}; commit {row.run.commit}; "
        f"{row.run.date}."
        for row in rows
    )
    lines = [
        *runs,
        "Medians; the ratio is paired by round, with its 95% interval, against the baseline of the "
        'case, and "same" where the interval spans 1 or reaches into the noise of the run.',
        "",
        "| case | contender | ms | time / baseline | peak MiB | of floor |",
        "|---|---|---:|---|---:|---:|",
    ]
    on_gpu = any("host_us" in row.facts for row in rows)
    if on_gpu:  # what it costs without its launches, and what they cost the host
        lines[-2:] = [f"{lines[-2]} graph ms | host µs |", f"{lines[-1]}---:|---:|"]
    for group, some in by_case(rows):
        for row in some:
            if row.contender.startswith("floor:"):
                continue
            name, p50, _, ratio, peak, _, share, graph, host, *_, note = cells(row)
            line = f"| {group} | {name} | {p50 or note} | {ratio} | {peak} | {share} |"
            lines.append(f"{line} {graph} | {host} |" if on_gpu else line)
    return "\n".join(lines) + "\n"


def write_readme(rows: Sequence[Row], readme: Path) -> None:
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} must hold {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{markdown(rows)}{END}{rest.split(END)[1]}")


def main(arguments: Sequence[str]) -> None:
    results = [Path(argument) for argument in arguments if argument.endswith(".json")]
    others = [Path(argument) for argument in arguments if not argument.endswith(".json")]
    if not results or len(others) > 1:
        sys.exit((__doc__ or "").strip())
    rows = [row for path in results for row in load(path)]
    write_readme(rows, others[0]) if others else show(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
