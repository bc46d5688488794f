"""Adapters on disk: peft's files both ways, refusals that change nothing, saves that never tear."""

import copy
import json
import os

import peft
import pytest
import safetensors.torch
import torch
import transformers
from models import (
    EVERYTHING,
    adapted,
    assert_same_outputs,
    assert_unchanged,
    disturb,
    snapshot,
    tokens,
    toy,
)
from safetensors import safe_open
from torch import nn

import peftkern
from peftkern import LoraConfig, QLoRALinear

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def edit(path, **fields):
    content = json.loads((path / CONFIG).read_text()) | fields
    (path / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))


def retensor(path, change):
    tensors = safetensors.torch.load_file(path / TENSORS)
    changed = {k: v.contiguous() for k, v in change(tensors).items()}
    (path / TENSORS).write_bytes(safetensors.torch.save(changed, {"format": "pt"}))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(),
        EVERYTHING,
        LoraConfig(r=3, use_rslora=True, target_modules=["proj", "q_proj"]),
        (
            LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"]),
            LoraConfig(r=2, lora_alpha=8, target_modules=["1.gate"]),
        ),
    ],
)
def test_peft_reads_what_we_write(config, tmp_path):
    model = adapted(config)
    peftkern.save_adapter(model, tmp_path)
    assert_same_outputs(peft.PeftModel.from_pretrained(toy(), tmp_path), model)
    assert_same_outputs(peftkern.load_adapter(toy(), tmp_path), model)


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules="all-linear"),
        dict(target_modules=["q_proj"], use_rslora=True, init_lora_weights="gaussian"),
        dict(target_modules=r".*proj", layers_to_transform=None, rank_pattern={"0.q_proj": 2}),
        dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
        dict(target_modules=["gate"], alpha_pattern={"1.gate": 3}, lora_dropout=0.5),
    ],
)
def test_we_read_what_peft_writes(options, tmp_path):
    theirs = disturb(peft.get_peft_model(toy(), peft.LoraConfig(r=4, lora_alpha=6, **options)))
    theirs.eval().save_pretrained(tmp_path)
    assert_same_outputs(peftkern.load_adapter(toy(), tmp_path), theirs)


def test_a_language_model_goes_to_peft_and_back(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config).eval()
    plain.name_or_path = "someone/a-model"
    model = disturb(peftkern.adapt(copy.deepcopy(plain), LoraConfig(r=4)))
    peftkern.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "someone/a-model"
    torch.testing.assert_close(theirs(tokens()).logits, model(tokens()).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peftkern.load_adapter(plain, tmp_path / "theirs")
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_the_files_hold_what_peft_writes_and_nothing_else(tmp_path):
    model = adapted()
    peftkern.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(peftkern.adapter_state_dict(model))
    known = {f.name for f in peft.LoraConfig.__dataclass_fields__.values()}
    content = json.loads((tmp_path / CONFIG).read_text())
    assert set(content) <= known
    assert content["target_modules"] == [
        "layers.0.down_proj", "layers.0.q_proj", "layers.1.q_proj",
    ]  # fmt: skip


def test_the_state_dict_is_the_parameters_under_the_names_of_peft():
    model = adapted()
    state = peftkern.adapter_state_dict(model)
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(target_modules=["q_proj", "0.down_proj"]))
    assert set(state) == set(peft.get_peft_model_state_dict(theirs))
    a = state["base_model.model.layers.1.q_proj.lora_A.weight"]
    assert a.data_ptr() == model.layers[1].q_proj.lora_A.data_ptr() and not a.requires_grad


def test_the_adapter_of_a_quantised_base_is_an_ordinary_adapter(tmp_path):
    model = adapted(LoraConfig(base="nf4"))
    peftkern.save_adapter(model, tmp_path)
    again = peftkern.adapt(toy(), LoraConfig(base="nf4", lora_alpha=1))
    assert_same_outputs(peftkern.load_adapter(again, tmp_path), model)
    state = peftkern.adapter_state_dict(peftkern.load_adapter(toy(), tmp_path))
    assert all(torch.equal(v, state[k]) for k, v in peftkern.adapter_state_dict(model).items())


