"""Merging a model: all or nothing, told in one sentence, and no false file afterwards."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from merges import MIXED, WARNS, make
from models import EVERYTHING, adapted, assert_unchanged, disturb, snapshot, tokens, toy
from torch import nn

import peftkern
from peftkern import BottleneckConfig, LoraConfig, QLoRALinear


@pytest.mark.parametrize("config", [LoraConfig(), EVERYTHING, MIXED], ids=["all", "some", "mixed"])
def test_a_merged_model_computes_the_same_and_comes_back(config):
    model = adapted(config)
    y, before = model(tokens()), snapshot(model)
    names = [name for name, _ in model.named_parameters()]
    assert peftkern.merge(model, dtype=torch.float32) is model
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(tokens()), y)
    assert peftkern.unmerge(model) is model
    assert_unchanged(model, before)
    assert torch.equal(model(tokens()), y)


def test_a_weight_of_two_owners_changes_under_one_alone():
    model = toy(tied=True)
    peftkern.adapt(model, LoraConfig(target_modules=["lm_head"]))
    disturb(model)
    tied, bits = model.embed.weight, model.embed.weight.clone()
    y = model(tokens())
    peftkern.merge(model)
    assert model.lm_head.weight is not tied and torch.equal(model.embed.weight, bits)
    torch.testing.assert_close(model(tokens()), y)
    peftkern.unmerge(model)
    assert model.lm_head.weight is model.embed.weight is tied


def test_a_module_in_two_places_is_merged_once():
    model = toy()
    model.layers[1].q_proj = model.layers[0].q_proj
    peftkern.adapt(model, LoraConfig())
    y = disturb(model)(tokens())
    torch.testing.assert_close(peftkern.merge(model)(tokens()), y)
    assert torch.equal(peftkern.unmerge(model)(tokens()), y)


def test_one_warning_tells_the_loss_of_all_layers():
    model = adapted(LoraConfig(base="nf4", r=4))
    with pytest.warns(UserWarning) as caught:
        peftkern.merge(model, requantize=True)
    (warning,) = caught
    assert warning.filename == __file__
    losses = [m.original.loss for m in model.modules() if isinstance(m, QLoRALinear)]
    worst = max(loss.error for loss in losses)
    assert "in 6 layers" in str(warning.message) and f"{worst:.3g} in layers." in str(
        warning.message
    )
    assert {row.mergeable for row in peftkern.report(model).rows} == {
        f"merged, error {loss.error:.2g}" for loss in losses
    }


def test_what_loses_nothing_warns_of_nothing():
    with warnings.catch_warnings(action="error"):
        peftkern.merge(adapted())
        peftkern.merge(adapted(LoraConfig(base="nf4")), dtype=torch.bfloat16)
        untrained = peftkern.adapt(toy(), LoraConfig(base="nf4"))
        peftkern.merge(untrained, requantize=True)  # there is no change to lose


def test_the_report_tells_what_is_merged_and_what_it_costs():
    model = adapted(MIXED)
    plain = {row.name: row for row in peftkern.report(model).rows}
    assert {row.mergeable for row in plain.values()} == {"exact", "by dtype or requantize"}
    peftkern.merge(model, dtype=torch.bfloat16)
    for row in peftkern.report(model).rows:
        assert (row.format, row.mergeable) == ("bfloat16", "merged")
        assert row.bytes == plain[row.name].bytes + model.get_submodule(row.name).weight.nbytes
    assert "merged=True" in repr(model.layers[0].q_proj)
    peftkern.unmerge(model)
    assert peftkern.report(model).rows == list(plain.values())


# Refusals, which change nothing.


def merged_in_part(model):
    model.layers[1].q_proj.merge()
    return model


def with_peft():
    return peft.get_peft_model(toy(), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: adapted(LoraConfig(base="nf4")), {}, ValueError, "q_proj must have a float base"),
        (lambda: adapted(MIXED), {}, ValueError, "gate_proj .* got nf4: dtype=.* requantize=True"),
        (adapted, {"dtype": torch.int8}, TypeError, "^dtype must be float32, .* got torch.int8"),
        (
            adapted,
            {"dtype": torch.float32, "requantize": True},
            ValueError,
            "^dtype and requantize must not come together",
        ),
        (lambda: merged_in_part(adapted()), {}, ValueError, "^layers.1.q_proj must not be merged"),
        (toy, {}, ValueError, "^model must have an adapter"),
        (with_peft, {}, ValueError, r"^model must have no adapters of peft, .*merge_adapter\(\)"),
    ],
)
def test_a_refused_merge_changes_nothing(make, options, error, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peftkern.merge(model, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LoraConfig(), {}),
        (LoraConfig(base="nf4"), {"dtype": torch.float16}),
        (LoraConfig(base="nf4"), {"requantize": True}),
        (LoraConfig(base="nf4", nested=False), {"requantize": True}),
    ],
)
def test_one_weight_that_is_not_finite_keeps_all_from_merging(config, options):
    model = adapted(config)
    with torch.no_grad():
        model.layers[1].down_proj.lora_B[0, 0] = torch.inf
    before = snapshot(model)
    with pytest.raises(ValueError, match="^layers.1.down_proj must have a finite weight once"):
        peftkern.merge(model, **options)
    assert_unchanged(model, before)


def test_a_warning_made_an_error_changes_nothing():
    model = adapted(LoraConfig(base="nf4"))
    before = snapshot(model)
    with warnings.catch_warnings(action="error"), pytest.raises(UserWarning):
        peftkern.merge(model, requantize=True)
    assert_unchanged(model, before)


def test_what_is_not_merged_cannot_be_unmerged():
    with pytest.raises(ValueError, match="^layer must be merged"):
        make().unmerge()
    with pytest.raises(ValueError, match="^model must be merged"):
        peftkern.unmerge(adapted())
    model = merged_in_part(adapted())
    peftkern.unmerge(model)  # the others are as they were wanted
    assert not model.layers[1].q_proj.merged


def test_another_adapter_that_cannot_be_merged_keeps_none_from_unmerging():
    model = adapted()
    before = model(tokens())
    peftkern.merge(model)
    peftkern.adapt(model, BottleneckConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(peftkern.unmerge(model)(tokens()), before)


# Training.


def test_a_merged_model_does_not_train_in_silence():
    model = adapted()
    peftkern.merge(model).train()
    with pytest.raises(RuntimeError, match="^layer must be unmerged to train"):
        model(tokens())
    with torch.no_grad():
        y = model(tokens())
    assert torch.equal(model.eval()(tokens()), y)
    model.train()
    for parameter in peftkern.trainable_parameters(model):
        parameter.requires_grad_(False)
    assert torch.equal(model(tokens()), y)


def test_training_goes_on_where_it_was_after_unmerging():
    model, twin = adapted(), adapted()
    steps = []
    for m in (model, twin):
        optimizer = torch.optim.Adam(peftkern.trainable_parameters(m), lr=0.01)
        for step in range(3):
            if m is model and step == 1:
                with torch.no_grad():
                    peftkern.merge(m.eval())(tokens())
                peftkern.unmerge(m.train())
            optimizer.zero_grad()
            m(tokens()).square().mean().backward()
            optimizer.step()
        steps.append(m.state_dict())
    assert all(torch.equal(steps[0][key], steps[1][key]) for key in steps[1])


# Files.


def test_the_state_of_a_merged_model_is_that_of_the_plain_one():
    model = adapted()
    y = peftkern.merge(model)(tokens())
    plain = toy(seed=3)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(tokens()), y)
    with pytest.raises(RuntimeError, match="Missing key.*lora_A"):  # it would be added twice
        adapted().load_state_dict(model.state_dict())


@pytest.mark.filterwarnings(WARNS)
def test_the_state_of_a_requantised_layer_is_what_bitsandbytes_reads():
    from bitsandbytes.nn import Params4bit

    layer, x = make(width := 64, 64, "nf4"), torch.randn(3, 64)
    layer.merge(requantize=True)
    state = layer.state_dict()
    statistics = {k: v for k, v in state.items() if k.startswith("weight.")}
    theirs = Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
    assert list(theirs.quant_state.shape) == [width, 64] and "lora_A" not in state
    y = QLoRALinear.from_linear(_linear4bit(theirs, layer.bias), r=1)(x)
    assert torch.equal(y, layer(x))


def _linear4bit(weight, bias):
    module = nn.Linear(1, 1)
    module.weight, module.bias = weight, bias
    return module


def test_a_merged_language_model_is_saved_as_a_plain_one(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=24,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    disturb(peftkern.adapt(model, LoraConfig(r=4)))
    y = peftkern.merge(model)(tokens()).logits
    model.save_pretrained(tmp_path)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(tokens()).logits, y)


def test_a_merged_model_saves_its_adapter_and_loads_none(tmp_path):
    model = adapted()
    y = model(tokens())
    peftkern.save_adapter(model, tmp_path / "before")
    unmerged = copy.deepcopy(model.state_dict())
    peftkern.merge(model)
    peftkern.save_adapter(model, tmp_path / "merged")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (
            tmp_path / "merged" / file
        ).read_bytes()
    assert torch.equal(peftkern.load_adapter(toy(), tmp_path / "merged")(tokens()), y)
    before = snapshot(model)
    with pytest.raises(ValueError, match="^model must be unmerged before it loads an adapter"):
        peftkern.load_adapter(model, tmp_path / "before")
    with pytest.raises(RuntimeError, match="the layer must be unmerged before it loads"):
        model.load_state_dict(unmerged)
    assert_unchanged(model, before)
