"""One command on a machine with a GPU and no network: builds, tests, looks for races and stray
accesses, searches tiles, measures against the peers, and writes one results file to commit.

Parts run one after the other, and one that fails stops no other. What has finished is marked in the
folder of --state, so a second call goes on where the first was stopped, within the benchmark too;
after a change of the sources it begins anew. Where $OUT is set, results and logs are copied there.

Exit status: 0, 1 (a part failed), 2 (the arguments were wrong, or there is no GPU), 3 (time was up:
call again).
"""

# Nothing but the standard library in this folder: it runs before anything is built or installed.
from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from job import ROOT, Job, run
from parts import PARTS


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench/device.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="what needs no GPU, on tiny cases")
    parser.add_argument(
        "--part", action="append", choices=tuple(PARTS), default=[],
        help="run this part alone, again; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install these wheels for this job alone"
    )
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="default: build/device, or build/device-dry"
    )
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="default: 10")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes:g}")
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels must be a folder with wheels, got {arguments.wheels}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    default = ROOT / "build" / ("device-dry" if arguments.dry_run else "device")
    state = (arguments.state or default).resolve()
    wheels = arguments.wheels and arguments.wheels.resolve()
    if not arguments.dry_run and shutil.which("nvidia-smi") is None:
        print("device.sh: a GPU must be there, got none; --dry-run needs none", file=sys.stderr)
        return 2
    job = Job(state, arguments.dry_run, 60 * arguments.minutes, wheels)
    return run(job, PARTS, arguments.part)


if __name__ == "__main__":
    sys.exit(main())
