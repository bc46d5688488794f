"""Bottlenecks on disk: what is saved is loaded, and what does not fit changes nothing."""

import json

import pytest
import torch
from bottleneck_models import CONFIG, adapted, build
from models import assert_unchanged, disturb, snapshot
from safetensors.torch import load_file, save_file

import peftkern
from peftkern import BottleneckAdapter, BottleneckConfig, LoraConfig, OneBitConfig, QLoRALinear


@pytest.mark.parametrize("family", ["llama", "whisper", "bert"])
@pytest.mark.parametrize("into", ["plain", "adapted"])
def test_what_is_saved_is_loaded(tmp_path, family, into):
    model, call = adapted(family)
    peftkern.save_adapter(model, tmp_path)
    other, _, _ = build(family)
    if into == "adapted":
        other = disturb(peftkern.adapt(other, CONFIG), seed=5)
        assert not torch.equal(call(other), call(model))
    assert peftkern.load_adapter(other, tmp_path) is other
    assert torch.equal(call(other), call(model))
    assert {type(m) for m in other.modules()} == {type(m) for m in model.modules()}


def test_the_files_are_peft_s_two_with_names_of_our_own(tmp_path):
    model, _ = adapted("vit", BottleneckConfig(r=4))
    peftkern.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: list(t.shape) for name, t in stored.items()} == {
        "layers.0.mlp.adapter.down": [4, 16],
        "layers.0.mlp.adapter.bias_down": [4],
        "layers.0.mlp.adapter.up": [16, 4],
        "layers.0.mlp.adapter.bias_up": [16],
    }
    assert stored.keys() == peftkern.adapter_state_dict(model).keys()
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (content["peft_type"], content["version"]) == ("PEFTKERN", 1)
    (entry,) = content["adapters"]
    assert entry["method"] == "bottleneck" and entry["modules"] == ["layers.0.mlp.adapter"]
    assert (entry["config"]["r"], entry["config"]["activation"]) == (4, "relu")


def test_several_methods_and_configs_are_saved_as_one(tmp_path):
    configs = (
        LoraConfig(r=2, rank_pattern={"q_proj": 3}, lora_alpha=5),
        BottleneckConfig(r=4, place="attn"),
        BottleneckConfig(r=6, mode="sequential", scale=2.0),
    )
    model, call = adapted("llama", configs)
    peftkern.save_adapter(model, tmp_path)
    other, _, _ = build("llama")
    peftkern.load_adapter(other, tmp_path)
    assert torch.equal(call(other), call(model))
    kinds = {QLoRALinear, BottleneckAdapter}
    rows = [(r.name, r.layer, r.trainable) for r in peftkern.report(model).rows]
    assert rows == [(r.name, r.layer, r.trainable) for r in peftkern.report(other).rows]
    assert kinds <= {type(m) for m in other.modules() if type(m) in kinds}


@pytest.mark.parametrize("first", [LoraConfig(r=2), OneBitConfig(r=2)])
def test_a_linear_that_gave_way_and_has_a_child_is_saved_with_both(tmp_path, first):
    model, call, _ = build("whisper")
    peftkern.adapt(model, (first, BottleneckConfig(r=4)))
    peftkern.save_adapter(disturb(model), tmp_path)
    other = peftkern.load_adapter(build("whisper")[0], tmp_path)
    torch.testing.assert_close(call(other), call(model))


def loads_into_a_plain_one(model, call, path, **options):
    peftkern.save_adapter(disturb(model), path)
    other, _, _ = build("llama", **options)
    peftkern.load_adapter(other, path)
    assert torch.equal(call(other), call(model))


def test_the_order_in_which_configs_came_does_not_matter(tmp_path):
    """The second one names the first one's places too; a file has the model's order, not theirs."""
    model, call, _ = build("llama")
    peftkern.adapt(model, BottleneckConfig(r=4))
    peftkern.adapt(model, BottleneckConfig(r=6, place="both"))
    loads_into_a_plain_one(model, call, tmp_path)