def test_loading_keeps_what_is_trained_where_it_is_and_brings_its_scale(tmp_path):
    peftkern.save_adapter(adapted(), tmp_path)
    model = adapted(seed=5)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    model.layers[0].q_proj.rescale(LoraConfig(lora_alpha=100))
    assert peftkern.load_adapter(model, tmp_path) is model
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert_same_outputs(model, adapted())


def test_16_bit_adapters_are_saved_as_such_and_load_into_the_dtype_that_is_there(tmp_path):
    model = adapted()
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    peftkern.save_adapter(model, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / TENSORS)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    again = peftkern.load_adapter(toy(), tmp_path)
    assert again.layers[0].q_proj.lora_A.dtype == torch.float32
    assert torch.equal(again.layers[0].q_proj.lora_A, model.layers[0].q_proj.lora_A.float())


def test_a_compiled_model_saves_under_the_names_of_the_model(tmp_path):
    model = adapted()
    compiled = torch.compile(model)
    assert set(peftkern.adapter_state_dict(compiled)) == set(peftkern.adapter_state_dict(model))
    peftkern.save_adapter(compiled, tmp_path)
    fresh = toy()
    peftkern.load_adapter(torch.compile(fresh), tmp_path)
    assert_same_outputs(fresh, model)


def test_keys_of_a_later_peft_are_passed_over(tmp_path):
    peftkern.save_adapter(adapted(), tmp_path)
    edit(tmp_path, a_key_of_tomorrow={"deep": 1}, peft_version="9.0", velora_config=None)
    assert_same_outputs(peftkern.load_adapter(toy(), tmp_path), adapted())


