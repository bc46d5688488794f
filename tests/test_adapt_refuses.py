"""What takes no adapter and says why, and refusals that leave a model as it was."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from models import assert_unchanged, placed, reasons, snapshot, toy
from peft.tuners.lora.config import CordaConfig
from torch import nn

import peftkern
from peftkern import LoraConfig


def eight_bit_later(layer):
    return bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=False)


def eight_bit_in_float(layer):
    return bnb.nn.Linear8bitLt(32, 32).to("cpu")


def eight_bit_with_outliers(layer):
    return bnb.nn.Linear8bitLt(32, 32, has_fp16_weights=False, threshold=6.0).to("cpu")


def unknown_format(layer):
    layer = bnb.nn.Linear4bit(32, 32, quant_type="fp4").to("cpu")
    layer.weight.quant_state.quant_type = "fp3"
    return layer


def not_quantised(layer):
    return bnb.nn.Linear4bit(32, 32, quant_type="nf4")


def repacked(layer):
    layer = bnb.nn.Linear4bit(32, 32, quant_type="nf4").to("cpu")
    layer.weight.quant_state.packing_format_for_cpu = True  # what an eval forward leaves behind
    return layer


def own_forward(layer):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    return Scaled(32, 32)


def patched_forward(layer):
    layer.forward = layer.forward
    return layer


def parametrised(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def on_meta(layer):
    return layer.to("meta")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (eight_bit_later, "not quantised yet"),
        (eight_bit_in_float, "kept in float"),
        (eight_bit_with_outliers, "its threshold is 6: activations beyond it"),
        (unknown_format, "fp3 is none of nf4, fp4, int8"),
        (not_quantised, "not quantised yet"),
        (repacked, "repacked"),
        (own_forward, "Scaled"),
        (patched_forward, "replaced on the instance"),
        (parametrised, "computed"),
        (on_meta, "meta"),
    ],
)
def test_what_does_not_fit_is_left_alone_with_its_reason(change, reason):
    model = toy()
    layer = model.layers[0].q_proj = change(model.layers[0].q_proj)
    peftkern.adapt(model, LoraConfig())
    assert model.layers[0].q_proj is layer
    assert reason in reasons(model)["layers.0.q_proj"]


@pytest.mark.parametrize("inner", ["self_attn.out_proj", "linear1"])
def test_weights_that_torch_reads_past_their_module_are_left_alone(inner):
    model = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 32), nn.Linear(32, 32))
    peftkern.adapt(model, LoraConfig())
    assert placed(model) == ["1"]
    assert "without calling" in reasons(model)[f"0.{inner}"]


def test_adapters_of_peft_keep_their_inside_and_their_training():
    model = peft.get_peft_model(toy(), peft.LoraConfig(target_modules=["q_proj"]))
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    peftkern.adapt(model, LoraConfig(target_modules=r".*(0\.down_proj|0\.q_proj\.base_layer)"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert placed(model) == ["base_model.model.layers.0.down_proj"]
    assert trained - before == {f"base_model.model.layers.0.down_proj.lora_{part}" for part in "AB"}
    assert before <= trained


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["typo"]),
        LoraConfig(target_modules="typo"),
        LoraConfig(target_modules=["embed"]),
        LoraConfig(exclude_modules=r".*"),
        (LoraConfig(), LoraConfig(target_modules=["typo"])),
        (LoraConfig(), LoraConfig()),
        (),
    ],
)
def test_a_config_that_finds_nothing_changes_nothing(config):
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match="must"):
        peftkern.adapt(model, config)
    assert_unchanged(model, before)


def test_the_refusal_lists_the_names_that_were_there():
    with pytest.raises(ValueError, match=r"got \['typo'\].*layers\.\*\.q_proj.*lm_head.*typo"):
        peftkern.adapt(toy(), LoraConfig(target_modules=["typo"]))


def test_a_linear_alone_has_no_place_for_an_adapter():
    with pytest.raises(ValueError, match="linears there: none"):
        peftkern.adapt(nn.Linear(4, 4), LoraConfig())


@pytest.mark.parametrize("later", [False, True], ids=["in one tuple", "one by one"])
def test_dora_beside_plain_adapters_is_refused(later):
    model = toy()
    first, second = LoraConfig(target_modules=["q_proj"]), LoraConfig(use_dora=True)
    if later:
        peftkern.adapt(model, first)
    before = snapshot(model)
    with pytest.raises(ValueError, match="^use_dora must be the same"):
        peftkern.adapt(model, second if later else (first, second))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("bias", dict(bias="all")),
        ("modules_to_save", dict(modules_to_save=["lm_head"])),
        ("eva_config", dict(init_lora_weights="eva")),
        ("init_lora_weights", dict(init_lora_weights="orthogonal")),
        ("init_lora_weights", dict(init_lora_weights="mica")),
        ("corda_config", dict(init_lora_weights="corda", corda_config=CordaConfig())),
        ("layers_to_transform", dict(layers_to_transform=[0])),
        ("lora_bias", dict(lora_bias=True)),
        ("use_qalora", dict(use_qalora=True)),
        ("target_parameters", dict(target_parameters=["q_proj.weight"])),
        ("target_modules", dict(target_modules=None)),
        ("alora_invocation_tokens", dict(alora_invocation_tokens=[1])),
    ],
)
def test_the_config_of_peft_is_refused_field_by_field(field, options):
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^{field} must"):
        peftkern.adapt(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [None, {"r": 4}, "all-linear", peft.AdaLoraConfig(total_step=1)])
def test_other_objects_are_no_config(config):
    with pytest.raises(TypeError, match="^config must be"):
        peftkern.adapt(toy(), config)


@pytest.mark.parametrize(
    "options", [dict(rank_pattern={"(": 2}), dict(target_modules="("), dict(exclude_modules="(")]
)
def test_a_config_refuses_what_is_no_regular_expression(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be a regular expression"):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("r", dict(r=0)),
        ("typo_proj", dict(rank_pattern={"typo_proj": 0})),
        ("lora_dropout", dict(lora_dropout=1.5)),
        ("init_lora_weights", dict(init_lora_weights="pizza")),
        ("init_lora_weights", dict(init_lora_weights="pissa_niter_")),
        ("init_lora_weights", dict(init_lora_weights=None)),
        ("init_lora_weights", dict(init_lora_weights="loftq_0", base="nf4")),
        ("base", dict(init_lora_weights="loftq")),
        ("lora_alpha", dict(init_lora_weights="pissa", lora_alpha=0)),
        ("q_proj", dict(init_lora_weights="corda", alpha_pattern={"q_proj": -1})),
        ("bias", dict(bias="all")),
        ("format", dict(base="int3")),
        ("block_size", dict(block_size=48)),
        ("quant_storage", dict(base="int8", quant_storage=torch.bfloat16)),
    ],
)
def test_a_config_refuses_values_out_of_range(field, options):
    with pytest.raises(ValueError, match=f"^{field} must"):
        LoraConfig(**options)


@pytest.mark.parametrize("storage", [torch.int8, torch.float64, "bfloat16", None])
def test_bytes_are_stored_as_bytes_or_as_a_float_that_is_trained_in(storage):
    with pytest.raises(TypeError, match=f"^quant_storage must be one of uint8, .*{storage}"):
        LoraConfig(base="nf4", quant_storage=storage)
