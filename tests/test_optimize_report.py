"""What `optimize` says of what it did, and that it does nothing twice and nothing for good."""

import peft
import pytest
import torch
from models import disturb, tokens, toy
from needs import needs_kernels
from peft_models import adapted, linear4bit, quantised, reasons
from torch import nn

import peftkern

pytestmark = needs_kernels


def rows_of(report):
    return {row.name.removeprefix("base_model.model."): row for row in report.rows}


def test_restore_gives_back_every_class_and_bit():
    model = adapted("nf4")
    before = [(type(m), set(vars(m))) for m in model.modules()]
    expected = model(tokens())
    peftkern.optimize(model)
    model(tokens())
    assert [type(m) for m in model.modules()] != [cls for cls, _ in before]
    peftkern.restore(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert torch.equal(model(tokens()), expected)


def test_a_second_call_swaps_nothing_and_says_so():
    model = adapted("nf4")
    first = peftkern.optimize(model)
    classes, expected = [type(m) for m in model.modules()], model(tokens())
    second = peftkern.optimize(model)
    assert [type(m) for m in model.modules()] == classes and second.rows == first.rows
    assert set(reasons(second).values()) == {"optimized already"} and len(second.skipped) == 6
    assert peftkern.report(model).rows == first.rows and peftkern.report(model).skipped == []
    assert torch.equal(model(tokens()), expected)


def test_what_runs_elsewhere_is_listed_once_at_every_call():
    model = adapted(None, lora_bias=True)
    for _ in range(2):
        names = [s.name for s in peftkern.optimize(model).skipped]
        assert len(names) == len(set(names)) == 4


@pytest.mark.parametrize(
    ("options", "groups"), [({}, 2), ({"use_dora": True}, 0), ({"lora_bias": True}, 0)]
)
def test_one_pass_is_told_of_layers_that_take_it(options, groups):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, target_modules="all-linear", **options)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    assert len(peftkern.optimize(model).shared) == groups
    if groups:
        model.add_adapter("second", lora)
        model.base_model.set_adapter(["default", "second"])
        assert peftkern.report(model).shared == []


@pytest.mark.parametrize("name", ["layers.0.q_proj", "layers.0.gate_proj"])
def test_a_layer_alone_is_a_model_too(name):
    one = adapted("nf4").get_submodule(f"base_model.model.{name}")
    (row,) = peftkern.optimize(one).rows
    assert row.name == "" and "peftkern.qlora" in peftkern.explain(one)


def test_the_report_tells_what_runs_and_what_does_not():
    model = quantised(toy(width=64))
    model.layers[0].q_proj = linear4bit(nn.Linear(64, 64), quant_storage=torch.uint8)
    model.layers[0].q_proj.weight.quant_state.packing_format_for_cpu = True
    model = disturb(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])))
    report = peftkern.optimize(model)
    assert len(report.rows) == 5 and "repacked" in reasons(report)["layers.0.q_proj"]
    rows = rows_of(report)
    one, alone = rows["layers.1.q_proj"], rows["layers.1.gate_proj"]
    assert (one.layer, one.format, one.mergeable, one.vllm) == (
        "lora.Linear4bit", "nf4", "by peft", "yes",
    )  # fmt: skip
    scales = 64 + 4 + 4 * 256 + 4 + 4 * 16  # codes, their scale, map, offset, codebook
    assert one.trainable == 512 and one.bytes == 64 * 32 + scales + 4 * 64 + 4 * 512
    assert (alone.trainable, alone.mergeable) == (0, "no: no adapter")
    hidden = 64 * 32 - 64 * 64 // 2  # of the repacked one, whose bytes count as parameters
    whole = sum(p.numel() for p in toy(width=64).parameters()) + 2 * 512 - 64 * 32
    assert report.parameters == whole + hidden
    text = str(report)
    assert "left out: base_model.model.layers.*.q_proj: bitsandbytes has repacked it" in text


def test_a_model_without_such_layers_is_told_of_its_linears():
    model = toy()
    report = peftkern.optimize(model)
    assert report.rows == [] and len(report.skipped) == 9
    assert {s.reason for s in report.skipped} == {
        "neither adapted by peft nor quantised by bitsandbytes"
    }
    assert "layers.*.q_proj: neither" in str(report) and "(2 modules)" in str(report)


def test_layers_of_one_rank_of_their_own_do_not_load_in_vllm():
    model = adapted("nf4", rank_pattern={"0.down_proj": 32}, alpha_pattern={"0.down_proj": 48})
    rows = rows_of(peftkern.optimize(model))
    assert rows["layers.0.down_proj"].vllm == "no: a rank or alpha of its own"
    assert rows["layers.0.q_proj"].vllm == "yes, with max_lora_rank >= 32"


def test_what_is_no_model_is_refused():
    for call in (peftkern.optimize, peftkern.restore):
        with pytest.raises(TypeError, match="^model must be an nn.Module or a pipeline .* got int"):
            call(3)
    with pytest.raises(TypeError, match="^layer must be an nn.Module, got int"):
        peftkern.explain(3)
