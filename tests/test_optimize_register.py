"""`register`: layers of ours from get_peft_model on, and files that know nothing of it."""

import json

import bitsandbytes as bnb
import peft
import pytest
import torch
from models import disturb, tokens, toy
from needs import needs_kernels
from peft_models import BASES, ENDS, layer, linear4bit, quantised, swapped
from torch import nn

import peftkern

pytestmark = needs_kernels


def config(**options):
    return peft.LoraConfig(r=4, lora_alpha=6, **{"target_modules": list(ENDS)} | options)


def registered(**options):
    made = config(**options)
    peftkern.register(made)
    return made


def built(base, made, seed=0):
    model = toy(seed=seed, width=64)
    if base:
        quantised(model, base)
    torch.manual_seed(1)
    return disturb(peft.get_peft_model(model, made)).train()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}])
def test_a_registered_config_makes_layers_of_ours(base, options):
    ours, theirs = built(base, registered(**options)), built(base, config(**options))
    assert len(swapped(ours)) == 6 and not swapped(theirs)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    assert ("lora_bias" in peftkern.explain(layer(ours))) == bool(options.get("lora_bias"))
    peftkern.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(ours(tokens()), theirs(tokens()))


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_trained_with_us_never_asks_for_us(base, tmp_path):
    model = built(base, registered())
    expected = model(tokens())
    model.save_pretrained(tmp_path / "ours")
    built(base, config()).save_pretrained(tmp_path / "theirs")
    names = [tmp_path / who / "adapter_config.json" for who in ("ours", "theirs")]
    ours, theirs = (json.loads(name.read_text()) for name in names)
    assert ours == theirs

    def loaded(**options):
        fresh = toy(width=64)
        if base:
            quantised(fresh, base)
        return peft.PeftModel.from_pretrained(fresh, tmp_path / "ours", **options).train()

    plain, again = loaded(), loaded(config=registered())
    assert not swapped(plain) and len(swapped(again)) == 6
    torch.testing.assert_close(plain(tokens()), expected)
    assert torch.equal(again(tokens()), expected)


def test_what_peft_has_other_layers_for_gets_those():
    model = toy(width=64)
    model.layers[0].gate_proj = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    made = registered(target_modules=[*ENDS, "embed"])
    model = peft.get_peft_model(model, made)
    assert type(layer(model, "embed")) is peft.tuners.lora.Embedding


def test_four_bit_layers_are_known_without_the_flag_of_transformers():
    model = toy(width=64)
    model.layers[0].q_proj = linear4bit(nn.Linear(64, 64))
    model = peft.get_peft_model(model, registered(target_modules=["0.q_proj"]))
    assert isinstance(layer(model), peft.tuners.lora.bnb.Linear4bit)


def test_a_linear_that_is_said_to_be_transposed_is_set_right_by_peft():
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        model = built(None, registered(fan_in_fan_out=True))
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(layers) == 6 and not any(m.fan_in_fan_out for m in layers)
    torch.testing.assert_close(model(tokens()), built(None, config())(tokens()))


def test_parameters_are_not_taken_for_layers():
    made = registered(target_modules=[], target_parameters=["q_proj.weight"])
    model = peft.get_peft_model(toy(width=64), made)
    assert not swapped(model) and "ParamWrapper" in str(model)


@pytest.mark.parametrize(
    "made", [None, peftkern.LoraConfig(), peft.LoHaConfig(), peft.AdaLoraConfig(total_step=1)]
)
def test_other_configs_are_refused(made):
    with pytest.raises(TypeError, match="^config must be a LoraConfig of peft, got"):
        peftkern.register(made)
