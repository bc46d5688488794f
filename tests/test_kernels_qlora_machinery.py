"""torch's machinery around qlora's Triton launchers: a compiled graph, activation checkpoints."""

import warnings

import pytest
import torch
from samples import sample
from torch.utils.checkpoint import checkpoint

from peftkern import _native, qlora

pytest.importorskip("triton", reason="needs triton")
OPS = ("qlora_linear", "qlora_linear_bwd")


@pytest.fixture
def calls(device):
    """The ops that were called; on a CPU too, launchers are what the dispatcher calls.

    A mode would not do: torch compiles nothing inside of one.
    """
    called = []

    def counted(name):
        def run(*args):
            called.append(name)
            return _native.launchers[name](*args)

        return run

    key = _native.KEYS[device.type]
    with torch.library._scoped_library(_native.NAMESPACE, "IMPL") as library:
        with warnings.catch_warnings():  # torch tells of each kernel that another one replaces
            warnings.simplefilter("ignore")
            for name in OPS:
                library.impl(name, counted(name), key, allow_override=True)
        yield called


def gradients(run, leaves):
    for leaf in leaves:
        leaf.grad = None
    y = run(*leaves)
    y.square().sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def linear(device, **fixed):
    """A linear of nested NF4 with dropout, and what trains."""
    x, weight, *parameters = sample(8, 64, 20, 2, torch.bfloat16, nested=True)
    weight = weight.to(device)
    leaves = [t.to(device).requires_grad_() for t in (x, *parameters)]

    def run(x, bias, lora_a, lora_b):
        return qlora.linear(x, weight, bias, lora_a, lora_b, 0.5, 0.25, **fixed)

    return run, leaves


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_launchers_run_in_one_compiled_graph(device, calls):
    run, leaves = linear(device, seed=13)
    wanted = gradients(run, leaves)
    calls.clear()
    found = gradients(torch.compile(run, fullgraph=True), leaves)
    assert calls == list(OPS) and same(found, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_activations_replays_the_dropout(device, calls, reentrant):
    run, leaves = linear(device)
    torch.manual_seed(7)
    wanted = gradients(run, leaves)
    calls.clear()
    torch.manual_seed(7)
    found = gradients(lambda *args: checkpoint(run, *args, use_reentrant=reentrant), leaves)
    assert calls == [OPS[0], *OPS] and same(found, wanted)
