"""The bookkeeping of the device job: its parts, their marks and logs, and the time that is left."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "CMakeLists.txt", "setup.py", "pyproject.toml", "csrc", "kernels", "peftkern", "tests", "bench",
)  # fmt: skip
SUFFIXES = {".py", ".sh", ".h", ".cpp", ".cu", ".txt", ".toml"}
KEPT = ("results.json", "table.txt", "tiles.txt", "tiles.json")
RESERVE = 20  # seconds for the last part, which writes down what there is
STATUS = {"done": 0, "passed over": 0, "failed": 1}
TIME_IS_UP = 3


class Failed(Exception):
    """Says what failed, in one line; `text` is all that it printed."""

    def __init__(self, reason: str, text: str = "") -> None:
        super().__init__(reason)
        self.text = text


class PassedOver(Exception):
    """Says why a part cannot run here."""


class TimeIsUp(Exception):
    """The time of the whole job, not that of one part."""


@dataclass(frozen=True)
class Part:
    """`run` returns a line that says what it found. `seconds` is more than it needs, and so little
    that a part that hangs leaves something to the others.
    """

    run: Callable[[Job], str]
    seconds: int


Parts = Mapping[str, Part]


@dataclass(frozen=True)
class Mark:
    """What became of a part: "done", "passed over" or "failed"."""

    status: str
    seconds: float
    note: str


class Job:
    """One call of the command: where its state lies, and how long it may take."""

    def __init__(self, state: Path, dry: bool, seconds: float, wheels: Path | None = None) -> None:
        self.state = state
        self.dry = dry
        self.wheels = wheels
        self.end = self.part_end = time.monotonic() + seconds
        self.log = state / "job.log"
        state.mkdir(parents=True, exist_ok=True)

    def run(self, *command: object, **environment: str) -> str:
        """Runs one command of a part, into its log, and returns what it printed.

        Raises:
            Failed: with the command's last line, or because it took longer than its part may.
            TimeIsUp: the job's own time ended first.
        """
        words = [str(word) for word in command]
        paths = [str(ROOT), str(self.state / "peers"), os.environ.get("PYTHONPATH", "")]
        inherited = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self.log.open("a+") as log:
            log.write(f"$ {shlex.join(words)}\n")
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                words, stdout=log, stderr=log, cwd=ROOT, env=inherited | environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(0.0, min(self.part_end, self.end) - time.monotonic()))
            except BaseException as reason:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
                if not isinstance(reason, subprocess.TimeoutExpired):
                    raise
                if self.end <= self.part_end:
                    raise TimeIsUp from None
                raise Failed(f"{Path(words[0]).name} took longer than its part may") from None
            log.seek(begin)
            text = log.read()
        if status:
            raise Failed((text.strip() or f"exit status {status}").splitlines()[-1], text)
        return text

    def python(self, *arguments: object, **environment: str) -> str:
        return self.run(sys.executable, *arguments, **environment)

    def mark(self, name: str) -> Mark | None:
        path = self.state / f"{name}.mark"
        return Mark(**json.loads(path.read_text())) if path.exists() else None

    def forget_other_sources(self) -> None:
        """What other sources gave must not stand beside what these give."""
        path, now = self.state / "source", source()
        if path.exists() and path.read_text() != now:
            shutil.rmtree(self.state)
            self.state.mkdir()
        path.write_text(now)


def source() -> str:
    """A digest of what is built and run: there may be no repository to ask for a commit."""
    digest = hashlib.sha256()
    for top in SOURCES:
        files = [ROOT / top] if (ROOT / top).is_file() else sorted((ROOT / top).rglob("*"))
        for path in files:
            if path.is_file() and path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def run_part(job: Job, name: str, part: Part) -> None:
    """Runs it and marks what became of it; a part that the job's end cuts short has no mark."""
    start = time.monotonic()
    job.part_end = start + part.seconds
    job.log = job.state / f"{name}.log"
    for old in (job.log, job.state / f"{name}.mark"):
        old.unlink(missing_ok=True)
    print(f"{name} ...", flush=True)
    try:
        status, note = "done", part.run(job)
    except PassedOver as reason:
        status, note = "passed over", str(reason)
    except Failed as failure:
        status, note = "failed", str(failure)
    mark = Mark(status, round(time.monotonic() - start, 1), note)
    (job.state / f"{name}.mark").write_text(json.dumps(asdict(mark)))


def run(job: Job, parts: Parts, chosen: Sequence[str] = ()) -> int:
    """Runs the parts chosen, or all that have no mark; then the last one, which has time kept for
    it and writes down what there is.

    Returns:
        The exit status.
    """
    job.forget_other_sources()
    *others, last = parts
    todo = list(chosen) or [name for name in others if job.mark(name) is None]
    if not chosen and (todo or job.mark(last) is None):
        todo.append(last)
    end, stopped = job.end, False
    for name in todo:
        job.end = end if name == last else end - RESERVE
        if name != last and (stopped or time.monotonic() >= job.end):
            stopped = True
            continue
        try:
            run_part(job, name, parts[name])
        except TimeIsUp:
            stopped = True
    show(job, parts)
    keep(job)
    marks = [job.mark(name) for name in chosen or parts]
    worst = max((STATUS[mark.status] for mark in marks if mark is not None), default=0)
    return TIME_IS_UP if stopped else worst


def show(job: Job, parts: Parts) -> None:
    """The last lines: a table so short that it is whole where the end of a log is all one gets."""
    print(f"\n{'part':13} {'status':12} {'s':>6}  note")
    for name in parts:
        mark = job.mark(name) or Mark("not run", 0.0, "")
        print(f"{name:13} {mark.status:12} {mark.seconds:6.1f}  {mark.note[:100]}")


def keep(job: Job) -> None:
    """Copies to $OUT what is worth keeping, in few files: who carries them home may count them."""
    if not os.environ.get("OUT"):
        return
    out = Path(os.environ["OUT"])
    out.mkdir(parents=True, exist_ok=True)
    logs = sorted(job.state.glob("*.log"))
    (out / "log.txt").write_text("\n".join(f"== {p.stem}\n{p.read_text()}" for p in logs))
    for path in (job.state / name for name in KEPT):
        if path.exists():
            shutil.copy(path, out)
