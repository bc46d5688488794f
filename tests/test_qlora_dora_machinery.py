"""DoRA in torch's machinery: what it remembers, saves, compiles, replays and rounds."""

import copy
import pickle

import pytest
import torch
from doras import BASES, detached, expected, make, trained
from saved import Saved
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern.qlora import LoraConfig, QLoRALinear, dora


def test_a_change_of_the_weight_or_of_a_and_b_is_noticed():
    layer, x = make().eval(), torch.randn(3, 64)

    def fresh():
        return expected(layer, x, *detached(layer))

    def change(tensor):
        with torch.no_grad():
            tensor.mul_(-1.5)

    def optimiser_of_c():
        """Writes past torch's counters, after a forward that has a gradient."""
        layer(x).sum().backward()
        layer.lora_B.data.mul_(2)

    def other_weight():
        layer.weight = nn.Parameter(torch.randn(24, 64), requires_grad=False)

    changes = [
        lambda: None,
        lambda: change(layer.lora_A),
        lambda: change(layer.lora_B),
        lambda: change(layer.weight),
        lambda: layer.rescale(LoraConfig(lora_alpha=100)),
        optimiser_of_c,
        other_weight,
        lambda: layer.load_state_dict(make(lora_alpha=8).state_dict()),
        lambda: layer.double().float(),
    ]
    for step in changes:
        step()
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(layer(x), fresh())
        torch.testing.assert_close(layer(x), fresh())


def test_generation_computes_the_norms_once(monkeypatch):
    layer, calls = make().eval(), []
    norms = dora.norms
    monkeypatch.setattr(dora, "norms", lambda *args: calls.append(1) or norms(*args))
    with torch.inference_mode():
        for _ in range(3):
            layer(torch.randn(1, 64))
    assert len(calls) == 1
    layer(torch.randn(1, 64)).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("base", BASES)
def test_the_squares_of_the_base_are_computed_once(base, monkeypatch):
    calls, squares = [], dora.squares
    monkeypatch.setattr(dora, "squares", lambda weight: calls.append(1) or squares(weight))
    layer = make(base=base)
    for _ in range(3):
        layer(torch.randn(2, 64)).sum().backward()
    assert len(calls) == 1
    assert not any("norm" in key or "square" in key for key in layer.state_dict())


@pytest.mark.parametrize("base", BASES)
def test_no_dense_weight_is_made_or_kept(base):
    """Neither W + c B A nor an identity: the largest fresh tensor is of the output's size."""
    layer, sizes = make(rows=96, columns=128, base=base), []
    layer(torch.randn(2, 128))  # the squares are there

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            known = {t.data_ptr() for t in layer.parameters()}
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in known:
                    sizes.append(tensor.numel())
            return result

    with Sizes():
        layer(torch.randn(2, 128)).sum().backward()
    assert max(sizes) <= 4 * 128 + 4 * 96  # A and B are larger than the outputs here


def test_saved_for_backward_is_the_product_and_little_else():
    layer = make(bias=True)
    x = torch.randn(20, 64, requires_grad=True)
    with Saved((x, *layer.parameters())) as saved:
        layer(x)
    product, down, gains = 20 * 24 * 4, 20 * layer.r * 4, 2 * 24 * 4  # m / n and 1 / n
    assert saved.bytes == product + down + gains


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("base", BASES)
def test_the_layer_compiles_whole(base, backend):
    layer = make(base=base)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    def assert_same(x):
        results = []
        for run in (compiled, layer):  # the eager one could notice a change for both
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained(layer)])])
        for whole, eager in zip(*results, strict=True):
            torch.testing.assert_close(whole, eager)

    x = torch.randn(6, 64, requires_grad=True)
    assert_same(x)
    with torch.no_grad():
        layer.lora_B.mul_(3)
    assert_same(x)
    torch.manual_seed(5)
    other = QLoRALinear.from_linear(nn.Linear(64, 24), r=4, base=base, use_dora=True)
    layer.load_state_dict(other.state_dict())
    assert_same(x)
    if base is None:
        layer.double()
        assert_same(x.detach().double().requires_grad_())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_dropout_repeats_itself(reentrant):
    layer = make(lora_dropout=0.5)

    def step(run):
        torch.manual_seed(7)
        x = torch.linspace(-1, 1, 20 * 64).view(20, 64).requires_grad_()
        layer.zero_grad()
        run(x).square().sum().backward()
        return x.grad, *(parameter.grad for parameter in trained(layer))

    replayed = step(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, replayed, step(layer)))


@pytest.mark.parametrize("base", BASES)
def test_autocast_computes_in_its_dtype_and_norms_in_float32(base):
    layer = make(base=base)
    x = torch.randn(3, 64, requires_grad=True)
    norms = layer.row_norms()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(layer.row_norms(), norms)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))
    y.float().square().sum().backward()
    assert {parameter.grad.dtype for parameter in trained(layer)} == {torch.float32}
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("base", BASES)
def test_a_copy_lives_apart(base, copied):
    layer = make(base=base).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        twin = copied(layer)
        assert torch.equal(twin(x), before)
        twin.weight.zero_()
        twin.lora_B.mul_(2)
        assert not torch.equal(twin(x), before) and torch.equal(layer(x), before)


def test_the_text_names_it():
    assert "dora=True" in repr(make())
