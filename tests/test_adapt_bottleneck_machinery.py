"""Adapted models through the machinery of torch and transformers: files, copies, compilers."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from bottleneck_models import build
from models import assert_unchanged, disturb, snapshot
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import BottleneckAdapter, BottleneckConfig, LoraConfig, QLoRALinear

CONFIG = BottleneckConfig(r=4, place="both", norm="in", train_scale=True)


def adapted(family="llama", config=CONFIG, **options):
    model, call, _ = build(family, **options)
    return disturb(peftkern.adapt(model, config)), call


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


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


@pytest.mark.parametrize("family", ["llama", "whisper", "bloom"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_apart(tmp_path, family, how):
    model, call = adapted(family)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    wanted = call(model)
    assert torch.equal(call(other), wanted)
    assert {n: type(m) for n, m in other.named_modules()} == {
        n: type(m) for n, m in model.named_modules()
    }
    disturb(other)
    assert not torch.equal(call(other), wanted) and torch.equal(call(model), wanted)


def test_part_of_a_copy_that_nobody_feeds_says_so():
    model, _ = adapted("whisper", BottleneckConfig(r=4))
    part = copy.deepcopy(model.encoder.layers[0].fc2)
    with pytest.raises(RuntimeError, match="input must be read before the adapter's module runs"):
        part(torch.randn(2, 24))


@pytest.mark.parametrize("family", ["llama", "whisper", "bert", "vit"])
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_model_compiles_whole(family, mode):
    model, call = adapted(family, BottleneckConfig(r=4, place="both", mode=mode))
    wanted = call(model)
    wanted.sum().backward()
    grads = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    one = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = call(one)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, grads[name], msg=name)


@pytest.mark.parametrize("family", ["llama", "whisper", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(family, reentrant):
    config = BottleneckConfig(r=4, place="both", dropout=0.3)
    model, call = adapted(family, config)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(7)
    call(model).sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    torch.manual_seed(7)
    call(model).sum().backward()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, wanted[name]), name


def test_an_early_stop_of_a_replay_carries_nothing_over():
    """What a block has read and not used stays until it reads again, and is never taken for it."""
    model, call = adapted("whisper", BottleneckConfig(r=4))
    block, x = model.encoder.layers[0], torch.randn(2, 20, 16, requires_grad=True)
    wanted = block(x, None)
    for _ in range(2):
        checkpoint(lambda x: block(x, None), x, use_reentrant=False).sum().backward()
        assert torch.equal(block(x, None), wanted)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_autocast_computes_as_linears_do(family):
    model, call = adapted(family, BottleneckConfig(r=4, place="both"))
    wanted = call(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(model)
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.1)
    assert all(g.dtype == torch.float32 for g in gradients(model).values())
    seen = []
    adapter = next(m for m in model.modules() if isinstance(m, BottleneckAdapter))
    adapter.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        call(model)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_in_any_dtype_keeps_it_and_the_adapter_has_float32_at_least(dtype):
    model, _, _ = build("llama")
    model.to(dtype)
    peftkern.adapt(model, BottleneckConfig(r=4, place="both"))
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in peftkern.trainable_parameters(model)} == {wide}
    y = model(input_ids=torch.tensor([[3, 4]])).last_hidden_state
    assert y.dtype == dtype and y.isfinite().all()


class Adapting(transformers.LlamaModel):
    """A model that adapts itself, so that `from_pretrained` finds parameters without values."""

    options = dict()

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        peftkern.adapt(self, BottleneckConfig(r=4, place="both", **self.options))


@pytest.mark.parametrize(
    "options", [dict(), dict(norm="in"), dict(norm="out"), dict(train_scale=True, scale=4.0)]
)
def test_from_pretrained_leaves_new_adapters_the_identity_and_alive(tmp_path, options, monkeypatch):
    monkeypatch.setattr(Adapting, "options", options)
    plain, call, _ = build("llama")
    plain.save_pretrained(tmp_path)
    model = Adapting.from_pretrained(tmp_path).eval()
    plain.requires_grad_(False)
    assert torch.equal(call(model), call(plain))
    adapters = [m for m in model.modules() if isinstance(m, BottleneckAdapter)]
    assert len(adapters) == 2 and all(m.down.std() > 0.1 for m in adapters)
    if "train_scale" in options:
        assert all(m.scale.item() == 4.0 for m in adapters)


def test_from_pretrained_reads_what_an_adapted_model_has_saved(tmp_path):
    plain, call, _ = build("llama")
    plain.save_pretrained(tmp_path / "plain")
    model = disturb(Adapting.from_pretrained(tmp_path / "plain").eval())
    model.save_pretrained(tmp_path / "adapted")
    again = Adapting.from_pretrained(tmp_path / "adapted").eval()
    assert torch.equal(call(again), call(model))


def test_state_dicts_have_the_base_s_names_and_load_strictly():
    model, call = adapted("bert")
    plain, _, _ = build("bert")
    names = plain.state_dict().keys()
    assert names < model.state_dict().keys()
    assert all(".adapter." in name for name in model.state_dict().keys() - names)
    other = peftkern.adapt(build("bert")[0], CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(call(other), call(model))


def test_generation_with_a_cache_is_generation_without():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=20, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    disturb(peftkern.adapt(model, BottleneckConfig(r=4, place="both")))
    options = dict(max_new_tokens=6, do_sample=False)
    ids = torch.tensor([[3, 4, 5]])
    runs = [model.generate(ids, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_hidden_states_and_attentions_are_still_recorded(family):
    model, _ = adapted(family)
    plain, _, _ = build(family)
    plain.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    options = dict(output_attentions=True, output_hidden_states=True)
    ids = torch.tensor([[3, 4, 5]])
    ours, theirs = (m(input_ids=ids, **options) for m in (model, plain))
    assert len(ours.attentions) == len(theirs.attentions) == 1
    assert len(ours.hidden_states) == len(theirs.hidden_states)


def test_optimize_leaves_a_linear_with_a_child_its_forward(bnb):
    model, call, _ = build("whisper")
    from bottleneck_models import quantise

    quantise(model)
    disturb(peftkern.adapt(model, BottleneckConfig(r=4)))
    fc1, fc2 = model.encoder.layers[0].fc1, model.encoder.layers[0].fc2
    before = type(fc1), type(fc2)
    report = peftkern.optimize(model)
    assert {"encoder.layers.0.fc1", "encoder.layers.0.fc2"} <= {s.name for s in report.skipped}
    assert (type(fc1), type(fc2)) == before
    call(model).sum().backward()
    assert fc2.adapter.up.grad.any()
