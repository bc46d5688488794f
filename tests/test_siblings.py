"""Are layers that read one input found, and is each still what it is alone?"""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import LoraConfig
from peftkern._siblings import groups


class Attention(nn.Module):
    """q, k and v of one input; k and v of another one too, if there is another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 16), nn.Linear(32, 8), nn.Linear(32, 8)
        self.gate = nn.Linear(32, 32)
        self.out = nn.Linear(32, 32)

    def forward(self, x):
        q = self.q(x)
        k, v = self.k(x), self.v(x)
        y = torch.cat([q, k * v, k], -1)
        x = x * 2
        return self.out(y) + self.gate(x)


class Cross(Attention):
    def forward(self, x, other=None):
        if other is None:
            states = x
        else:
            states = other
        q, k = self.q(x), self.k(states)
        return torch.cat([q, k * self.v(states), k], -1)


class Choosing(Attention):
    def forward(self, x):
        if x.sum() > 0:
            return self.q(x)
        else:
            return self.k(x)


class InPlace(Attention):
    """What its source says of x is not all that happens to it."""

    def forward(self, x):
        q = self.q(x)
        x.add_(1)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def model(kind=Attention, **options):
    torch.manual_seed(0)
    return filled(peftkern.adapt(kind(), LoraConfig(r=4, base="nf4", **options)))


def filled(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def parted(model):
    """A copy whose layers know nothing of each other."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if getattr(layer, "shared_input", None) is not None:
            layer.shared_input = None
    return model


def step(model, *inputs):
    """Output, and gradients of the inputs and of all that trains."""
    torch.manual_seed(1)
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = model(*inputs)
    y.square().sum().backward()
    return [y, *(x.grad for x in inputs), *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_alike(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def names_of(model):
    names = {layer: name for name, layer in model.named_modules()}
    linear = lambda module: isinstance(module, nn.Linear)  # noqa: E731
    return [[names[layer] for layer in group] for group in groups(model, linear)]


def test_the_groups_are_those_of_the_code():
    assert names_of(Attention()) == [["q", "k", "v"]]
    assert names_of(Cross()) == [["k", "v"]]
    assert names_of(Choosing()) == []
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=16)
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    llama = names_of(transformers.LlamaModel(config))
    assert ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"] in llama
    assert [f"layers.0.self_attn.{x}_proj" for x in "qkv"] in llama


@pytest.mark.parametrize("kind", [Attention, Cross])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"init_lora_weights": "olora"}])
def test_together_is_what_each_is_alone(kind, options):
    shared = model(kind, **options)
    alone = parted(shared)
    x = torch.randn(2, 5, 32)
    for _ in range(2):
        assert_alike(step(shared, x), step(alone, x))
    assert shared.k.shared_input._made is None  # nothing is kept that nobody asks for


def test_an_input_that_has_changed_is_another_one():
    shared, x = model(InPlace), torch.randn(4, 32)
    assert torch.equal(shared(x.clone()), parted(shared)(x.clone()))


def test_a_group_that_is_wrong_at_times_is_right_all_the_same():
    shared = model(Cross)
    alone = parted(shared)
    x, other = torch.randn(4, 32), torch.randn(4, 32)
    for inputs in ((x, other), (x,), (other, x)):
        assert_alike(step(shared, *inputs), step(alone, *inputs))
    first = shared.k(x)  # and nobody asks for v
    assert torch.equal(first, alone.k(x)) and torch.equal(shared.v(other), alone.v(other))


def test_the_work_is_done_once(monkeypatch):
    calls = []
    op = torch.ops.peftkern.qlora_siblings.default
    module = peftkern.qlora.siblings
    monkeypatch.setattr(module, "_siblings_op", lambda *a: calls.append(len(a[5])) or op(*a))
    shared = model()
    step(shared, torch.randn(4, 32))
    assert calls == [3]
    with torch.no_grad():
        shared(torch.randn(4, 32))
    assert calls == [3]


