"""What every test runs under: no silent fallback, no unnoticed read of fresh memory."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels run in Python then
    os.environ["TRITON_INTERPRET"] = "1"
from hypothesis import HealthCheck, settings

from peftkern import _native

if _native.loaded:  # without the compiled library there is nothing but the references to test
    os.environ["PEFTKERN_STRICT"] = "1"
    # Outputs and scratch start as NaN, so that nothing unwritten can pass for a result.
    torch.ops.peftkern.poison(True)

if torch.cuda.is_available():  # what cuBLAS asks for before it is deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


@pytest.fixture(scope="session", params=["cpu", *["cuda"] * torch.cuda.is_available()])
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=_native.available_isas() or ("none",))
def isa(request):
    """Every instruction set that this machine and this build have."""
    if request.param == "none":
        yield request.param
    else:
        with _native.using_isa(request.param):
            yield request.param
