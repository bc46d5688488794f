"""The self-check that users paste into a report: does it ask every kernel, and can it fail?"""

import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from needs import needs_kernels
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import _native, _verdict, qlora, selftest
from peftkern.cli import main

PACKAGE = Path(peftkern.__file__).parent
CPU = torch.device("cpu")
CASES = [case for family in selftest.FAMILIES for case in family(CPU)]
# Not those that the benchmarks measure the machine with, should they have been imported.
OPS = sorted(op for op in _native.references if not op.startswith("bench_"))
OPS_HERE = [op for op in OPS if "cpu" in _native.kernels()[op]]
CASES_HERE = [case for case in CASES if set(case.ops) <= set(OPS_HERE)]


def table(text):
    """Of every line: device, instruction set, case, what served it, pass or FAIL, and the words."""
    return [re.split(r" {2,}", line) for line in text.split("\n\n")[0].splitlines()]


def failed(text):
    return {cells[2] for cells in table(text) if cells[4] == "FAIL"}


@contextmanager
def planted(op, kernel):
    """In the place of the CPU's kernel, for all that call the op through torch."""
    library = torch.library.Library(_native.NAMESPACE, "IMPL")
    with warnings.catch_warnings():  # torch tells of the override
        warnings.simplefilter("ignore")
        library.impl(op, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def wrong(op):
    """As its reference, but the first output is off."""

    def kernel(*args):
        found = _native.references[op](*args)
        if op == "qlora_dequantize":  # writes into its last argument
            args[-1].mul_(2)
        elif op == "qlora_quantize":
            found[0].bitwise_xor_(1)
        elif found is None:  # writes into its first argument
            (args[0][0] if isinstance(args[0], list) else args[0]).mul_(2)
        else:
            found[0].mul_(2)
        return found

    return kernel


@pytest.fixture
def natively(monkeypatch):
    """Without interpreter and emulator, which take their time and are asked for once below."""
    monkeypatch.setattr(selftest, "STAND_INS", {})


def test_it_passes_on_every_instruction_set_and_says_what_served(natively, capsys):
    assert main(["--selftest"]) == 0
    text = capsys.readouterr().out
    found = table(text)
    served = "C++" if _native.loaded else "plain torch"
    for isa in _native.available_isas() or ["none"]:
        of_isa = [cells for cells in found if cells[:2] == ["cpu", isa]]
        assert [cells[2] for cells in of_isa] == [case.name for case in CASES_HERE]
        assert {cells[3] for cells in of_isa} == {served}
        assert {cells[4] for cells in of_isa} == {"pass"}
    assert f"peftkern {peftkern.info().version}\n" in text
    assert text.endswith(f"self-check passed: {len(found)} cases\n")


def test_every_op_and_every_format_is_asked():
    """So a new op without a case, and a new format that no case takes, are found here."""
    assert {op for case in CASES for op in case.ops} == set(OPS)
    asked = {word for case in CASES for word in case.name.split()}
    assert set(qlora.formats) <= asked


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's launchers run on a GPU here"
)
def test_launchers_in_triton_are_asked_too(capsys):
    pytest.importorskip("triton")
    check_stand_in("Triton, interpreted", _native.launchers, capsys)


@pytest.mark.skipif(not _native.emulated, reason="CUDA's kernels are not built for the emulator")
def test_emulated_kernels_are_asked_too(capsys):
    decodes = {"qlora_decode", "onebit_decode"}
    ours = {"qlora_quantize", "qlora_dequantize", *decodes, "sparse_sample_"}
    assert _native.emulated.keys() >= ours
    check_stand_in("CUDA, emulated", _native.emulated, capsys)


