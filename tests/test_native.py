"""Which kernel serves which device, where several could: asked of the dispatch, without a GPU."""

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peftkern import _native, qlora
from peftkern.qlora import fallback

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def test_functions_stand_in_for_the_ops_that_they_call_too():
    calls = []

    def dequantize(weight, layout, out):
        calls.append("dequantize")
        fallback.dequantize(weight, layout, out)

    def quantize(weight, *rest):
        calls.append("quantize")
        codes = fallback.quantize(weight, *rest)
        out = torch.empty(weight.shape)
        codebook = torch.tensor(qlora.formats["nf4"].codebook)
        layout = [1, *weight.shape, 64, 4]
        torch.ops.peftkern.qlora_dequantize([*codes, codebook], layout, out)
        return codes

    functions = {"qlora_quantize": quantize, "qlora_dequantize": dequantize}
    with _native.Instead(functions):
        qlora.quantize(torch.randn(2, 64))
        assert calls == ["quantize", "dequantize"]
        assert _native.serves("qlora_quantize", "cuda")
    assert not _native.Instead.entered
    with _native.Instead(_native.references):
        assert not _native.serves("qlora_quantize", "cpu")
    assert _native.serves("qlora_quantize", "cpu") == _native.loaded


def test_a_step_within_ops_of_gpus_serves_no_cpu():
    assert not _native.serves("qlora_decode", "cpu") and not _native.serves("qlora_decode", "meta")
    assert "cpu" not in _native.kernels()["qlora_decode"]
    x, weight = torch.randn(3, 64), qlora.quantize(torch.randn(24, 64))
    operands = (torch.randn(24), torch.randn(3, 4), torch.randn(24, 4), 0.5)
    with _native.Instead(_native.references):
        y = torch.ops.peftkern.qlora_decode(x, weight.buffers, weight.layout, *operands)
    bias, down, up, scale = operands
    wanted = x @ weight.dequantize().t() + bias + scale * down @ up.t()
    torch.testing.assert_close(y, wanted)


def run(script, **variables):
    """What a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


# The kernel of a device's key is called with the CPU's tensors, in Triton's interpreter.
OF_ANOTHER_VENDOR = """
import warnings, torch
torch.version.hip = {hip!r}
import peftkern
weight = peftkern.qlora.quantize(torch.randn(2, 64))
out = torch.empty(2, 64)
op, key = torch.ops.peftkern.qlora_dequantize.default, torch._C.DispatchKey.{key}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        op._op_dk(key, weight.buffers, weight.layout, out)
assert torch.equal(out, weight.dequantize())
print(*(w.message for w in told if "peftkern" in str(w.message)), sep="\\n")
"""


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's launchers run on a GPU here")
@pytest.mark.parametrize(
    ("key", "hip", "vendor"), [("XPU", None, "Intel"), ("CUDA", "7.0", "AMD"), ("CUDA", None, None)]
)
def test_on_gpus_of_other_vendors_triton_serves_and_says_once_that_nobody_measured(
    key, hip, vendor
):
    told = run(OF_ANOTHER_VENDOR.format(key=key, hip=hip), TRITON_INTERPRET="1").splitlines()
    said = f"peftkern runs its Triton kernels on this GPU of {vendor}, where nobody has measured"
    assert [line[: len(said)] for line in told if line] == [said] * bool(vendor)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from peftkern import _native
print(any(_native.serves(op, "xpu") for op in _native.references))
"""


def test_without_triton_no_gpu_is_said_to_be_served_by_it():
    assert run(WITHOUT_TRITON).strip() == "False"


@needs_triton
@pytest.mark.parametrize("listed", [False, True])
def test_a_launcher_in_triton_runs_on_the_device_of_its_tensors(listed, monkeypatch):
    """Triton launches on the current device, and a model may be spread over several."""
    with FakeTensorMode():  # no machine need have it
        x = torch.empty(1, device="cuda:1")
    current = []

    @contextmanager
    def device(device):
        current.append(device)
        yield
        current.remove(device)

    def launcher(*args):
        return list(current)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr("peftkern.kernels.qlora.linear", launcher)
    args = [[x], None] if listed else [None, x]
    assert _native.launchers["qlora_linear"](*args) == [torch.device("cuda:1")]
    assert not current