def test_what_was_left_out_stays_without(tmp_path):
    model, call, _ = build("llama", layers=2)
    mlp = model.layers[1].mlp
    mlp.forward = mlp.forward  # as accelerate replaces it
    loads_into_a_plain_one(peftkern.adapt(model, CONFIG), call, tmp_path, layers=2)


def test_lora_alone_is_still_written_for_peft(tmp_path):
    model, _ = adapted("llama", LoraConfig(r=2))
    peftkern.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_scale_that_does_not_train_is_the_file_s(tmp_path):
    model, call = adapted("vit", BottleneckConfig(r=4, scale=3.0))
    peftkern.save_adapter(model, tmp_path)
    other, _, _ = build("vit")
    peftkern.adapt(other, BottleneckConfig(r=4, scale=1.0, dropout=0.5))
    peftkern.load_adapter(other, tmp_path)
    assert torch.equal(call(other), call(model))
    adapter = other.layers[0].mlp.adapter
    assert adapter.config.dropout == 0.5
    again = tmp_path / "again"
    peftkern.save_adapter(other, again)
    (entry,) = json.loads((again / "adapter_config.json").read_text())["adapters"]
    assert entry["config"]["scale"] == 3.0


def edit(path, config=None, tensors=None):
    if config:
        file = path / "adapter_config.json"
        content = json.loads(file.read_text())
        config(content)
        file.write_text(json.dumps(content))
    if tensors:
        file = path / "adapter_model.safetensors"
        stored = load_file(file)
        tensors(stored)
        save_file(stored, file)


NAME = "layers.0.mlp.adapter"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (lambda c: c.update(version=2), None, "version must be 1 in adapter_config.json, got 2"),
        (lambda c: c.update(adapters=[]), None, "adapters must be a list"),
        (lambda c: c["adapters"][0].update(modules=[["a"]]), None, "adapters must be a list"),
        (lambda c: c["adapters"][0].update(method="magic"), None, "method must be one of"),
        (lambda c: c["adapters"][0]["config"].update(spin=1), None, "config must be one of bott"),
        (lambda c: c["adapters"][0]["config"].update(r=0), None, "r must be at least 1, got 0"),
        (
            lambda c: c["adapters"][0]["config"].update(r=5),
            None,
            r"shape \[5\], got \[4\]",
        ),
        (lambda c: c["adapters"][0]["config"].update(place="attn"), None, "no such adapter"),
        (
            None,
            lambda t: t.pop(f"{NAME}.up"),
            "must have down, bias_down, up, bias_up as in",
        ),
        (None, lambda t: t.update({f"{NAME}.more": torch.ones(1)}), "mlp.adapter must have down"),
        (None, lambda t: t.update({"elsewhere": torch.ones(1)}), "must hold what adapter_config"),
        (None, lambda t: t.update({f"{NAME}.up": torch.ones(3, 4)}), "up must have shape"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, config, tensors, message):
    peftkern.save_adapter(adapted("vit", BottleneckConfig(r=4))[0], tmp_path)
    edit(tmp_path, config, tensors)
    model, _, _ = build("vit")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_tensor_that_is_not_float_changes_nothing(tmp_path):
    peftkern.save_adapter(adapted("vit", BottleneckConfig(r=4))[0], tmp_path)
    edit(tmp_path, tensors=lambda t: t.update({f"{NAME}.up": t[f"{NAME}.up"].long()}))
    model, _, _ = build("vit")
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"mlp\.adapter\.up must be float32 or .*, got torch.int64"):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(activation="gelu"), "got activation 'relu', not 'gelu'"),
        (dict(mode="sequential"), "got mode 'parallel', not 'sequential'"),
        (dict(r=5), "down must have shape"),
        (dict(place="both"), "the file lacks them: layers.0.attention.adapter"),
    ],
)
def test_an_adapter_that_is_another_function_takes_no_file(tmp_path, options, message):
    peftkern.save_adapter(adapted("vit", BottleneckConfig(r=4))[0], tmp_path)
    model, _ = adapted("vit", BottleneckConfig(**dict(r=4) | options))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        peftkern.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
