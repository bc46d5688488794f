"""What the device job does, part by part."""

from __future__ import annotations

import os
import re
import shutil
import sys

from job import ROOT, Failed, Job, Part, PassedOver


def build(job: Job) -> str:
    if job.wheels is not None:
        job.python(
            "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
            "--target", job.state / "peers", *sorted(job.wheels.glob("*.whl")),
        )  # fmt: skip
    # This device alone: the other architectures are compiled where nobody pays for the time.
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ("9.0a" if job.dry else _architecture(job))
    job.python(
        "setup.py", "--quiet", "build_ext", "--inplace", TORCH_CUDA_ARCH_LIST=wanted,
        PEFTKERN_CUDA="auto" if job.dry else "on",
    )  # fmt: skip
    facts = job.python("-m", "peftkern").splitlines()
    lines = dict(line.split(maxsplit=1) for line in facts if line.startswith(("build", "cuda ")))
    return f"{lines['cuda']}; {lines['build']}"


def _architecture(job: Job) -> str:
    words = "import torch; print(*torch.cuda.get_device_capability(), sep='.')"
    found = job.python("-c", words).split()[-1]
    return found + "a" * (found == "9.0")  # as the package is built for it


def tests(job: Job) -> str:
    """Those of qlora that take a device, on the GPU; without one its kernels, interpreted."""
    folder = ROOT / "tests"
    pytest: list[object] = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += sorted(folder.glob("test_kernels_qlora*.py"))
    left_out: dict[str, str] = {}
    if not job.dry:
        pytest += ["-k", "cuda", *sorted(folder.glob("test_qlora*.py"))]
        left_out = _without_their_peers(job, pytest)
        pytest += [f"--ignore={file}" for file in left_out]
        pytest += ["-n", 4] if _has(job, "xdist") else []
    text = job.python(*pytest, PEFTKERN_EXAMPLES="1" if job.dry else "5")
    lacking = f"; {len(left_out)} files left out, without {', '.join({*left_out.values()})}"
    return text.strip().splitlines()[-1].strip("= ") + lacking * bool(left_out)


def _without_their_peers(job: Job, pytest: list[object]) -> dict[str, str]:
    """Test files that import a package which is not installed here, and which one that is."""
    try:
        text = job.python(*pytest, "--collect-only")
    except Failed as failure:
        text = failure.text
    found = re.findall(
        r"ERROR collecting (\S+) (?:(?!ERROR collecting).)*?No module named '(\w+)", text, re.DOTALL
    )
    return {file: module for file, module in found if module != "peftkern"}


def _has(job: Job, module: str) -> bool:
    try:
        job.python("-c", f"import {module}")
    except Failed:
        return False
    return True


def sanitizers(job: Job) -> str:
    """compute-sanitizer under every CUDA kernel. Each tensor gets an allocation of its own: in
    torch's pool a stray access meets a neighbour, and nothing is said.
    """
    if job.dry:
        raise PassedOver("needs a GPU")
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        raise PassedOver("there is no compute-sanitizer")
    found = []
    for check in ("memcheck", "racecheck", "synccheck"):
        try:
            text = job.run(
                tool, "--tool", check, "--error-exitcode", 9, "--kernel-regex", "kns=peftkern",
                sys.executable, "-m", "peftkern.bench.drive", PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip
        except Failed as failure:
            if "Device not supported" in job.log.read_text():
                raise PassedOver("compute-sanitizer: Device not supported") from None
            raise Failed(f"{check}: {failure}") from None
        summary = [line for line in text.splitlines() if "SUMMARY:" in line]
        found.append(f"{check} {summary[-1].split('SUMMARY:')[1].strip() if summary else 'passed'}")
    return ", ".join(found)


def instructions(job: Job) -> str:
    raise PassedOver("there are no tests of single instructions yet")


def tiles(job: Job) -> str:
    """What it finds serves the benchmark, and nobody else on this machine."""
    if job.dry:
        raise PassedOver("needs a GPU")
    seconds = 0.8 * PARTS["tiles"].seconds  # the last step may be a long one
    text = job.python("-m", "peftkern", "bench", "--tune", seconds, **_own_tiles(job))
    (job.state / "tiles.txt").write_text(text)
    return f"{len(text.splitlines())} lines, in tiles.txt"


def _own_tiles(job: Job) -> dict[str, str]:
    return {"PEFTKERN_TILES": str(job.state / "tiles.json")}


def benchmark(job: Job) -> str:
    where = ("--device", "cpu", "--quick") if job.dry else ("--device", "cuda")
    text = job.python(
        "-m", "peftkern.bench.resumed", job.state / "rows.json", *where, **_own_tiles(job)
    )
    return text.strip().splitlines()[-1]


def results(job: Job) -> str:
    file = job.state / "results.json"
    text = job.python("-m", "peftkern.bench.collected", job.state, file)
    table = job.python("-W", "ignore", "-m", "peftkern.bench.table", file)
    (job.state / "table.txt").write_text(table)
    return text.strip().splitlines()[-1]


PARTS = {
    "build": Part(build, 300),
    "tests": Part(tests, 180),
    "sanitizers": Part(sanitizers, 120),
    "instructions": Part(instructions, 60),
    "tiles": Part(tiles, 120),
    "benchmark": Part(benchmark, 480),
    "results": Part(results, 60),
}
