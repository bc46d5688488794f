"""The requantised weight of a merge-aware layer: kept while A and B are the same, saved nowhere."""

import copy
import pickle

import pytest
import torch
from merges import aware, requantized
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern import LoraConfig, qlora
from peftkern.qlora import merging


@pytest.fixture
def count(monkeypatch):
    calls, make_parts = [], merging.requantized

    def counted(*args):
        calls.append(1)
        return make_parts(*args)

    monkeypatch.setattr(merging, "requantized", counted)
    return calls


def in_place(layer):
    with torch.no_grad():
        layer.lora_B.add_(0.1)


def behind_the_version(layer):
    layer.lora_A.data.mul_(1.5)


def by_a_step(layer):
    optimizer = torch.optim.SGD([layer.lora_A], lr=0.1)
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()


def another_parameter(layer):
    layer.lora_B = nn.Parameter(layer.lora_B.detach() + 0.1)


def another_scale(layer):
    layer.rescale(LoraConfig(r=4, lora_alpha=7))


def another_state(layer):
    layer.load_state_dict(aware(seed=1).state_dict())


def another_base(layer):
    twin = aware(seed=1)
    with torch.no_grad():
        twin.lora_A.copy_(layer.lora_A)
        twin.lora_B.copy_(layer.lora_B)
    layer.load_state_dict(twin.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        in_place, behind_the_version, by_a_step, another_parameter, another_scale, another_state,
        another_base,
    ],
)  # fmt: skip
def test_a_change_of_any_kind_is_seen(change):
    layer, x = aware(), torch.randn(3, 64)
    y = layer(x)
    change(layer)
    assert torch.equal(layer(x), qlora.linear(x, requantized(layer), layer.bias))
    assert not torch.equal(layer(x), y)


def test_it_is_made_once_for_the_same_adapter(count):
    layer, x = aware(), torch.randn(3, 64)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), y)
    layer.train()(x).sum().backward()
    assert len(count) == 1
    in_place(layer)
    layer(x)
    assert len(count) == 2


def test_nothing_of_it_is_saved():
    layer, plain = aware(), aware(merge_aware=False)
    layer(torch.randn(3, 64))
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert len(pickle.dumps(layer)) < len(pickle.dumps(plain)) + 200


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_sees_the_same_weight_again(reentrant, count):
    def step(run):
        layer, x = aware(), torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        y = run(layer, x)
        y.square().sum().backward()
        return y, x.grad, layer.lora_A.grad, layer.lora_B.grad

    def replayed(layer, x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    assert all(map(torch.equal, step(replayed), step(lambda layer, x: layer(x))))
    assert len(count) == 2  # one a layer


def test_evaluation_in_inference_mode_does_not_disturb_training():
    layer, twin, x = aware(), aware(), torch.randn(3, 64)
    with torch.inference_mode():
        layer.eval()(x)
    for each in (layer.train(), twin):
        each(x).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, twin.lora_A.grad)


# Through torch's machinery.


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_it_compiles_whole_with_the_same_weight(backend, nested):
    layer, x = aware(nested=nested), torch.randn(6, 64, requires_grad=True)
    inputs = [x, layer.lora_A, layer.lora_B]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        results = []
        for run in (layer, compiled):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for eager, whole in zip(*results, strict=True):
            assert torch.equal(eager, whole)
        in_place(layer)  # which the graph must see


@pytest.mark.parametrize("nested", [False, True])
def test_the_op_is_well_registered(nested):
    layer = aware(nested=nested)
    weight, a, b = layer.quantized_weight, layer.lora_A.detach(), layer.lora_B.detach()
    args = (weight.buffers, weight.layout, "nf4", a, b, layer.scaling)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.peftkern.qlora_requantize.default
    torch.library.opcheck(op, args, test_utils=tests)


def test_autocast_rounds_x_and_not_the_weight():
    layer, x = aware(), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    wanted = qlora.linear(x.bfloat16(), requantized(layer), layer.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted)
    y.sum().backward()
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copies_compute_the_same_and_live_apart(copied):
    layer, x = aware(), torch.randn(3, 64)
    y = layer(x)
    twin = copied(layer)
    assert torch.equal(twin(x), y)
    in_place(twin)
    assert not torch.equal(twin(x), y) and torch.equal(layer(x), y)


def test_moving_takes_it_along(device):
    layer, x = aware(), torch.randn(3, 64)
    y = layer(x)
    layer.to(device).double()
    torch.testing.assert_close(layer(x.to(device)).cpu(), y)


def test_the_text_says_so():
    assert repr(aware()).endswith("lora_dropout=0.0, merge_aware=True)")
