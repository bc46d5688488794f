"""Hooks of torch and accelerate, on a swapped layer and inside it: they run as they did."""

import peft
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from needs import needs_kernels
from peft_models import adapted, layer

import peftkern
from peftkern import _products

pytestmark = needs_kernels


def test_hooks_of_torch_still_fire_and_on_inner_layers_take_the_layer_back():
    model, calls = adapted("nf4"), []
    one, x = layer(model), torch.randn(3, 64)
    peftkern.optimize(model)
    handles = [
        one.register_forward_pre_hook(lambda *args: calls.append("pre")),
        one.register_forward_hook(lambda *args: calls.append("post")),
        one.register_full_backward_hook(lambda *args: calls.append("backward")),
    ]
    one(x.requires_grad_()).sum().backward()
    assert calls == ["pre", "post", "backward"]
    for handle in handles:
        handle.remove()
    for inner in (one.base_layer, one.lora_A["default"], one.lora_B["default"]):
        calls.clear()
        handle = inner.register_forward_hook(lambda *args: calls.append("inner"))
        assert f"inner {type(inner).__name__} has hooks" in peftkern.explain(one)
        one(x)
        assert calls == ["inner"]
        handle.remove()
        assert "has hooks" not in peftkern.explain(one)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def calls_ours(monkeypatch, one, x):
    seen = []
    with monkeypatch.context() as patch:
        real = _products.linear
        patch.setattr(_products, "linear", lambda *args: seen.append(1) or real(*args))
        y = one(x)
    return bool(seen), y


def test_a_hook_of_accelerate_calls_our_forward_and_comes_off_again(monkeypatch):
    model, hook, x = adapted("nf4"), Counting(), torch.randn(3, 64)
    one = layer(model)
    expected = one(x)
    add_hook_to_module(one, hook)
    peftkern.optimize(model)
    ours, y = calls_ours(monkeypatch, one, x)
    assert ours and hook.calls == 1
    torch.testing.assert_close(y, expected)
    peftkern.restore(model)
    assert not calls_ours(monkeypatch, one, x)[0] and hook.calls == 2
    assert one._old_forward.__func__ is peft.tuners.lora.bnb.Linear4bit.forward
    peftkern.optimize(model)
    remove_hook_from_module(one)  # leaves the method on the instance
    assert calls_ours(monkeypatch, one, x)[0] and hook.calls == 2
    peftkern.restore(model)
    assert one.forward.__func__ is peft.tuners.lora.bnb.Linear4bit.forward
    assert torch.equal(one(x), expected)
    peftkern.optimize(model)  # with the method that accelerate left there
    assert calls_ours(monkeypatch, one, x)[0]


def test_hooks_that_accelerate_puts_on_every_leaf_do_not_slow_anything(monkeypatch):
    """As after transformers' device_map, which is how quantised models are mostly loaded."""
    model, x = adapted("nf4"), torch.randn(3, 64)
    peftkern.optimize(model)
    one = layer(model)
    for module in one.modules():
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, AlignDevicesHook("cpu"))
    add_hook_to_module(one, AlignDevicesHook("cpu"))
    assert calls_ours(monkeypatch, one, x)[0]
    add_hook_to_module(one.base_layer, AlignDevicesHook("cpu", io_same_device=True))
    assert not calls_ours(monkeypatch, one, x)[0]
    add_hook_to_module(one.base_layer, Counting())
    assert not calls_ours(monkeypatch, one, x)[0] and one.base_layer._hf_hook.calls == 1
    remove_hook_from_module(one.base_layer)
    assert "forward" in vars(one.base_layer) and calls_ours(monkeypatch, one, x)[0]
