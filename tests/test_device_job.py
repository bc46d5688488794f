"""The device job's bookkeeping, with parts that do nothing; and its dry run, where it is short."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import job as device_job
import parts as device_parts
import pytest
from job import Failed, Job, Part, PassedOver

ROOT = Path(__file__).parent.parent
SLEEPS = ("-c", "import time; time.sleep(60)")


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    """A test may run while somebody edits the sources."""
    monkeypatch.setattr(device_job, "source", lambda: "the same")
    monkeypatch.delenv("OUT", raising=False)


def recording(log, **failures):
    """Three parts and the last one, which say that they ran."""

    def part(name):
        def run(job):
            log.append(name)
            if name in failures:
                raise failures[name]
            return f"{name} is there"

        return Part(run, seconds=60)

    return {name: part(name) for name in ("first", "second", "third", "last")}


def outcomes(job, parts):
    return {name: (job.mark(name) or device_job.Mark("not run", 0, "")).status for name in parts}


def test_a_part_that_fails_stops_no_other(tmp_path, capsys):
    log = []
    parts = recording(log, first=Failed("no compiler"), second=PassedOver("no GPU"))
    job = Job(tmp_path, dry=True, seconds=60)
    assert device_job.run(job, parts) == 1
    assert log == ["first", "second", "third", "last"]
    assert list(outcomes(job, parts).values()) == ["failed", "passed over", "done", "done"]
    table = capsys.readouterr().out.splitlines()[-4:]
    assert "no compiler" in table[0] and "no GPU" in table[1] and "last is there" in table[3]


def test_a_part_passed_over_is_no_failure(tmp_path):
    assert device_job.run(Job(tmp_path, True, 60), recording([], second=PassedOver("none"))) == 0


def test_a_second_call_goes_on(tmp_path):
    log = []
    parts = recording(log)
    assert device_job.run(Job(tmp_path, True, device_job.RESERVE - 5), parts) == 3
    assert log == ["last"], "no time for more than writing down what there is"
    log.clear()
    assert device_job.run(Job(tmp_path, True, 60), parts) == 0
    assert log == ["first", "second", "third", "last"]
    log.clear()
    assert device_job.run(Job(tmp_path, True, 60), parts) == 0
    assert log == []


def test_a_part_that_is_named_runs_again_and_alone(tmp_path):
    log = []
    parts = recording(log)
    device_job.run(Job(tmp_path, True, 60), parts)
    log.clear()
    assert device_job.run(Job(tmp_path, True, 60), parts, ["second"]) == 0
    assert log == ["second"]


def test_what_the_end_cuts_short_goes_on_in_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr(device_job, "RESERVE", 0)
    started = []

    def slow(job):
        started.append(job.python("-c", "print('here')"))
        return job.python(*SLEEPS)

    parts = recording([]) | {"second": Part(slow, seconds=60)}
    job = Job(tmp_path, True, seconds=1.5)
    assert device_job.run(job, parts) == 3
    assert started == ["here\n"]
    assert outcomes(job, parts) == {
        "first": "done", "second": "not run", "third": "not run", "last": "done",
    }  # fmt: skip


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    marker = tmp_path / "alive"
    script = f"""
import subprocess, sys, time
child = "import pathlib, time; time.sleep(2); pathlib.Path({str(marker)!r}).touch()"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""
    parts = recording([]) | {"first": Part(lambda job: job.python("-c", script), seconds=1)}
    job = Job(tmp_path / "state", True, 60)
    start = time.monotonic()
    assert device_job.run(job, parts) == 1
    assert "took longer" in job.mark("first").note and time.monotonic() - start < 30
    time.sleep(2.5)
    assert not marker.exists()


def test_a_command_that_fails_says_its_last_line(tmp_path):
    job = Job(tmp_path, True, 60)
    with pytest.raises(Failed, match="^ValueError: no such tile$"):
        job.python("-c", "raise ValueError('no such tile')")
    assert "Traceback" in job.log.read_text()


def test_other_sources_begin_anew(tmp_path, monkeypatch):
    log = []
    parts = recording(log)
    device_job.run(Job(tmp_path, True, 60), parts)
    monkeypatch.setattr(device_job, "source", lambda: "other")
    log.clear()
    device_job.run(Job(tmp_path, True, 60), parts)
    assert log == ["first", "second", "third", "last"]


def test_the_digest_is_of_what_is_built_and_run(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(device_job, "ROOT", tmp_path)
    for path in ("csrc/a.cu", "kernels/b.py", "bench/results/c.json"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("one")
    first = device_job.source()
    (tmp_path / "bench/results/c.json").write_text("two")
    assert device_job.source() == first
    (tmp_path / "csrc/a.cu").write_text("two")
    assert device_job.source() != first


def test_what_is_kept_is_copied_in_few_files(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    parts = recording([]) | {"last": Part(lambda job: job.python("-c", "print('rows')"), 60)}
    job = Job(tmp_path / "state", True, 60)
    (job.state / "results.json").write_text("{}")
    device_job.run(job, parts)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["log.txt", "results.json"]
    assert "rows" in (tmp_path / "out" / "log.txt").read_text()


def run_command(*arguments, command=("bench/device.sh",), **environment):
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--part", "nothing"], "invalid choice: 'nothing'"),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--wheels", "/nowhere"], "--wheels must be a folder with wheels, got /nowhere"),
        (["--part", "results"], "a GPU must be there, got none"),
    ],
)
def test_the_command_refuses(arguments, words):
    answer = run_command(*arguments, command=(sys.executable, "bench/device"), PATH="/nowhere")
    assert answer.returncode == 2 and words in answer.stderr


def test_the_help_names_every_part():
    answer = run_command("--help")
    assert answer.returncode == 0 and all(name in answer.stdout for name in device_parts.PARTS)


def test_files_that_lack_a_peer_are_left_out_and_others_are_not(tmp_path):
    bodies = {
        "test_peer.py": "from no_such_peer.nn import Layer\n",
        "test_helped.py": "import helper\n",
        "helper.py": "import no_such_peer\n",
        "test_broken.py": "import peftkern.no_such_part\n",
        "test_fine.py": "def test_it():\n    pass\n",
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(body)
    job = Job(tmp_path / "state", False, 60)
    found = device_parts.without_their_peers(job, sorted(tmp_path.glob("test_*.py")))
    assert found == {"test_peer.py": "no_such_peer", "test_helped.py": "no_such_peer"}


DRY = ("sanitizers", "instructions", "tiles", "results")  # those that take little time


def test_an_instruction_that_differs_is_named():
    words = " ".join(f"{i:08x}" for i in range(device_parts.WORDS))
    other = words[:-1] + "f1"
    one = f"cp.async {words}\nlop3, ld.global {words}\ncp.async {words}\n"
    assert device_parts.differing(one, one) == []
    assert device_parts.differing(one, one.replace(f"global {words}", f"global {other}")) == [
        "lop3, ld.global"
    ]
    assert device_parts.differing(one, "") == ["cp.async", "lop3, ld.global"]


def test_a_dry_run_passes_over_what_needs_a_gpu(tmp_path):
    chosen = [word for name in DRY for word in ("--part", name)]
    answer = run_command("--dry-run", "--state", str(tmp_path), *chosen)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.count("needs a GPU") == 3
    assert "needs a GPU; 25600 words from the emulator" in answer.stdout
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["peftkern"]["parts"]["tiles"]["status"] == "passed over"
    assert len(facts["peftkern"]["source"]) == 64
