"""What the device job does, part by part."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from job import ROOT, Failed, Job, Part, PassedOver

WORDS = 128  # in a line of instructions.cu


def build(job: Job) -> str:
    if job.wheels is not None:
        job.python(
            "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade",
            "--target", job.state / "peers", *sorted(job.wheels.glob("*.whl")),
        )  # fmt: skip
    # This device alone: the other architectures are compiled where nobody pays for the time.
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ("9.0a" if job.dry else _architecture(job))
    cuda = "auto" if job.dry else "on"
    if _has(job, "ninja") or shutil.which("ninja"):
        job.python(
            "setup.py", "--quiet", "build_ext", "--inplace", PEFTKERN_CUDA=cuda,
            TORCH_CUDA_ARCH_LIST=wanted,
        )  # fmt: skip
    else:
        _make(job, cuda, TORCH_CUDA_ARCH_LIST=wanted)
    facts = job.python("-m", "peftkern").splitlines()
    lines = dict(line.split(maxsplit=1) for line in facts if line.startswith(("build", "cuda ")))
    return f"{lines['cuda']}; {lines['build']}"


def _make(job: Job, cuda: str, **environment: str) -> None:
    """What setup.py does, with make for ninja."""
    words = "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
    torch = job.python("-c", words).split()[-1]
    cmake, folder = shutil.which("cmake") or "cmake", job.state / "make"
    job.run(
        cmake, "-S", ".", "-B", folder, "-G", "Unix Makefiles", f"-DPEFTKERN_TORCH={torch}",
        f"-DPEFTKERN_OUTPUT={ROOT / 'peftkern'}", f"-DPEFTKERN_CUDA={cuda}",
        f"-DPython_EXECUTABLE={sys.executable}", **environment,
    )  # fmt: skip
    cores = os.cpu_count() or 1
    job.run(cmake, "--build", folder, "--target", "peftkern_native", "--parallel", cores)


def selftest(job: Job) -> str:
    """Every op on every device, beside plain torch."""
    return job.python("-m", "peftkern", "--selftest").strip().splitlines()[-1]


def _architecture(job: Job) -> str:
    words = "import torch; print(*torch.cuda.get_device_capability(), sep='.')"
    found = job.python("-c", words).split()[-1]
    return found + "a" * (found == "9.0")  # as the package is built for it


def tests(job: Job) -> str:
    """Those of qlora that take a device, on the GPU; without one its kernels, interpreted."""
    files = sorted((ROOT / "tests").glob("test_kernels_qlora*.py"))
    pytest: list[object] = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    left_out: dict[str, str] = {}
    if not job.dry:
        files += sorted((ROOT / "tests").glob("test_qlora*.py"))
        left_out = without_their_peers(job, files)
        pytest += ["-k", "cuda", *(["-n", 4] if _has(job, "xdist") else [])]
    pytest += [file for file in files if file.name not in left_out]
    text = job.python(*pytest, PEFTKERN_EXAMPLES="1" if job.dry else "5")
    lacking = f"; {len(left_out)} files left out, without {', '.join({*left_out.values()})}"
    return text.strip().splitlines()[-1].strip("= ") + lacking * bool(left_out)


def without_their_peers(job: Job, files: Sequence[Path]) -> dict[str, str]:
    """Test files that import a package which is not installed here, and which one that is."""
    try:
        text = job.python("-m", "pytest", "-q", "--collect-only", *files)
    except Failed as failure:
        text = failure.text
    errors = text.split("ERROR collecting ")[1:]
    found = [re.match(r".*?(\w+\.py).*No module named '(\w+)", e, re.DOTALL) for e in errors]
    return {match[1]: match[2] for match in found if match and match[2] != "peftkern"}


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
                tool, "--tool", check, "--error-exitcode", 9, "--kernel-name", "kns=peftkern",
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
    """Does each instruction of common/ptx.h do on the device what it does in the emulator?"""
    source = ROOT / "csrc" / "emulator" / "instructions.cu"
    folder, program = source.parent, job.state / "instructions"
    emulator = [path for path in sorted(folder.glob("*.cpp")) if "test_" not in path.name]
    job.run(
        os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-DPEFTKERN_EMULATED", "-I", folder,
        "-I", folder.parent, "-xc++", source, *emulator, "-xnone", "-ldl", "-o", program,
    )  # fmt: skip
    emulated = job.run(program)
    count = WORDS * len(emulated.splitlines())
    if job.dry:
        raise PassedOver(f"needs a GPU; {count} words from the emulator")
    nvcc = shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if nvcc is None:
        raise PassedOver("there is no nvcc")
    job.run(
        nvcc, "-std=c++20", "-arch=native", "-I", folder.parent, source, "-o", f"{program}_device"
    )
    differ = differing(emulated, job.run(f"{program}_device"))
    if differ:
        raise Failed(f"not what the emulator does: {', '.join(differ)}")
    return f"{count} words are the emulator's"


def differing(emulated: str, measured: str) -> list[str]:
    """The instructions whose lines differ; a line that one side lacks differs."""
    pairs = itertools.zip_longest(emulated.splitlines(), measured.splitlines(), fillvalue="")
    names = [(one or other).rsplit(" ", WORDS)[0] for one, other in pairs if one != other]
    return list(dict.fromkeys(names))


def tiles(job: Job) -> str:
    """What it finds serves the benchmark, and nobody else on this machine."""
    if job.dry:
        raise PassedOver("needs a GPU")
    seconds = 0.8 * PARTS["tiles"].seconds  # the last step may be a long one
    text = job.python("-m", "peftkern", "bench", "--tune", seconds, **_own_tiles(job))
    names = ("TILES", "CROSSOVERS", "MEASURED")  # what else it prints is not to be committed
    lines = [line for line in text.splitlines() if line.startswith(names)]
    (job.state / "tiles.txt").write_text("\n".join(lines) + "\n")
    return f"{len(lines)} lines, in tiles.txt"


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
    "selftest": Part(selftest, 60),
    "tests": Part(tests, 240),
    "sanitizers": Part(sanitizers, 180),
    "instructions": Part(instructions, 60),
    "tiles": Part(tiles, 150),
    "benchmark": Part(benchmark, 480),
    "results": Part(results, 60),
}
