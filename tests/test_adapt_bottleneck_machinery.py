"""Adapted models through the machinery of torch and transformers: copies, compilers, loading."""

import copy
import pickle
import threading
from collections import namedtuple

import pytest
import torch
import transformers
from bottleneck_models import CONFIG, adapted, build, quantise
from models import disturb
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import BottleneckAdapter, BottleneckConfig, _swapped


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


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


def test_threads_that_call_one_model_at_a_time_get_each_their_own():
    """One stands between reading x and adding to it while another passes through."""
    model, call = adapted("whisper", BottleneckConfig(r=4))
    block = model.encoder.layers[0]
    xs = [torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    wanted = [block(x, None) for x in xs]
    found, met = {}, threading.Barrier(2, timeout=60)

    def meet(*_):
        met.wait()

    def run(i):
        found[i] = block(xs[i], None)

    block.fc1.register_forward_hook(meet)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(2))


@pytest.mark.parametrize("kind", [tuple, list, namedtuple("Out", "y rest")._make])
def test_what_a_module_gives_beside_y_comes_as_it_did(kind):
    class Giving(nn.Linear):
        def forward(self, x):
            return kind([super().forward(x), "rest"])

    model, x = nn.Sequential(Giving(4, 4)), torch.randn(3, 4)
    plain = model(x)
    peftkern.adapt(model, BottleneckConfig(r=2, target_modules=["0"]))
    out = model(x)
    assert type(out) is type(plain) and torch.equal(out[0], plain[0]) and out[1] == "rest"


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
    quantise(model)
    disturb(peftkern.adapt(model, BottleneckConfig(r=4)))
    fc1, fc2 = model.encoder.layers[0].fc1, model.encoder.layers[0].fc2
    before = type(fc1), type(fc2)
    report = peftkern.optimize(model)
    assert {"encoder.layers.0.fc1", "encoder.layers.0.fc2"} <= {s.name for s in report.skipped}
    assert (type(fc1), type(fc2)) == before
    call(model).sum().backward()
    assert fc2.adapter.up.grad.any()


def test_restoring_takes_our_kernels_out_and_leaves_what_is_attached(bnb):
    models = []
    for optimized in (False, True):
        model, call, _ = build("whisper")
        quantise(model)
        if optimized:
            peftkern.optimize(model)
        models.append(disturb(peftkern.adapt(model, BottleneckConfig(r=4))))
    wanted, model = call(models[0]), models[1]
    fc1, fc2 = model.encoder.layers[0].fc1, model.encoder.layers[0].fc2
    assert isinstance(fc1, _swapped.Swapped) and isinstance(fc2, _swapped.Swapped)
    peftkern.restore(model)
    assert not any(isinstance(m, _swapped.Swapped) for m in model.modules())
    assert torch.equal(call(model), wanted)
