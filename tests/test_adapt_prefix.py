"""Prefixes in models of transformers: placing, generating, training, saving."""

import copy
import pickle
import re

import pytest
import torch
from models import assert_unchanged, reasons, snapshot
from prefixed import EVERY, bart, gpt2, llama, made, mistral, tokens
from torch import nn

import peftkern
from peftkern import LoraConfig, PrefixConfig
from peftkern.bottleneck.prefix import Prefix

PROJECTED = PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5)
DECODERS = [llama, mistral, gpt2]


def prefixes(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Prefix)}


def trained(model, seed=2):
    """As after training: large enough to be heard."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peftkern.trainable_parameters(model):
            parameter.normal_()
    return model


def prefixed(make, config=None, **options):
    model, inputs = made(make, **options)
    return trained(peftkern.adapt(model, config or PrefixConfig(3))), inputs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", EVERY)
def test_a_prefix_of_length_0_leaves_every_bit(make, implementation):
    model, inputs = made(make)
    model.set_attn_implementation(implementation)
    with torch.no_grad():  # sdpa has another kernel for a bias that asks for a gradient
        expected = model(**inputs).logits
        peftkern.adapt(model, PrefixConfig(0))
        assert prefixes(model) and torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("make", EVERY)
def test_eager_attention_and_sdpa_see_the_same_prefix(make):
    model, inputs = made(make)
    plain = model(**inputs).logits
    trained(peftkern.adapt(model, PrefixConfig(3)))
    results = []
    for implementation in ("eager", "sdpa"):  # of a model that has its prefixes already
        model.set_attn_implementation(implementation)
        results.append(model(**inputs).logits)
    torch.testing.assert_close(*results, atol=2e-5, rtol=0)
    assert not torch.allclose(results[0], plain, atol=1e-4)


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("config", [PrefixConfig(3), PROJECTED], ids=["flat", "projected"])
def test_prefixes_alone_train_and_all_of_them_within_two_steps(make, config):
    model, inputs = made(make)
    peftkern.adapt(model, config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.Adam(peftkern.trainable_parameters(model), 1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        model(**inputs).logits.log_softmax(-1)[..., 0].mean().backward()
        optimiser.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".prefix." in name}


@pytest.mark.parametrize("make", DECODERS)
def test_a_prefix_is_seen_from_the_first_token_on_and_none_sees_ahead(make):
    model, inputs = prefixed(make)
    ids = inputs["input_ids"]
    other = ids.clone()
    other[:, 4:] = tokens(5)[:, 4:]
    expected = model(ids).logits
    assert torch.equal(model(other).logits[:, :4], expected[:, :4])
    with torch.no_grad():
        for prefix in prefixes(model).values():
            prefix.values[:, :1] += 1
    assert (model(ids).logits != expected).any(-1).all()


@pytest.mark.parametrize("make", DECODERS)
def test_the_cache_holds_tokens_alone_and_positions_do_not_shift(make):
    model, inputs = prefixed(make)
    ids = inputs["input_ids"]
    whole, cache, steps = model(ids).logits, None, []
    for i in range(ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert cache.get_seq_length() == i + 1
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [*DECODERS, bart])
def test_generate_works_with_and_without_a_cache(make):
    model, inputs = prefixed(make)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["input_ids"])
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    for other in (dict(), dict(cache_implementation="static")):
        assert torch.equal(model.generate(ids, attention_mask=mask, **other, **options), expected)
    if make is not mistral:  # transformers reorders no cache of a window
        beams = model.generate(ids, attention_mask=mask, num_beams=2, **options)
        assert beams.shape == expected.shape


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", DECODERS)
def test_padding_is_not_seen_and_the_prefix_is(make, implementation):
    model, _ = prefixed(make)
    model.set_attn_implementation(implementation)
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(padded[0, 3:], model(ids[:1, 3:]).logits[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(padded[1], model(ids[1:]).logits[0], atol=2e-5, rtol=0)


def test_a_model_with_prefixes_compiles_whole():
    model, inputs = prefixed(llama)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_copies_and_pickles_have_prefixes_of_their_own():
    model, inputs = prefixed(llama, PROJECTED)
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, expected)
        twin.set_attn_implementation("eager")
        assert model.model.layers[0].self_attn.config.own._attn_implementation == "sdpa"
        trained(twin, seed=7)
        assert torch.equal(model(**inputs).logits, expected)
        assert not torch.allclose(twin(**inputs).logits, expected)


def test_attentions_of_a_kind_share_one_embedding():
    """Those of an encoder, of a decoder, and across: three sets, as in Li and Liang's program."""
    model, _ = made(bart)
    peftkern.adapt(model, PROJECTED)
    sets = {}
    for name, prefix in prefixes(model).items():
        sets.setdefault(re.sub(r"\d+", "*", name), set()).add(id(prefix.trunk))
    assert [len(trunks) for trunks in sets.values()] == [1, 1, 1]
    assert len(set.union(*sets.values())) == 3


