"""CorDA's decomposition: the worked case, its two modes and metrics, and moments without a rank."""

import pytest
import torch
from cordas import decomposed, moment

from peftkern import LoraConfig
from peftkern.qlora import init


@pytest.mark.parametrize(("mode", "column"), [("ipm", 1), ("kpm", 0)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_the_worked_case(mode, column, size):
    """W = [[2, 0, 0], [0, 1, 0]] on inputs e1, 2 e2, e3: pissa alone would take the 2 first."""
    weight = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    found = decomposed(weight, size * torch.diag(torch.tensor([1.0, 4, 1])), 1, mode=mode)
    expected = torch.zeros(2, 3)
    expected[1 - (column == 0), column] = weight[1 - (column == 0), column]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("metric", ["corda", "whitened"])
def test_all_singular_values_make_the_weight(metric, scale):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), torch.randn(100, 32)
    for mode in ("ipm", "kpm"):
        whole = decomposed(weight, moment(x), 24, scale, mode, metric)
        torch.testing.assert_close(whole, weight, rtol=1e-4, atol=1e-4)
    first = decomposed(weight, moment(x), 10, scale, "ipm", metric)
    last = decomposed(weight, moment(x), 14, scale, "kpm", metric)
    torch.testing.assert_close(first + last, weight, rtol=1e-4, atol=1e-4)


def test_white_inputs_make_it_pissa():
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    options = LoraConfig(r=4, init_lora_weights="pissa")
    for found in (torch.eye(32), 9 * torch.eye(32), torch.zeros(32, 32)):  # zeros tell nothing
        a, b = init.corda(weight, found, options)
        torch.testing.assert_close(b @ a, torch.mm(*reversed(init.factors(weight, options))))
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=0.05, atol=0)


def test_the_whitened_metric_loses_the_least_output():
    torch.manual_seed(0)
    x = torch.randn(500, 12) @ torch.diag(torch.linspace(0.1, 3, 12)) @ torch.randn(12, 12)
    weight, c = torch.randn(12, 12), moment(x)
    losses = {
        name: ((weight - approximation) @ x.t()).norm()
        for name, approximation in {
            "whitened": decomposed(weight, c, 6, metric="whitened"),
            "corda": decomposed(weight, c, 6),
            "pissa": decomposed(weight, torch.eye(12), 6),
        }.items()
    }
    assert losses["whitened"] < losses["corda"] < losses["pissa"]


@pytest.mark.parametrize("metric", ["corda", "whitened"])
def test_fewer_tokens_than_inputs_give_finite_factors(metric):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(3, 31), torch.zeros(3, 1)], 1)  # an input that never speaks, too
    config = LoraConfig(r=8, init_lora_weights="corda")
    for mode in ("ipm", "kpm"):
        for factor in init.corda(torch.randn(24, 32), moment(x), config, mode, metric):
            assert torch.isfinite(factor).all()


def test_a_moment_is_damped_until_it_can_be_inverted():
    q, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))
    moment, identity = q * torch.logspace(-3, 5, 32) @ q.t(), torch.eye(32)
    damped, inverse = init._invertible(moment, identity)
    assert torch.dist(damped @ inverse, identity) < 0.05
    assert (damped - moment).diagonal().mean() > 0.02  # more than the first 0.01