@pytest.mark.parametrize("option", ["use_dora", "merge_aware"])
def test_another_forward_stays_alone(option):
    shared = model(**{option: True})
    x = torch.randn(4, 32)
    assert_alike(step(shared, x), step(parted(shared), x))
    plain = model()
    plain.k.lora_A.requires_grad_(False)
    plain.k.lora_B.requires_grad_(False)
    plain.k.merge(dtype=torch.float32)
    assert plain.q.shared_input.forward(plain.q, x) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    shared = model(lora_dropout=0.5)
    x = torch.randn(4, 32)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = shared

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    assert_alike(step(Checkpointed(), x), step(parted(shared), x))


class Drawing(Attention):
    """As one whose activations have a dropout of their own in between."""

    def forward(self, x):
        q = self.q(x)
        noise = torch.rand(q.shape)
        return torch.cat([q * noise, self.k(x), self.v(x)], -1)


def test_seeds_are_those_of_each_alone_where_nothing_else_is_drawn():
    shared, x = model(lora_dropout=0.5), torch.randn(4, 32)
    states = []
    for one in (shared, parted(shared)):
        y = step(one, x)[0]
        states.append((y, torch.get_rng_state()))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


def test_seeds_are_drawn_before_what_is_drawn_in_between():
    """Then elements are dropped that each alone would keep, at the same rate; and nothing of that
    is lost or made twice: a replay drops the same, and so does backward.
    """
    shared, x = model(Drawing, lora_dropout=0.5), torch.randn(400, 32)
    alone = parted(shared)
    y, grad_x, *_ = step(shared, x)
    first = slice(0, 16)
    torch.manual_seed(1)
    q, k, v = (alone.get_submodule(n)(x) for n in "qkv")  # seeds one after the other
    noise = torch.rand(400, 16)
    assert torch.equal(y, torch.cat([q * noise, k, v], -1))
    other = step(alone, x)[0]
    assert not torch.equal(y[:, first], other[:, first]) and not torch.equal(y, other)
    plain = step(alone.eval(), x)[0]
    spreads = [(t - plain)[:, 16:].std().item() for t in (y, other)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)
    replayed = checkpoint_step(shared, x)
    assert_alike(replayed, [y, grad_x])


def checkpoint_step(shared, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = checkpoint(shared, x, use_reentrant=False)
    y.square().sum().backward()
    return [y, x.grad]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_find_together_again(how):
    shared = model()
    if how == "deepcopy":
        other = copy.deepcopy(shared)
    else:
        buffer = io.BytesIO()
        torch.save(shared, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.q.shared_input.members == [other.q, other.k, other.v]
    assert shared.q.shared_input.members == [shared.q, shared.k, shared.v]
    x = torch.randn(4, 32)
    assert_alike(step(other, x), step(shared, x))
    assert copy.deepcopy(shared.q).shared_input.members != shared.q.shared_input.members


def test_a_group_keeps_no_layer_alive():
    shared = model()
    q = weakref.ref(shared.q)
    gc.disable()
    try:
        k = shared.k
        del shared
        assert q() is None and k.shared_input.members == [k]
    finally:
        gc.enable()


def test_the_report_tells_of_it():
    report = peftkern.report(model())
    assert report.shared == [("q", "k", "v")]
    assert "one pass over the input: q + k + v" in str(report)


def test_layers_of_peft_share_their_input_too():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v"])
    theirs = filled(peft.get_peft_model(Attention(), config))
    x = torch.randn(4, 32)
    wanted = step(theirs, x)
    theirs.zero_grad()
    report = peftkern.optimize(theirs)
    assert [len(names) for names in report.shared] == [3]
    assert_alike(step(theirs, x), wanted)
    again = copy.deepcopy(theirs)
    again.zero_grad()
    q = again.base_model.model.q
    assert q.shared_input.members[0] is q
    assert_alike(step(again, x), wanted)
    with theirs.disable_adapter():
        step(theirs, x)
    peftkern.restore(theirs)
    assert "shared_input" not in vars(theirs.base_model.model.q)
