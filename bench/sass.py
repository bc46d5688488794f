"""What a kernel is compiled to, told with no GPU: registers, shared memory, instructions.

The static gates hold it to their tables (tests/test_gates_cuda.py, tests/triton_gates.py), and the
prediction takes from it how many issue slots a weight costs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a", "sm_100": "compute_100"}
# Of the main loop, by the kernel's name, a turn and thread: 64 rows by 256 columns among 256
# threads; 128 rows by 512 columns of 1 bit, of more bits as much less.
WEIGHTS_A_TURN = {"decode": 64, "bits": 256}

DTYPES = {"f": "f32", "d": "f64", "NS_4bf16": "half", "NS_4fp16": "half"}

Code = Sequence[tuple[int, str]]  # addresses and instructions


class Kernel(NamedTuple):
    """What the compiler says, and what the disassembler shows."""

    name: str
    architecture: str
    registers: int
    shared: int
    spilled: int
    threads: int  # that a block may have, by __launch_bounds__; 0 without
    code: Code

    def count(self, start: str) -> int:
        return sum(text.startswith(start) for _, text in self.code)

    @property
    def slots(self) -> float:
        """Issue slots a weight and lane of the main loop; 0 without one."""
        kernel, _, *arguments = self.name.split()
        if kernel not in WEIGHTS_A_TURN:
            return 0.0
        bits = int(arguments[0]) if kernel == "bits" else 1
        return main_loop(self.code) * bits / WEIGHTS_A_TURN[kernel]


def listing(text: str) -> list[tuple[int, str]]:
    """The instructions that the disassembler shows, without their predicates."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.+?) *;", text)
    return [(int(address, 16), instruction) for address, instruction in found]


def main_loop(code: Code) -> int:
    """Instructions of the shortest loop that copies ahead; 0 without one."""
    places = {address: i for i, (address, _) in enumerate(code)}
    lengths = []
    for end, (_, text) in enumerate(code):
        branch = re.search(r" 0x([0-9a-f]+)", text) if text.startswith("BRA") else None
        begin = places[int(branch[1], 16)] if branch else end
        body = code[begin : end + 1]
        if begin < end and any(text.startswith("LDGSTS") for _, text in body):
            lengths.append(len(body))
    return min(lengths, default=0)


def tools() -> tuple[str | None, str | None]:
    """nvcc and cuobjdump, which Triton's wheel has too; None for what is not there."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    triton = find_spec("triton")
    wheel = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else "."
    return _find("nvcc", f"{home}/bin"), _find("cuobjdump", f"{home}/bin", str(wheel))


def _find(name: str, *folders: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def compiled(
    source: Path, nvcc: str, cuobjdump: str, folder: Path, architectures: Sequence[str] = ()
) -> Iterator[Kernel]:
    """Every kernel of a file, for these of ARCHITECTURES or for all.

    Raises:
        RuntimeError: nvcc refuses the file.
    """
    wanted = architectures or tuple(ARCHITECTURES)
    binary = folder / f"{source.stem}.fatbin"
    command = [nvcc, "-std=c++20", "-O3", "-I", str(source.parents[1]), "-Xptxas", "-v", "-fatbin"]
    command += [f"-gencode=arch={ARCHITECTURES[real]},code={real}" for real in wanted]
    run = subprocess.run([*command, "-o", binary, source], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nvcc must compile {source.name}, got: {run.stderr.strip()}")
    resources = {
        (mangled, architecture): said
        for mangled, architecture, said in re.findall(
            r"entry function '(\S+)' for '(\S+)'\n(.*?Used .*?)\n", run.stderr, re.DOTALL
        )
    }
    for architecture in wanted:
        sass, elf = (
            subprocess.run(
                [cuobjdump, what, "-arch", architecture, binary],
                capture_output=True, text=True, check=True,
            ).stdout
            for what in ("--dump-sass", "--dump-elf")
        )  # fmt: skip
        threads = {}
        for facts in elf.split("\n.nv.info.")[1:]:
            bound = re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(\w+) 0x1 0x1", facts)
            threads[facts.split("\n", 1)[0]] = int(bound[1], 16) if bound else 0
        for function in sass.split("Function : ")[1:]:
            mangled = function.split(maxsplit=1)[0]
            said = resources[mangled, architecture]
            yield Kernel(
                readable(mangled),
                architecture,
                number(r"Used (\d+) registers", said),
                number(r"(\d+) bytes smem", said),
                sum(map(int, re.findall(r"(\d+) bytes (?:spill|stack)", said))),
                threads[mangled],
                listing(function),
            )


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def readable(mangled: str) -> str:
    """The kernel's name and its template's arguments: "decode half 4 64 0 8"."""
    found = re.search(r"\d\d([a-z_]+)_kernelI(.*?)EEv", mangled)
    assert found is not None, mangled
    name, arguments = found.groups()
    (dtype,) = (new for old, new in DTYPES.items() if arguments.startswith(old))
    return " ".join([name, dtype, *re.findall(r"L[ib](\d+)E", arguments)])
