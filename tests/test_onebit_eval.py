"""Where nothing trains, 1-bit adapters compute on their bits: are those the latents' own?"""

import pytest
import torch
from onebits import Ops, adapted, latents, pairs, x_of

from peftkern.onebit import reference


@pytest.mark.parametrize("bits", reference.BITS)
def test_eval_is_on_the_bits_and_what_training_computes(placement, bits):
    model, _ = adapted(placement, bits=bits)
    y = model(x_of())
    with torch.no_grad(), Ops() as ops:
        found = model.eval()(x_of())
    torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-6)
    assert ops.count["onebit_linear"] == 2 * len(pairs(model)) and not ops.count["onebit_adapter"]
    with torch.no_grad(), Ops() as ops:
        model(x_of())
    assert not ops.count["onebit_encode"] and not ops.count["onebit_statistics"]


def test_eval_with_a_gradient_gives_the_latents_theirs(placement):
    model, _ = adapted(placement)
    model.eval()(x_of()).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in latents(model))


def test_frozen_bits_let_a_gradient_through(placement):
    model, _ = adapted(placement)
    grads = []
    for frozen in (False, True):
        if frozen:
            model.eval().requires_grad_(False)
        x = x_of().requires_grad_()
        with Ops() as ops:
            model(x).square().sum().backward()
        assert bool(ops.count["onebit_linear"]) == frozen
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["step", "in place", "load_state_dict", "data, a call between"])
def test_bits_are_dropped_when_a_latent_changes(placement, how):
    model, _ = adapted(placement)
    state = {name: -value for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(x_of())
    if how == "step":
        model(x_of()).sum().backward()
        torch.optim.SGD(latents(model), lr=100.0).step()
    elif how == "in place":
        with torch.no_grad():
            for latent in latents(model):
                latent.neg_()
    elif how == "load_state_dict":
        model.load_state_dict(state)
    else:
        model.train()(x_of())
        for latent in latents(model):
            latent.data.neg_()
        model.eval()
    with torch.no_grad():
        found = model(x_of())
    torch.testing.assert_close(found, model(x_of()).detach(), rtol=1e-5, atol=1e-6)
