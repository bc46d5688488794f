"""Placing adapters: where they go, what they leave alone, and what the report says of it."""

import copy

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from models import disturb, placed, reasons, tokens, toy
from torch import nn
from transformers.pytorch_utils import Conv1D

import peftkern
from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import dequantize, reference


def test_all_linear_leaves_heads_and_routers_alone():
    model = peftkern.adapt(toy(), LoraConfig())
    ends = ("q_proj", "gate_proj", "down_proj")
    assert placed(model) == [f"layers.{i}.{end}" for i in range(2) for end in ends]
    assert "output head" in reasons(model)["lm_head"]
    assert "router" in reasons(model)["layers.0.gate"]


def test_all_linear_asks_the_model_for_its_head():
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=24, tie_word_embeddings=False,
    )  # fmt: skip
    model = nn.ModuleDict({"language": transformers.BertForMaskedLM(config)})
    peftkern.adapt(model, LoraConfig())
    assert len(placed(model)) == 7
    assert list(reasons(model)) == ["language.cls.predictions.decoder"]


def test_adapt_returns_the_same_model_which_still_computes_the_same():
    model, plain = toy(), toy()
    assert peftkern.adapt(model, LoraConfig()) is model
    torch.testing.assert_close(model(tokens()), plain(tokens()))


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "0.down_proj"]),
        dict(target_modules=["layers.1.q_proj"], exclude_modules=["q_proj.x"]),
        dict(target_modules=["q_proj", "gate"], exclude_modules=["0.gate"]),
        dict(target_modules=r".*\.1\.(q|down)_proj"),
        dict(target_modules=r"layers\.1\.(q_proj|down)"),
        dict(target_modules=r".*proj", exclude_modules=r".*0\..*"),
        dict(target_modules=["proj", "q_proj"]),
        dict(target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}),
        dict(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={r"layers.0.*": 3, "q_proj": 5},
            alpha_pattern={"^layers.1.q_proj": 7, "layers.1.down_pro": 1},
            use_rslora=True,
        ),
    ],
)
def test_names_and_patterns_mean_what_they_mean_in_peft(options):
    ours = peftkern.adapt(toy(), LoraConfig(r=4, lora_alpha=6, **options))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(r=4, lora_alpha=6, **options)).base_model
    layers = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in theirs.model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert {n: (m.r, m.scaling) for n in placed(ours) if (m := ours.get_submodule(n))} == layers


def test_a_list_may_name_heads_and_routers():
    model = peftkern.adapt(toy(), LoraConfig(target_modules=["lm_head", "0.gate"]))
    assert placed(model) == ["layers.0.gate", "lm_head"]


def test_what_matches_in_part_is_reported():
    model = peftkern.adapt(toy(), LoraConfig(target_modules=["q_proj", "typo_proj", "embed"]))
    assert reasons(model)["typo_proj"] == "names no module"
    assert "Embedding" in reasons(model)["embed"]


