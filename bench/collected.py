"""One results file of what the parts of the device job have left behind.

python -m peftkern.bench.collected STATE RESULTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import record, resumed


def collect(state: Path, path: Path) -> int:
    """Writes the rows there are, and beside them what became of each part; returns their number."""
    rows_path = state / "rows.json"
    rows = resumed.read(rows_path) if rows_path.exists() else []
    facts = record.as_json(rows)
    facts["peftkern"]["parts"] = {
        mark.stem: json.loads(mark.read_text()) for mark in sorted(state.glob("*.mark"))
    }
    if (state / "source").exists():
        facts["peftkern"]["source"] = (state / "source").read_text()
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return len(rows)


def main(argv: Sequence[str]) -> None:
    state, path = map(Path, argv)
    print(f"{collect(state, path)} rows, in {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