def test_a_rank_belongs_to_one_name_though_another_ends_like_it(tmp_path):
    def nested():
        return nn.ModuleDict({"a": toy(), "b": nn.ModuleDict({"a": toy(seed=1)})})

    config = LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"^a.layers.0.q_proj": 2})
    model = disturb(peftkern.adapt(nested(), config))
    peftkern.save_adapter(model, tmp_path)
    again = peftkern.load_adapter(nested(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(nested(), tmp_path).base_model.model
    for other in (again, theirs):
        assert_same_outputs(other["a"], model["a"])
        assert_same_outputs(other["b"]["a"], model["b"]["a"])


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if name not in k}


def renamed(old, new):
    return lambda tensors: {k.replace(old, new): v for k, v in tensors.items()}


def each(change):
    return lambda tensors: {k: change(v) for k, v in tensors.items()}


DAMAGES = {
    "tensors cut in the data": lambda p: truncate(p / TENSORS, -1),
    "tensors cut in the header": lambda p: truncate(p / TENSORS, 20),
    "no byte of the tensors": lambda p: truncate(p / TENSORS, 0),
    "tensors with a byte too many": lambda p: (p / TENSORS).open("ab").write(b"x"),
    "another kind of file": lambda p: (p / TENSORS).write_bytes(b"PK\x03\x04" + bytes(99)),
    "config cut": lambda p: truncate(p / CONFIG, 50),
    "config of another kind": lambda p: (p / CONFIG).write_text("[1]"),
    "config with no text": lambda p: (p / CONFIG).write_bytes(b"\xff\xfe\x00\x01"),
    "no tensor": lambda p: retensor(p, lambda t: {}),
    "one A missing": lambda p: retensor(p, drop("0.q_proj.lora_A")),
    "one layer missing": lambda p: retensor(p, drop("layers.0.q_proj")),
    "a foreign prefix": lambda p: retensor(p, renamed("base_model.model.", "transformer.")),
    "a foreign tensor": lambda p: retensor(p, lambda t: t | {"lm_head.weight": torch.ones(1)}),
    "a layer that is not there": lambda p: retensor(p, renamed("layers.1", "layers.7")),
    "a module of another kind": lambda p: retensor(p, renamed("layers.1.q_proj", "embed")),
    "a magnitude": lambda p: retensor(
        p, renamed("0.q_proj.lora_A.weight", "lora_magnitude_vector")
    ),
    "other widths": lambda p: retensor(
        p, each(lambda t: torch.cat([t, t], 1) if len(t) < 9 else t)
    ),
    "other ranks": lambda p: retensor(p, each(lambda t: t[:1] if len(t) < 9 else t[:, :1])),
    "vectors": lambda p: retensor(p, each(lambda t: t.flatten())),
    "integers": lambda p: retensor(p, each(lambda t: t.long())),
    "another method": lambda p: edit(p, peft_type="LOHA"),
    "no method": lambda p: edit(p, peft_type="removed"),
    "no rank": lambda p: edit(p, r="removed"),
    "a rank that is no number": lambda p: edit(p, r="4"),
    "another rank": lambda p: edit(p, r=5),
    "alpha that is no number": lambda p: edit(p, lora_alpha=[1]),
    "a pattern of words": lambda p: edit(p, rank_pattern={"q_proj": "four"}),
    "a pattern that is no expression": lambda p: edit(p, alpha_pattern={"(": 4}),
    "DoRA": lambda p: edit(p, use_dora=True),
    "biases": lambda p: edit(p, bias="all"),
    "biases of the adapter": lambda p: edit(p, lora_bias=True),
    "saved modules": lambda p: edit(p, modules_to_save=["lm_head"]),
    "a changed base": lambda p: edit(p, init_lora_weights="pissa_niter_4"),
}


@pytest.mark.parametrize("fresh", [False, True], ids=["adapted", "fresh"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_adapter_is_refused_with_nothing_changed(damage, fresh, tmp_path):
    peftkern.save_adapter(adapted(), tmp_path)
    DAMAGES[damage](tmp_path)
    model = toy() if fresh else adapted(seed=5)
    before = snapshot(model)
    if damage == "one layer missing" and fresh:
        peftkern.load_adapter(model, tmp_path)  # what is left is an adapter of fewer layers
        return
    with pytest.raises((ValueError, TypeError), match=" must "):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no tensor", "biases alone, got nothing"),
        ("a foreign tensor", "got lm_head.weight"),
        ("a module of another kind", "embed: Embedding is none of"),
        ("a layer that is not there", r"layers\.7\.q_proj"),
        ("one A missing", r"layers\.0\.q_proj must have lora_A and lora_B, got lora_B"),
        ("integers", "lora_A must be float32 .* got torch.int64"),
    ],
)
def test_the_refusal_says_what_is_wrong(damage, words, tmp_path):
    peftkern.save_adapter(adapted(), tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises((ValueError, TypeError), match=words):
        peftkern.load_adapter(toy(), tmp_path)


@pytest.mark.parametrize("missing", [CONFIG, TENSORS, ""])
def test_a_missing_file_is_named(missing, tmp_path):
    folder = tmp_path / "adapter"
    if missing:
        peftkern.save_adapter(adapted(), folder)
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match="path must be a folder with"):
        peftkern.load_adapter(toy(), folder)


def test_a_model_without_an_adapter_has_nothing_to_save(tmp_path):
    for call in (
        lambda: peftkern.save_adapter(toy(), tmp_path / "new"),
        lambda: peftkern.adapter_state_dict(toy()),
    ):
        with pytest.raises(ValueError, match="^model must have an adapter"):
            call()
    assert not (tmp_path / "new").exists()


def test_other_files_of_the_folder_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    peftkern.save_adapter(adapted(), tmp_path)
    peftkern.save_adapter(adapted(LoraConfig(r=2)), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, TENSORS]
