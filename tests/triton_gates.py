"""Compiles the Triton kernels for GPUs that need not be there, and says what came out, in JSON.

    python tests/triton_gates.py

A process of its own: what Triton's interpreter has decorated cannot be compiled. The cases of
triton_cases.py call the launchers on tensors that have no memory, and each launch is compiled with
the arguments and the tile that it would have had: what is gated is what runs.
"""

import json
import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton_cases import CASES, RARE, RARE_CASES, SAME

from peftkern.bench import sass
from peftkern.kernels import qlora_paths

ARCHITECTURES = {"sm80": 80, "sm90": 90, "sm100": 100}
NAMES = {"sm80": "SM80", "sm90": "SM90a", "sm100": "SM100a"}  # of nvdisasm
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8",
    torch.int8: "i8", torch.uint16: "u16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def typed(value, parameter):
    """An argument's type as Triton names it, and whether it counts as a multiple of 16."""
    if isinstance(value, torch.Tensor):
        # As torch's allocator gives them.
        return "*" + TYPES[value.dtype], not parameter.do_not_specialize_on_alignment
    one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
    if parameter.is_constexpr or value is None or one:
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    fits = -(2**31) <= value < 2**31
    return "i32" if fits else "i64", value % 16 == 0 and not parameter.do_not_specialize


def source(kernel, args, kwargs):
    """What a launch with these arguments compiles, its constants, and options of the compiler."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: given.pop(name) for name in kwargs if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        many = isinstance(value, tuple) and not parameter.is_constexpr
        types = []
        for j, single in enumerate(value if many else [value]):
            name, aligned = typed(single, parameter)
            place = (i, j) if many else (i,)
            types.append(name)
            if name == "constexpr":
                constants[place] = single
            if aligned:
                attributes[place] = [["tt.divisibility", 16]]
        signature[parameter.name] = tuple(types) if many else types[0]
    switches = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    return ASTSource(kernel, signature, constants, attributes), switches, options


def shown(tool, *arguments, data):
    """What one of the tools says of these bytes."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [TOOLS / tool, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def text_of(cubin):
    """The code alone, of the one kernel that there is: a section of an ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    found = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    (code,) = (
        cubin[offset : offset + length]
        for name, *_, offset, length in found
        if cubin.startswith(b".text.", found[names][4] + name)
    )
    return code


def listings(cubins, architecture):
    """The instructions of each kernel. All are disassembled at once, since each call of the tool
    takes a quarter of a second, however little it is given."""
    codes = [text_of(cubin) for cubin in cubins]
    text = shown("nvdisasm", "-b", NAMES[architecture], data=b"".join(codes))
    found = sass.listing(text)
    addresses = [address for address, _ in found]
    begin = end = 0
    for code in codes:
        begin, end = end, end + len(code)
        yield found[bisect_left(addresses, begin) : bisect_left(addresses, end)]


def facts(compiled, code):
    """Registers, bytes of stack and of shared memory, how often each instruction is there; how many
    a turn of the main loop has, or all of a kernel without one, and how many lanes share it.
    """
    usage = shown("cuobjdump", "-res-usage", data=compiled.asm["cubin"])
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    names = Counter(re.match(r"[\w.]+", text)[0] for _, text in code)
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared": compiled.metadata.shared,
        "instructions": names,
        "turn": sass.main_loop(code) or len(code) - names["NOP"],
        "lanes": 32 * compiled.metadata.num_warps,
    }


def launches(architecture, cases):
    """What each case launches on such a GPU: (case, kernel, arguments, keyword arguments)."""
    qlora_paths.architecture = lambda device: architecture
    qlora_paths.multiprocessors = lambda device: 132
    found = []
    for case, run in cases.items():

        def record(kernel, *args, grid, warmup, case=case, **kwargs):
            found.append((case, kernel, args, kwargs))

        JITFunction.run = record
        run()
    return found


def variants():
    """For each step of SAME what it compiles: kernels, and what tells their variants apart."""
    found = {case: set() for case in SAME}
    for case, kernel, args, kwargs in launches("sm90", SAME):
        src, _, options = source(kernel, args, kwargs)
        found[case].add(f"{kernel.__name__} {src.hash()} {options}")
    return {case: sorted(kernels) for case, kernels in found.items()}


def records(architecture, capability):
    """What every launch of every case comes to on such a GPU."""
    found, compiled = [], {}
    for case, kernel, args, kwargs in launches(
        architecture, CASES | (RARE_CASES if architecture == RARE else {})
    ):
        src, switches, options = source(kernel, args, kwargs)
        key = (src.hash(), str(options))
        if key not in compiled:
            target = GPUTarget("cuda", capability, 32)
            compiled[key] = triton.compile(src, target=target, options=options)
        names = {"architecture": architecture, "case": case, "kernel": kernel.__name__}
        found.append((key, names | {"switches": switches}))
    codes = listings([kernel.asm["cubin"] for kernel in compiled.values()], architecture)
    made = {
        key: facts(kernel, code)
        for (key, kernel), code in zip(compiled.items(), codes, strict=True)
    }
    return [record | made[key] for key, record in found]


def main():
    each = [record for names in ARCHITECTURES.items() for record in records(*names)]
    print(json.dumps({"records": each, "variants": variants()}))


if __name__ == "__main__":
    main()
