"""What `optimize` leaves alone, with the reason, and still computes what it did."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from models import disturb, tokens, toy
from needs import needs_kernels
from peft_models import adapted, layer, linear4bit, quantised, reasons, swapped
from torch import nn

import peftkern
from peftkern import _conditions, _swapped

pytestmark = needs_kernels


def not_quantised(one):
    one.base_layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")


def repacked(one):
    one.base_layer = linear4bit(nn.Linear(64, 64))
    one.base_layer.weight.quant_state.packing_format_for_cpu = True  # as an eval forward leaves it


def repacked_and_saved(one):
    """On a CPU with AVX512-BF16 bitsandbytes puts the bytes back, but not the scales."""
    one.base_layer = linear4bit(nn.Linear(64, 64), compress_statistics=False)
    state = one.base_layer.weight.quant_state
    state.absmax = state.absmax.view(64, 1).t().bfloat16()


def unknown_format(one):
    one.base_layer = linear4bit(nn.Linear(64, 64))
    one.base_layer.weight.quant_state.quant_type = "int3"


def stored_transposed(one):
    one.base_layer = linear4bit(nn.Linear(64, 64))
    one.base_layer.weight.quant_state.shape = torch.Size([32, 128])


def outliers(one):
    one.base_layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0).to("cpu")


def quantised_at_each_call(one):
    one.base_layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True)


def on_meta(one):
    one.base_layer = nn.Linear(64, 64, device="meta")


def offloaded(one):
    add_hook_to_module(one.base_layer, AlignDevicesHook("cpu", offload=True))


def offloaded_in_a_sequence(one):
    hook = SequentialHook(ModelHook(), AlignDevicesHook("cpu", offload=True))
    add_hook_to_module(one.lora_A["default"], hook)


def tensor_parallel(one):
    one.base_layer._hf_tp_plan = "colwise"


def patched_forward(one):
    forward = one.forward
    one.forward = lambda x: forward(x)


def parametrised(one):
    one.base_layer = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))


def of_another_forward(one):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    one.base_layer = Scaled(64, 64)


def transposed(one):
    one.base_layer = nn.Linear(64, 64)
    one.base_layer.weight = nn.Parameter(one.base_layer.weight.t())


def in_eight_bit_floats(one):
    one.base_layer = nn.Linear(64, 64)
    one.base_layer.weight.data = one.base_layer.weight.to(torch.float8_e4m3fn)


OF_THE_BASE = [
    (not_quantised, "not quantised yet"),
    (repacked, "repacked"),
    (repacked_and_saved, "repacked"),
    (unknown_format, "int3 is none of"),
    (stored_transposed, "transposed"),
    (outliers, "threshold is 6"),
    (quantised_at_each_call, "quantised at every forward"),
    (on_meta, "meta"),
    (parametrised, "computed"),
    (of_another_forward, "Scaled is none of"),
    (transposed, "not contiguous"),
    (in_eight_bit_floats, "float8_e4m3fn, not float"),
]
AROUND_IT = [
    (offloaded, "offloads"),
    (offloaded_in_a_sequence, "offloads"),
    (tensor_parallel, "tensor-parallel"),
    (patched_forward, "replaced on the instance"),
]


@pytest.mark.parametrize(("change", "reason"), OF_THE_BASE + AROUND_IT)
def test_what_does_not_fit_is_left_alone_with_its_reason(change, reason):
    model = adapted("nf4")
    one = layer(model)
    change(one)
    report = peftkern.optimize(model)
    assert reason in reasons(report)["layers.0.q_proj"]
    assert len(report.rows) == 5 and "layers.0.q_proj" not in swapped(model)
    text = peftkern.explain(one)
    assert "its own forward" in text and reason in text


@pytest.mark.parametrize(("change", "reason"), OF_THE_BASE)
def test_what_changes_after_the_swap_is_seen_at_the_next_call(change, reason):
    model = adapted("nf4")
    peftkern.optimize(model)
    one = layer(model)
    assert reason not in peftkern.explain(one)
    change(one)
    assert reason in peftkern.explain(one)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one.lora_dropout.update({"default": nn.AlphaDropout(0.1)}), "dropout of its"),
        (lambda one: one.lora_A.update({"default": nn.utils.parametrizations.weight_norm(
            one.lora_A["default"])}), "plain linears"),
        (lambda one: setattr(one.lora_A["default"], "weight", nn.Parameter(
            torch.randn(64, 4).t())), "not contiguous"),
        (lambda one: add_hook_to_module(one.lora_B["default"], SequentialHook()), "replaced on"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_left_to_peft(change, reason):
    model = adapted("nf4")
    one, x = layer(model), torch.randn(3, 64, requires_grad=True)
    change(one)
    one.eval()
    expected = one(x)
    report = peftkern.optimize(model)
    assert reason in reasons(report)["layers.0.q_proj"] and reason in peftkern.explain(one)
    assert torch.equal(one(x), expected)


@pytest.mark.parametrize(
    ("base", "x"),
    [
        (None, torch.randn(3, 63)),
        (None, torch.randn(3, 64).bfloat16()),
        (None, torch.ones(3, 64, dtype=torch.int64)),
        (None, torch.ones(3, 64, device="meta")),
        ("nf4", torch.randn(3, 63)),
    ],
)
def test_inputs_that_peft_refuses_it_refuses_still(base, x):
    model = adapted(base)
    with pytest.raises((RuntimeError, ValueError)) as before:
        layer(model)(x)
    peftkern.optimize(model)
    with pytest.raises(type(before.value)) as after:
        layer(model)(x)
    assert str(after.value) == str(before.value)


def test_integers_are_what_bitsandbytes_makes_of_them():
    model = adapted("nf4")
    one, x = layer(model), torch.ones(3, 64, dtype=torch.int64)
    expected = one(x)
    peftkern.optimize(model)
    assert torch.equal(one(x), expected)


def test_extra_arguments_go_to_the_forward_that_was_there():
    model = adapted("nf4")
    one, x = layer(model), torch.randn(3, 64, requires_grad=True)
    expected = one(x)
    peftkern.optimize(model)
    assert torch.equal(one(x, alora_offsets=None), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'typo'"):
        one(x, typo=1)


def test_other_adapters_of_peft_are_named():
    config = peft.LoHaConfig(r=4, target_modules=["q_proj"])
    model = disturb(peft.get_peft_model(toy(width=64), config))
    expected = model(tokens())
    report = peftkern.optimize(model)
    assert report.rows == []
    assert reasons(report)["layers.0.q_proj"] == "peftkern has no kernel for loha.Linear"
    assert "loha.Linear" in peftkern.explain(layer(model))
    assert torch.equal(model(tokens()), expected)


def test_a_device_without_a_kernel_of_ours_keeps_what_it_has(monkeypatch):
    model = adapted("nf4")
    monkeypatch.setattr(_conditions, "SERVED", frozenset())
    report = peftkern.optimize(model)
    assert set(reasons(report).values()) == {"this build has no kernel for cpu"}
    assert report.rows == [] and swapped(model) == []
    assert "no kernel for cpu" in peftkern.explain(layer(model))


def test_a_release_of_peft_with_other_attributes_is_left_alone():
    model = adapted("nf4")
    del layer(model).lora_variant  # as before 0.15
    report = peftkern.optimize(model)
    assert "this release of peft" in reasons(report)["layers.0.q_proj"]
    assert len(report.rows) == 5


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    class Scaled(bnb.nn.Linear4bit):
        def forward(self, x):
            return 2 * super().forward(x)

    model = quantised(toy(width=64))
    model.layers[0].q_proj = linear4bit(nn.Linear(64, 64))
    model.layers[0].q_proj.__class__ = Scaled
    report = peftkern.optimize(model)
    assert "peftkern has no kernel for" in reasons(report)["layers.0.q_proj"]
    assert type(model.layers[0].q_proj) is Scaled and len(report.rows) == 5


def test_weights_that_torch_reads_past_their_layer_are_left_alone():
    model = nn.Sequential(nn.TransformerEncoderLayer(64, 2, 64), nn.Linear(64, 64))
    model[0].linear1 = linear4bit(model[0].linear1)
    model[1] = linear4bit(model[1])
    report = peftkern.optimize(model)
    assert [row.name for row in report.rows] == ["1"]
    assert "without calling" in reasons(report)["0.linear1"]


@pytest.mark.parametrize("where", ["instance", "class", "attribute"])
def test_what_unsloth_has_patched_is_left_alone(where):
    def fast(self, x):
        return x

    fast.__module__ = "unsloth.kernels.fast_lora"
    model = adapted("nf4")
    block = model.base_model.model.layers[0]
    if where == "class":
        block.__class__ = type("Block", (type(block),), {"forward": fast})
    else:
        setattr(block, "forward" if where == "instance" else "apply_qkv", fast)
    report = peftkern.optimize(model)
    assert "unsloth has patched" in reasons(report)["layers.0.q_proj"]
    assert swapped(model) == [f"layers.1.{end}" for end in ("q_proj", "gate_proj", "down_proj")]


def test_a_weight_that_bitsandbytes_has_repacked_is_seen_at_the_call():
    """Ours never repacks; a twin that shares the parameter may."""
    model = adapted("nf4")
    peftkern.optimize(model)
    model.eval()
    expected = model(tokens())
    assert "repacked" not in peftkern.explain(layer(model))
    base = layer(model).base_layer
    if base.support_avx512bf16_for_cpu:
        base.eval()(torch.randn(1, 64))
        assert "repacked" in peftkern.explain(layer(model))
        torch.testing.assert_close(model(tokens()), expected, rtol=0.1, atol=0.1)
        base.state_dict()
        assert "repacked" not in peftkern.explain(layer(model))  # nested scales, made anew


def test_a_failed_import_changes_nothing(monkeypatch):
    model, stand_in = adapted("nf4"), _swapped.stand_in
    before = [type(m) for m in model.modules()]

    def fail_at_the_last(layer):
        if layer is model.get_submodule("base_model.model.layers.1.down_proj"):
            raise ImportError("gone")
        return stand_in(layer)

    monkeypatch.setattr(_swapped, "stand_in", fail_at_the_last)
    with pytest.raises(ImportError, match="gone"):
        peftkern.optimize(model)
    assert [type(m) for m in model.modules()] == before