def test_everything_is_frozen_but_adapters_old_and_new():
    model = peftkern.adapt(toy(), LoraConfig(target_modules=["q_proj"]))
    peftkern.adapt(model, LoraConfig(target_modules=["down_proj"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ends = ("q_proj.lora_A", "q_proj.lora_B", "down_proj.lora_A", "down_proj.lora_B")
    assert trained == {f"layers.{i}.{end}" for i in range(2) for end in ends}
    assert {id(p) for p in peftkern.trainable_parameters(model)} == {
        id(p) for name, p in model.named_parameters() if name in trained
    }


def test_an_adapter_that_is_there_stays_as_it_is():
    model = peftkern.adapt(toy(), LoraConfig(target_modules=["q_proj"]))
    layer, values = model.layers[0].q_proj, disturb(model).layers[0].q_proj.lora_B.clone()
    peftkern.adapt(model, LoraConfig(r=2))
    assert model.layers[0].q_proj is layer and torch.equal(layer.lora_B, values)
    assert reasons(model)["layers.0.q_proj"] == "has an adapter already"


def test_configs_of_a_tuple_apply_in_order():
    configs = (LoraConfig(r=2, target_modules=["q_proj"]), LoraConfig(r=3))
    model = peftkern.adapt(toy(), configs)
    assert (model.layers[0].q_proj.r, model.layers[0].down_proj.r) == (2, 3)


def test_a_training_step_changes_adapters_alone():
    model = peftkern.adapt(toy(), LoraConfig(base="nf4"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(peftkern.trainable_parameters(model), lr=1.0)
    for _ in range(2):  # in the first, A has no gradient yet, since B is zero
        optimiser.zero_grad()
        model.train()(tokens()).square().mean().backward()
        optimiser.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_tied_weights_stay_tied_and_are_not_quantised():
    model = toy(tied=True)
    peftkern.adapt(model, LoraConfig(target_modules=["lm_head", "q_proj"], base="nf4"))
    assert model.lm_head.weight is model.embed.weight
    assert model.lm_head.quantized_weight is None
    assert model.layers[0].q_proj.quantized_weight is not None
    assert "tied to embed" in reasons(model)["lm_head"]


def test_a_module_in_two_places_gets_one_adapter():
    model = toy()
    model.layers[1].q_proj = model.layers[0].q_proj
    peftkern.adapt(model, LoraConfig(target_modules=["1.q_proj"]))
    assert isinstance(model.layers[1].q_proj, QLoRALinear)
    assert model.layers[1].q_proj is model.layers[0].q_proj


def test_a_dense_base_is_shared_and_takes_the_precision_of_its_adapter():
    model = toy().bfloat16()
    weight = model.layers[0].q_proj.weight
    peftkern.adapt(model, LoraConfig())
    assert model.layers[0].q_proj.weight is weight
    assert model.layers[0].q_proj.lora_A.dtype == torch.float32


@pytest.mark.parametrize("base", [None, "nf4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_weights_are_taken_as_they_are(nested, base):
    # bitsandbytes on AVX-512 CPUs is wrong where a row is no multiple of its block of 64
    model = toy(width=64)
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=nested)
    model.layers[0].q_proj = layer
    model.to("cpu")  # bitsandbytes quantises on the way
    expected = model.train()(tokens())
    peftkern.adapt(model, LoraConfig(target_modules=["0.q_proj"], base=base))
    ours = model.layers[0].q_proj
    assert ours.weight.data_ptr() == layer.weight.data_ptr()
    assert ours.quantized_weight.absmax.data_ptr() == layer.weight.quant_state.absmax.data_ptr()
    torch.testing.assert_close(model(tokens()), expected)


def test_a_transposed_weight_is_quantised_in_the_order_of_its_rows():
    model = toy()
    convolution = model.layers[0].q_proj = Conv1D(32, 32)
    peftkern.adapt(model, LoraConfig(base="nf4", nested=False))
    layer, x = model.layers[0].q_proj, torch.randn(3, 32)
    weight = dequantize(layer.quantized_weight)
    assert (weight - convolution.weight.t()).abs().max() < 0.2 * convolution.weight.abs().max()
    torch.testing.assert_close(layer(x), reference.linear(x, weight, convolution.bias))


@pytest.mark.parametrize("kind", ["Conv1D", "a view"])
def test_a_transposed_weight_is_turned_round(kind):
    model = toy()
    linear = model.layers[0].gate_proj
    if kind == "Conv1D":
        linear = model.layers[0].gate_proj = Conv1D(64, 32)
    else:
        linear.weight = nn.Parameter(torch.randn(32, 64).t())
    expected = model(tokens())
    peftkern.adapt(model, LoraConfig())
    layer = model.layers[0].gate_proj
    assert isinstance(layer, QLoRALinear) and layer.weight.shape == (64, 32)
    assert layer.weight.is_contiguous() and not layer.weight.requires_grad
    torch.testing.assert_close(model(tokens()), expected)


def test_a_transposed_weight_that_is_tied_stays_tied():
    model = toy()
    model.layers[0].q_proj = Conv1D(32, 32)
    model.layers[1].q_proj = Conv1D(32, 32)
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    peftkern.adapt(model, LoraConfig(base="nf4"))
    assert model.layers[1].q_proj.weight is model.layers[0].q_proj.weight
    assert "tied to layers.1.q_proj" in reasons(model)["layers.0.q_proj"]


def test_biases_train_where_that_is_asked_for():
    model = peftkern.adapt(toy(), LoraConfig(target_modules=["q_proj"], bias="lora_only"))
    ends = ("q_proj.bias", "q_proj.lora_A", "q_proj.lora_B")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.{end}" for i in range(2) for end in ends}
    peftkern.adapt(model, LoraConfig(target_modules=["gate_proj"]))
    assert (
        model.layers[0].q_proj.bias.requires_grad
        and not model.layers[0].down_proj.bias.requires_grad
    )
    model(tokens()).sum().backward()
    assert model.layers[0].q_proj.bias.grad.any()


def test_hooks_move_along_and_their_handles_still_remove_them():
    model, calls = toy(), []
    linear = model.layers[0].q_proj
    handles = [
        linear.register_forward_pre_hook(lambda *args: calls.append("pre")),
        linear.register_forward_hook(
            lambda *args, **kwargs: calls.append("post"), with_kwargs=True
        ),
        linear.register_full_backward_hook(lambda *args: calls.append("backward")),
    ]
    peftkern.adapt(model, LoraConfig())
    model(tokens()).sum().backward()
    assert calls == ["pre", "post", "backward"]
    for handle in handles:
        handle.remove()
    model(tokens()).sum().backward()
    assert len(calls) == 3


def test_an_adapted_model_can_be_copied():
    model = disturb(peftkern.adapt(toy(tied=True), LoraConfig(base="nf4")))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens()), model(tokens()))
    assert twin.layers[0].q_proj.weight.data_ptr() != model.layers[0].q_proj.weight.data_ptr()


@pytest.mark.parametrize(
    "variant",
    [
        dict(init_lora_weights="gaussian"),
        dict(init_lora_weights=False, use_dora=True),
        dict(init_lora_weights="pissa", bias="lora_only"),
        dict(init_lora_weights="pissa_niter_3"),
        dict(init_lora_weights="olora", use_dora=True),
    ],
)
def test_the_config_of_peft_is_taken_where_it_means_the_same(variant):
    options = dict(
        r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True, rank_pattern={"down_proj": 2},
        target_modules=["q_proj", "down_proj"], exclude_modules=["0.q_proj"], **variant,
    )  # fmt: skip
    models = []
    for config in (LoraConfig(**options), peft.LoraConfig(task_type="CAUSAL_LM", **options)):
        model = toy()
        torch.manual_seed(3)
        models.append(peftkern.adapt(model, config))
    ours, theirs = (m.state_dict() for m in models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert [str(m) for m in models[0].modules()] == [str(m) for m in models[1].modules()]
    assert placed(peftkern.adapt(toy(), peft.LoraConfig(target_modules="ALL-linear"))) == placed(
        peftkern.adapt(toy(), LoraConfig())
    )


def test_the_report_counts_what_is_there():
    model = toy()
    configs = (
        LoraConfig(r=2, lora_alpha=4, base="nf4", target_modules=["q_proj"]),
        LoraConfig(r=2, lora_alpha=4, target_modules=["0.down_proj"]),
        LoraConfig(r=32, lora_alpha=64, target_modules=["1.down_proj", "typo"]),
    )
    report = peftkern.report(peftkern.adapt(model, configs))
    rows = {row.name: row for row in report.rows}
    quantised, dense = rows["layers.0.q_proj"], rows["layers.0.down_proj"]
    assert (quantised.layer, quantised.format, quantised.trainable) == ("QLoRALinear", "nf4", 128)
    scales = 16 + 4 + 4 * 256 + 4 + 4 * 16  # codes, their scale, map, offset, codebook
    assert quantised.bytes == 32 * 32 // 2 + scales + 4 * 32 + 4 * 128
    assert quantised.mergeable == "by dtype or requantize"
    assert quantised.vllm.startswith("yes, with")
    assert (dense.format, dense.mergeable) == ("float32", "exact")
    assert dense.bytes == 4 * (64 * 32 + 32 + 2 * (64 + 32))
    assert rows["layers.1.down_proj"].vllm == "no: a rank or alpha of its own"
    assert report.parameters == sum(p.numel() for p in toy().parameters()) + report.trainable
    text = str(report)
    assert "left out: typo: names no module" in text
    assert "layers.0.q_proj" in text and "by dtype or requantize" in text and "train (" in text


def test_the_table_says_once_what_holds_for_every_layer():
    report = peftkern.report(peftkern.adapt(toy(), LoraConfig()))
    assert len(report.skipped) == 3 and str(report).count("left out:") == 2
    assert "layers.*.gate: a router" in str(report)


def test_a_model_without_adapters_has_an_empty_report():
    assert peftkern.report(toy()).rows == []
    assert "0 modules, 0 of" in str(peftkern.report(toy()))
