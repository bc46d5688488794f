"""Training for the merge: the forward sees the very weight that merging stores, and it survives."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merges import aware, dense, requantized
from models import adapted, disturb, reasons, tokens, toy
from torch import nn

import peftkern
from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import merging

CONFIG = LoraConfig(r=4, base="nf4", merge_aware=True)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    inputs=st.integers(0, 40),
    block_size=st.sampled_from([16, 64, 256]),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    panel=st.sampled_from([merging.PANEL, 200]),
)
def test_the_forward_is_that_of_the_merged_layer(
    isa, monkeypatch, rows, columns, inputs, block_size, nested, dtype, panel
):
    monkeypatch.setattr(merging, "PANEL", panel)
    layer = aware(rows, columns, block_size=block_size, nested=nested)
    x = torch.randn(inputs, columns).to(dtype)
    y = layer(x)
    old = layer.quantized_weight.dequantize()
    with warnings.catch_warnings(action="error"):  # nothing is lost, so nothing is said
        layer.eval().merge()
    assert layer.original.loss is None and layer.quantized_weight.nested == nested
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.quantized_weight.dequantize(), old) and torch.equal(layer(x), y)


def test_some_codes_have_moved_in_these_tests():
    layer = aware()
    assert 0.1 < (requantized(layer).packed != layer.weight).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float_weight_holds_what_the_forward_sees(dtype):
    layer = aware()
    wanted = requantized(layer).dequantize(dtype)
    layer.merge(dtype=dtype)
    assert torch.equal(layer.weight, wanted)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_gradients_go_straight_through_the_rounding(isa, rows, columns, shape, bias):
    layer = aware(rows, columns)
    layer.bias.requires_grad_(bias)
    x = torch.randn(*shape, columns, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*shape, rows, dtype=torch.float64)
    layer(x).backward(g)
    flat, g = x.detach().view(-1, columns), g.view(-1, rows)
    a, b, c = layer.lora_A.detach().double(), layer.lora_B.detach().double(), layer.scaling
    wanted = {
        x: g @ requantized(layer).dequantize(torch.float64),
        layer.lora_A: c * (g @ b).t() @ flat,
        layer.lora_B: c * g.t() @ (flat @ a.t()),
        layer.bias: g.sum(0) if bias else None,
    }
    for leaf, gradient in wanted.items():
        if gradient is None:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, gradient.view(leaf.shape).to(leaf.dtype))


def test_only_what_is_asked_for_is_computed():
    layer, x = aware(), torch.randn(3, 64)
    leaves = [x, layer.bias, layer.lora_A, layer.lora_B]
    for wanted in torch.cartesian_prod(*[torch.tensor([False, True])] * 4).tolist():
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
            leaf.grad = None
        y = layer(x)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == wanted


def test_a_second_derivative_is_refused():
    layer = aware()
    y = layer(torch.randn(3, 64)).square().sum()
    (grad,) = torch.autograd.grad(y, layer.lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# In a model.


def test_a_float_base_or_dropout_is_refused():
    with pytest.raises(ValueError, match="^lora_dropout must be 0 with merge_aware"):
        LoraConfig(merge_aware=True, lora_dropout=0.1)
    with pytest.raises(ValueError, match="^merge_aware must have a quantised base, got torch.fl"):
        QLoRALinear.from_linear(nn.Linear(64, 24), merge_aware=True)


def test_what_cannot_train_for_its_merge_is_left_out_and_reported():
    config = LoraConfig(merge_aware=True, base="nf4", target_modules=["lm_head", "q_proj"])
    model = peftkern.adapt(toy(tied=True), config)
    assert "merge_aware" in reasons(model)["lm_head"] and model.layers[0].q_proj.merge_aware
    with pytest.raises(ValueError, match="its base is not quantised, which merge_aware needs"):
        peftkern.adapt(toy(), LoraConfig(merge_aware=True))


def test_a_merge_aware_model_merges_as_it_is_and_comes_back():
    model = adapted(CONFIG)
    y = model(tokens())
    assert {row.mergeable for row in peftkern.report(model).rows} == {"exact"}
    assert {row.vllm[:2] for row in peftkern.report(model).rows} == {"no"}
    assert torch.equal(peftkern.merge(model)(tokens()), y)
    assert {row.mergeable for row in peftkern.report(model).rows} == {"merged"}
    assert torch.equal(peftkern.unmerge(model)(tokens()), y)


def test_its_file_needs_a_merge_aware_model_again(tmp_path):
    model = adapted(CONFIG)
    peftkern.save_adapter(model, tmp_path)
    again = peftkern.load_adapter(peftkern.adapt(toy(), CONFIG), tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))
    plain = peftkern.adapt(toy(), LoraConfig(r=4, base="nf4"))
    assert not torch.allclose(peftkern.load_adapter(plain, tmp_path)(tokens()), model(tokens()))


def test_loading_reaches_the_weight_of_the_forward(tmp_path):
    model = adapted(CONFIG)
    y = model(tokens())
    other = disturb(peftkern.adapt(toy(), CONFIG), seed=5)
    other(tokens())
    peftkern.save_adapter(model, tmp_path)
    assert torch.equal(peftkern.load_adapter(other, tmp_path)(tokens()), y)


# What it is for.


def trained(merge_aware, directions=4):
    """The loss before training, after it, and after the merge into 4 bits.

    The wanted change of W is 5 % of its size. Where the inputs lie in 4 of 256 directions, 4 bits
    have room for what matters, and rounding after training does not find it.
    """
    torch.manual_seed(2)
    linear = nn.Linear(256, 64, bias=False)
    layer = QLoRALinear.from_linear(
        linear, r=16, lora_alpha=16, base="nf4", merge_aware=merge_aware
    )
    weight = dense(layer)
    change = torch.randn(64, 4) @ torch.randn(4, 256)
    change *= 0.05 * weight.norm() / change.norm()
    x = torch.randn(4 * directions, directions) @ torch.randn(directions, 256) / directions**0.5
    target = x @ (weight + change).t()

    def loss():
        return (layer(x) - target).square().mean()

    losses = [loss().item()]
    optimizer = torch.optim.Adam(peftkern.trainable_parameters(layer), lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    losses.append(loss().item())
    layer.eval().merge(requantize=True)
    return *losses, loss().item()


@pytest.mark.filterwarnings("ignore:requantize=True")
def test_a_4_bit_merge_erases_a_plain_adapter_and_keeps_one_trained_for_it():
    start, learned, merged = trained(merge_aware=False)
    assert learned < 1e-3 * start and merged > 0.8 * start
    start, learned, merged = trained(merge_aware=True)
    assert learned < 0.15 * start and merged == learned


def test_where_inputs_fill_many_directions_4_bits_have_no_room():
    """Which the README says; a forward that did not see the rounding would end lower."""
    start, learned, merged = trained(merge_aware=True, directions=128)
    assert learned > 1.2 * start and merged == learned
