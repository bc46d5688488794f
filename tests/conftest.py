"""What every test runs under: no silent fallback, no unnoticed read of fresh memory."""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels run in Python then
    os.environ["TRITON_INTERPRET"] = "1"
from hypothesis import HealthCheck, settings

from peftkern import _native

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    import triton_checked

    triton_checked.install()

if _native.loaded:  # without the compiled library there is nothing but the references to test
    os.environ["PEFTKERN_STRICT"] = "1"
    # Outputs and scratch start as NaN, so that nothing unwritten can pass for a result.
    torch.ops.peftkern.poison(True)

if torch.cuda.is_available():  # what cuBLAS asks for before it is deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Built for CUDA, as PyPI has it, torchvision brings no ops to a torch that is not, but describes
# these: nothing that imports it, timm and transformers among them, could be imported.
if torch.version.cuda is None and find_spec("torchvision"):
    for op in ("nms", "qnms"):
        schema = "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{op}", schema)

# Fills torch's fresh buffers with NaN too, those of at::empty included.
torch.use_deterministic_algorithms(True)

# `isa` and monkeypatch hold for all examples of a test, which is what is meant here.
settings.register_profile(
    "peftkern",
    max_examples=int(os.environ.get("PEFTKERN_EXAMPLES", 25)),  # more in `make test-full`
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("peftkern")


@pytest.fixture(scope="session")
def bnb():
    return pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft", reason="compares with peft")


@pytest.fixture(scope="session")
def timm():
    return pytest.importorskip("timm", reason="adapts models of timm")


@pytest.fixture(params=["lora", "adaptformer"])
def placement(request):
    """Of a 1-bit adapter."""
    return request.param


@pytest.fixture(scope="session", params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    return torch.device(request.param)


# What can stand in for the CPU's kernels: Triton's in its interpreter, and those in CUDA in the
# emulator, along with the launchers that call them. Both are slow, so they try few examples.
STAND_INS = {
    "triton": _native.launchers if os.environ.get("TRITON_INTERPRET") == "1" else {},
    "emulated": _native.launchers | _native.emulated if _native.emulated else {},
}
FEW = settings(max_examples=min(5, settings.default.max_examples))


def pytest_configure(config):
    config.addinivalue_line("markers", "ops(*names): whatever has these ops is a case of `isa`")


def pytest_generate_tests(metafunc):
    """`isa`: every instruction set of this machine and this build, then what else has the ops.

    A test says by `pytest.mark.ops` which ones it is about; without that it is about the CPU's.
    """
    if "isa" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("ops")
    ops = set(mark.args) if mark else set()
    # Steps that only GPUs take serve in the emulator alone; Triton has ways around them.
    called = {op for op in ops if "cpu" in _native._devices[op]}
    names = [*(_native.available_isas() or ("none",))]
    if called and STAND_INS["triton"].keys() >= called:
        names.append("triton")
    if ops & _native.emulated.keys() and STAND_INS["emulated"].keys() >= ops:
        names.append("emulated")
    metafunc.parametrize("isa", names, indirect=True)


@pytest.fixture
def isa(request, monkeypatch):
    """The CPU's kernels of one instruction set, or what stands in for them."""
    name = request.param
    if name == "none":
        yield name
    elif name in STAND_INS:
        # Where hypothesis keeps a test's settings; it has no other way for one parameter alone.
        monkeypatch.setattr(
            request.function, "_hypothesis_internal_use_settings", FEW, raising=False
        )
        with _native.Instead(STAND_INS[name]):
            yield name
    else:
        with _native.using_isa(name):
            yield name
