"""Merging for good: plain layers, nothing beside them, and never more than one weight twice."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from merges import MIXED, WARNS, make
from models import adapted, assert_unchanged, disturb, snapshot, tokens, toy
from torch import nn

import peftkern
from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import merging
from peftkern.qlora.frozen import FrozenLinear

NF4 = LoraConfig(base="nf4", r=4)
WAYS = {
    "float": (LoraConfig(r=4), {}, nn.Linear),
    "float with DoRA": (LoraConfig(r=4, use_dora=True), {}, nn.Linear),
    "nf4 to bfloat16": (NF4, {"dtype": torch.bfloat16}, nn.Linear),
    "nf4 to nf4": (NF4, {"requantize": True}, FrozenLinear),
    "merge-aware": (LoraConfig(base="nf4", r=4, merge_aware=True), {}, FrozenLinear),
    "int8 to int8": (LoraConfig(base="int8", r=4), {"requantize": True}, FrozenLinear),
}


def names_of(model):
    return [n for n, m in adapted().named_modules() if isinstance(m, QLoRALinear)]


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_is_a_plain_model_with_the_merged_weights(way):
    config, options, kind = WAYS[way]
    model = adapted(config)
    kept = peftkern.merge(copy.deepcopy(model), **options)
    assert peftkern.merge(model, **options, unload=True) is model
    layers = [model.get_submodule(n) for n in names_of(model)]
    assert layers and {type(layer) for layer in layers} == {kind}
    assert model.state_dict().keys() == kept.state_dict().keys()
    assert all(torch.equal(v, kept.state_dict()[k]) for k, v in model.state_dict().items())
    if options.get("dtype") is None:
        assert torch.equal(model(tokens()), kept(tokens()))
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert peftkern.report(model).rows == [] and peftkern.report(model).skipped == []
    with pytest.raises(ValueError, match="^model must have an adapter"):
        peftkern.unmerge(model)


@pytest.mark.filterwarnings(WARNS)
@pytest.mark.parametrize("way", WAYS)
def test_nothing_else_is_kept_and_one_weight_at_most_is_there_twice(way, monkeypatch):
    config, options, _ = WAYS[way]
    model = adapted(config)
    layers = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    originals = [weakref.ref(layer.weight) for layer in layers]
    adapters = [weakref.ref(p) for layer in layers for p in layer.trained()]
    made, alive, merged = [], [], merging.merged

    def counting(*args):
        result = merged(*args)
        weight = result.weight
        made.append(weakref.ref(weight if torch.is_tensor(weight) else weight.packed))
        there = [sum(ref() is not None for ref in refs) for refs in (originals, made)]
        alive.append(tuple(there))
        return result

    monkeypatch.setattr(merging, "merged", counting)
    del layers
    gc.disable()
    try:
        peftkern.merge(model, **options, unload=True)
    finally:
        gc.enable()
    count = len(originals)
    assert [old for old, _ in alive] == [*[count] * count, *range(count, 0, -1)]
    # In the first round each is gone before the next is made, in the second the originals are.
    assert max(old + new for old, new in alive) == count + 1
    assert not any(ref() is not None for ref in originals + adapters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: torch.nn.init.constant_(last(model).lora_B, torch.inf),
            "must have a finite",
        ),
        (lambda model: add_hook_to_module(last(model), ModelHook()), "must have the forward of"),
        (lambda model: last(model).merge(), "must not be merged yet"),
    ],
)
def test_a_refusal_changes_nothing(change, message):
    model = adapted()
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^layers.1.down_proj {message}|^layers.1.q_proj"):
        peftkern.merge(model, unload=True)
    assert_unchanged(model, before)


def last(model):
    *_, layer = [m for m in model.modules() if isinstance(m, QLoRALinear)]
    return layer


def test_a_quantised_base_and_a_layer_alone_are_refused():
    model = adapted(MIXED)
    before = snapshot(model)
    with pytest.raises(ValueError, match="gate_proj .* got nf4: dtype=.* requantize=True"):
        peftkern.merge(model, unload=True)
    assert_unchanged(model, before)
    layer = make()
    with pytest.raises(ValueError, match="^model must hold the layers that are unloaded"):
        peftkern.merge(layer, unload=True)
    assert not layer.merged


def test_one_warning_tells_the_loss_at_the_line_of_the_call():
    with pytest.warns(UserWarning, match="in 6 layers") as caught:
        peftkern.merge(adapted(NF4), requantize=True, unload=True)
    assert [w.filename for w in caught] == [__file__]


def test_a_module_in_two_places_and_a_tied_weight_stay_so():
    model = toy(tied=True)
    model.layers[1].q_proj = model.layers[0].q_proj
    targets = LoraConfig(target_modules=["q_proj", "lm_head"])
    disturb(peftkern.adapt(model, targets))
    y, bits = model(tokens()), model.embed.weight.clone()
    peftkern.merge(model, unload=True)
    assert model.layers[1].q_proj is model.layers[0].q_proj
    assert type(model.lm_head) is nn.Linear and torch.equal(model.embed.weight, bits)
    torch.testing.assert_close(model(tokens()), y)


def test_hooks_and_modes_stay():
    model, seen = adapted(), []
    layer = model.layers[0].q_proj
    handle = layer.register_forward_hook(lambda *_: seen.append(1))
    layer.train()
    peftkern.merge(model, unload=True)
    model(tokens())
    assert seen == [1] and model.layers[0].q_proj.training and not model.layers[1].training
    handle.remove()
    model(tokens())
    assert seen == [1]


@pytest.mark.filterwarnings(WARNS)
def test_a_model_that_was_unloaded_takes_another_adapter():
    model = peftkern.merge(adapted(NF4), requantize=True, unload=True)
    packed, y = model.layers[0].q_proj.weight, model(tokens())
    assert "base=nf4, block_size=64" in repr(model.layers[0].q_proj)
    peftkern.adapt(model, LoraConfig(r=2))
    assert model.layers[0].q_proj.weight is packed
    assert torch.equal(model(tokens()), y)
    disturb(model)
    assert not torch.equal(model(tokens()), y)


def test_a_language_model_is_saved_as_a_plain_one(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=24,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    disturb(peftkern.adapt(model, LoraConfig(r=4, base="nf4")))
    peftkern.merge(model, dtype=torch.float32, unload=True)
    y = model(tokens()).logits
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(tokens()).logits, y)


def four_bits(folder):
    """As transformers loads a model into bitsandbytes' layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=24,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        ),
    )


def test_a_model_that_transformers_has_quantised_is_a_float_model_afterwards(tmp_path):
    model = disturb(peftkern.adapt(four_bits(tmp_path / "base"), LoraConfig(r=4)))
    assert model.is_quantized
    peftkern.merge(model, dtype=torch.float32, unload=True)
    assert not model.is_quantized and not hasattr(model, "is_loaded_in_4bit")
    y = model(tokens()).logits
    model.save_pretrained(tmp_path / "merged")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(plain(tokens()).logits, y)
    model.to(torch.bfloat16)  # which transformers refuses of a quantised model
    assert model.dtype == torch.bfloat16


def test_a_model_of_which_a_part_stays_quantised_stays_one(tmp_path):
    model = peftkern.adapt(four_bits(tmp_path), LoraConfig(r=4, target_modules=["q_proj"]))
    peftkern.merge(model, dtype=torch.float32, unload=True)
    assert model.is_quantized and model.config.quantization_config is not None
