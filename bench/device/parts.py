"""What the device job does, part by part."""

from __future__ import annotations

import os
import shutil
import sys

from job import ROOT, Failed, Job, Part, PassedOver


def build(job: Job) -> str:
    if job.wheels is not None:
        job.python(
            "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
            "--target", job.state / "peers", *sorted(job.wheels.glob("*.whl")),
        )  # fmt: skip
    environment = {"PEFTKERN_CUDA": "auto"}
    if not job.dry:
        environment["PEFTKERN_CUDA"] = "on"
        # This device alone: the other architectures are compiled where nobody pays for the time.
        environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or _arch(job)
    job.python("setup.py", "--quiet", "build_ext", "--inplace", **environment)
    facts = job.python("-m", "peftkern").splitlines()
    return next(line for line in facts if line.startswith("build")).removeprefix("build").strip()


def _arch(job: Job) -> str:
    words = "import torch; print(*torch.cuda.get_device_capability(), sep='.')"
    return job.python("-c", words).split()[-1]


def tests(job: Job) -> str:
    """Those of qlora that take a device, on the GPU; without one its kernels, interpreted."""
    folder = ROOT / "tests"
    files = sorted(folder.glob("test_kernels_qlora*.py"))
    options: list[object] = ["-q", "-p", "no:cacheprovider"]
    if not job.dry:
        files += sorted(folder.glob("test_qlora*.py"))
        options += ["-k", "cuda", *(["-n", 4] if _has(job, "xdist") else [])]
    text = job.python("-m", "pytest", *options, *files, PEFTKERN_EXAMPLES="1" if job.dry else "5")
    return text.strip().splitlines()[-1].strip("= ")


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