def check_stand_in(name, functions, capsys):
    main(["--selftest"])
    found = [cells for cells in table(capsys.readouterr().out) if cells[3] == name]
    asked = [case.name for case in CASES if functions.keys() >= set(case.ops)]
    assert asked and [cells[2] for cells in found] == asked
    assert {cells[4] for cells in found} == {"pass"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_calls_the_ops_that_it_names(case):
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == _native.NAMESPACE:
                names.add(func._opname)
            return func(*args, **(kwargs or {}))

    names = set()
    here = case in CASES_HERE
    with nullcontext() if here else _native.Instead(_native.references), Calls():
        assert all(verdict.passed for verdict in case.verdicts())
    assert names >= set(case.ops)


@needs_kernels
@pytest.mark.parametrize("op", OPS_HERE)
def test_a_wrong_kernel_fails_and_spoils_no_line_but_its_own(natively, op, capsys):
    with planted(op, wrong(op)):
        assert main(["--selftest"]) == 1
    text = capsys.readouterr().out
    assert failed(text) == {case.name for case in CASES if op in case.ops}
    count = sum("FAIL" in cells for cells in table(text))
    assert text.endswith(f"self-check FAILED: {count} of {len(table(text))} cases\n")


@needs_kernels
def test_a_kernel_that_raises_fails_with_its_message(natively, capsys):
    def kernel(*args):
        raise RuntimeError("no such luck\nand more")

    with planted("qlora_quantize", kernel):
        assert main(["--selftest"]) == 1
    text = capsys.readouterr().out
    assert failed(text) == {f"qlora.quantize {name}" for name in qlora.formats}
    assert "FAIL  RuntimeError: no such luck," in text and "and more" not in text


@needs_kernels
def test_a_kernel_that_leaves_nan_fails(natively, capsys):
    def kernel(*args):
        return [g.fill_(math.nan) for g in _native.references["qlora_linear_bwd"](*args)]

    with planted("qlora_linear_bwd", kernel):
        assert main(["--selftest"]) == 1
    assert "FAIL  error nan, allowed" in capsys.readouterr().out


def test_a_case_that_compares_nothing_fails(monkeypatch, capsys):
    empty = _verdict.Case("nothing", ("qlora_linear",), lambda: iter(()))
    monkeypatch.setattr(selftest, "FAMILIES", (lambda device: iter([empty]),))
    assert main(["--selftest"]) == 1
    assert failed(capsys.readouterr().out) == {"nothing"}


def run(*arguments, path=PACKAGE.parent):
    """In a fresh interpreter, as a user starts it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PEFTKERN", "TRITON"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=clean | {"PYTHONPATH": str(path)}, cwd=path, capture_output=True, text=True,
    )  # fmt: skip


DIES = """
import os, torch, peftkern.cli
library = torch.library.Library("peftkern", "IMPL")
library.impl("qlora_dequantize", lambda *args: os._exit(9), "CPU", allow_override=True)
peftkern.cli.main(["--selftest"])
"""


@needs_kernels
def test_where_the_process_dies_its_last_words_say_where():
    result = run("-c", DIES)
    assert result.returncode == 9
    last = result.stdout.splitlines()[-1].split()
    assert last[:4] == ["cpu", _native.available_isas()[0], "qlora.dequantize", "nf4"]


ALONE = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1:])  # as if none of them were installed
import peftkern.cli
sys.exit(peftkern.cli.main(["--selftest"]))
"""


def test_it_needs_torch_and_safetensors_alone():
    others = ["numpy", "transformers", "peft", "bitsandbytes", "triton", "pytest", "matplotlib"]
    result = run("-c", ALONE, *others)
    assert result.returncode == 0, result.stderr + result.stdout


def test_without_the_compiled_library_plain_torch_serves_and_is_named(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "peftkern", ignore=shutil.ignore_patterns("*.so"))
    result = run("-m", "peftkern", "--selftest", path=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    of_cpu = [cells for cells in table(result.stdout) if cells[0] == "cpu"]
    assert {(cells[1], cells[3]) for cells in of_cpu} == {("none", "plain torch")}
    assert "every op runs its reference" in result.stdout


def test_it_stands_without_a_command(capsys):
    assert main(["--selftest", "demo"]) == 2
    assert "--selftest must stand without a command" in capsys.readouterr().err