def test_the_last_layer_of_the_mlp_outweighs_all_else():
    """12 layers of width 768: 800 * 2 * 12 * 768 weights, 14.7 M."""
    with torch.device("meta"):
        model, _ = made(gpt2, n_embd=768, n_layer=12, n_head=12, vocab_size=50257)
    peftkern.adapt(model, PrefixConfig(30, prefix_projection=True))
    counts = [p.numel() for p in peftkern.trainable_parameters(model)]
    last = 2 * 12 * 768
    assert sum(counts) == 800 * last + last + 30 * 768 + 768 * 800 + 800
    assert peftkern.report(model).trainable == sum(counts)


@pytest.mark.parametrize("config", [PrefixConfig(3), PROJECTED], ids=["flat", "projected"])
def test_a_file_has_keys_and_values_alone(config, tmp_path):
    model, inputs = prefixed(llama, config)
    peftkern.save_adapter(model, tmp_path)
    state = peftkern.adapter_state_dict(model)
    names = [f"model.layers.{i}.self_attn.prefix" for i in range(2)]
    assert sorted(state) == [f"{name}.{part}" for name in names for part in ("keys", "values")]
    assert all(part.shape == (2, 3, 8) for part in state.values())
    fresh = peftkern.load_adapter(made(llama)[0], tmp_path)
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    there = peftkern.adapt(made(llama)[0], PrefixConfig(3))
    peftkern.load_adapter(there, tmp_path)
    assert torch.equal(there(**inputs).logits, model(**inputs).logits)


def test_a_file_does_not_load_into_an_mlp(tmp_path):
    model, _ = prefixed(llama)
    peftkern.save_adapter(model, tmp_path)
    other = peftkern.adapt(made(llama)[0], PROJECTED)
    before = snapshot(other)
    with pytest.raises(ValueError, match="an MLP makes its keys"):
        peftkern.load_adapter(other, tmp_path)
    assert_unchanged(other, before)


def test_prefixes_stand_beside_lora():
    model, inputs = made(llama)
    configs = (PrefixConfig(3), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    expected = trained(peftkern.adapt(model, configs))(**inputs).logits
    other, _ = made(llama)
    trained(peftkern.adapt(other, configs[::-1]))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**inputs).logits, expected)


def test_what_takes_no_prefix_is_left_alone_with_its_reason():
    model, inputs = made(gpt2, reorder_and_upcast_attn=True)
    model.transformer.h[0].attn.reorder_and_upcast_attn = False
    config = PrefixConfig(3, target_modules=["attn", "c_fc"])
    peftkern.adapt(model, config)
    assert list(prefixes(model)) == ["transformer.h.0.attn.prefix"]
    assert "where attention is eager" in reasons(model)["transformer.h.1.attn"]
    assert "asks transformers' table" in reasons(model)["transformer.h.0.mlp.c_fc"]
    before = snapshot(model)
    with pytest.raises(ValueError, match="has a prefix already"):
        peftkern.adapt(model, PrefixConfig(2, target_modules=["h.0.attn"]))
    assert_unchanged(model, before)


def test_flash_attention_is_refused_before_anything_changes():
    model, _ = made(llama)
    model.config._attn_implementation_internal = "flash_attention_2"
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"its attention is flash_attention_2, not eager or sdpa"):
        peftkern.adapt(model, PrefixConfig(3))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(length=-1), "length must be at least 0, got -1"),
        (dict(encoder_hidden_size=0), "encoder_hidden_size must be at least 1, got 0"),
        (dict(target_modules="("), "target_modules must be a regular expression"),
    ],
)
def test_a_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**options)


def test_a_model_without_attention_of_transformers_is_refused():
    with pytest.raises(ValueError, match="target_modules must name an attention .*there: none"):
        peftkern.adapt(nn.Sequential(nn.Linear(2, 2)), PrefixConfig())
