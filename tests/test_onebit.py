"""Is every kernel of onebit the reference, on every instruction set that this machine has?"""

import pytest
import torch

from peftkern import _native, onebit
from peftkern.onebit import codes, reference

# In float64, by hand: no element on a threshold, and one on it (w[1, 1] = 0 = mean).
WEIGHT = [[0.5, -1, 0.25, 0.75], [-0.25, 0.125, 1, -1.25]]
TIED = [[0.5, -1, 0.25, 0.75], [-0.25, 0, 1, -1.25]]


@pytest.fixture
def plain():
    with _native.Instead(_native.references):
        yield


def step(weight):
    """y, the gradients of x and of the weight: x = 1, 2, 3, 4 and the gradient of y is 1, -1."""
    x = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    y = onebit.linear(x, weight)
    return [y, *torch.autograd.grad(y, [x, weight], torch.tensor([[1.0, -1]], dtype=y.dtype))]


def same(found, *wanted, tolerance=1e-14):
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.detach().flatten(), wanted, rtol=tolerance, atol=tolerance)


def test_the_worked_example_without_a_tie(plain):
    weight = torch.tensor(WEIGHT, dtype=torch.float64)
    same(codes.statistics([weight]), 0.015625, 0.8030007894498877)
    same(reference.levels(1)[1] * codes.statistics([weight])[:, 1], 0.5416158018833112)
    packed = onebit.quantize(weight).packed
    assert onebit.unpack(packed, 1, 4).flatten().tolist() == [1, 0, 1, 1, 0, 1, 1, 0]
    assert onebit.pack(onebit.unpack(packed, 1, 4).view(1, 8), 1).item() == 0x6D
    y, grad_x, grad = step(WEIGHT)
    same(y, 3.405944811299867, 0.15625)
    same(grad_x, 1.0832316037666223, -1.0832316037666223, 0, 1.0832316037666223)
    same(
        grad,
        0.8926533037875182, 2.225030764707931, 2.948026716530789, 3.837217625380253,
        -0.9411268329202782, -2.024211858300782, -3.2180935216990236, -3.719496197486407,
    )  # fmt: skip


def test_the_worked_example_with_a_tie(plain):
    weight = torch.tensor(TIED, dtype=torch.float64)
    same(codes.statistics([weight]), 0, 0.8017837257372732)
    packed = onebit.quantize(weight).packed
    assert onebit.pack(onebit.unpack(packed, 1, 4).view(1, 8), 1).item() == 0x4D
    y, grad_x, grad = step(TIED)
    same(y, 3.2447694293029024, -2.1631796195352684)
    same(grad_x, 1.0815898097676342, 0, 0, 1.0815898097676342)
    same(
        grad,
        1.1008832276, 1.7981836567, 3.0504104337, 4.1512936613,
        -1.0504353778, -1.9999750559, -2.7981711847, -4.2521893609,
        tolerance=1e-10,
    )  # fmt: skip


@pytest.mark.parametrize("bits", reference.BITS)
def test_the_closed_form_is_what_autograd_makes_of_the_reference(bits):
    torch.manual_seed(bits)
    weight = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 11, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(reference.quantize(weight, bits), weight, grad)
    found = reference.quantize_bwd(grad, weight, reference.statistics(weight), bits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum(), grad.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [None, "x", "other"])
def test_the_fallback_of_the_adapter_is_the_reference(plain, residual):
    torch.manual_seed(1)
    shapes = [(2, 5, 6), (3, 6), (6, 3), (2, 5, 6), (2, 5, 6)]
    x, down, up, other, grad = (torch.randn(s, dtype=torch.float64) for s in shapes)
    seed = torch.tensor([3])

    def step(adapter):
        leaves = [t.clone().requires_grad_() for t in (x, down, up, other)]
        onto = {None: None, "x": leaves[0], "other": leaves[3]}[residual]
        y = adapter(*leaves[:3], 0.5, onto, "gelu", 0.25, seed, 2)
        used = leaves if residual == "other" else leaves[:3]
        return [y, *torch.autograd.grad(y, used, grad)]

    for found, wanted in zip(step(onebit.adapter), step(reference.adapter), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
