"""Merging a layer: the sum rounded once, the loss told as it is, every bit back by unmerging."""

import copy
import pickle

import pytest
import torch
from close import assert_as_good
from hypothesis import given
from hypothesis import strategies as st
from merges import WARNS, WAYS, dense, make, truth
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftkern import LoraConfig, QLoRALinear
from peftkern.qlora import merging, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[merging.PANEL, 200], ids=["whole", "panels"])
def panel(request, monkeypatch):
    monkeypatch.setattr(merging, "PANEL", request.param)


@pytest.mark.parametrize("into", [None, *DTYPES])
@pytest.mark.parametrize("base", [*DTYPES, "nf4"])
@given(rows=st.integers(1, 40), columns=st.integers(1, 130), r=st.integers(1, 9))
def test_a_float_weight_holds_the_sum_rounded_once(panel, base, into, rows, columns, r):
    if base == "nf4":
        into = into or torch.bfloat16
        layer = make(rows, columns, base, r=r, block_size=16)
    else:
        layer = make(rows, columns, dtype=base, r=r)
    wanted = truth(layer)
    layer.merge(dtype=into)
    assert layer.quantized_weight is None and layer.weight.dtype == (into or base)
    unit = torch.finfo(layer.weight.dtype).eps / 2
    float32 = 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
    bound = unit * wanted.abs() + (0 if layer.weight.dtype == torch.float64 else float32)
    assert ((layer.weight.double() - wanted).abs() <= bound + 2**-25 + 1e-15).all()


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    block_size=st.sampled_from([16, 64, 256]),
    nested=st.booleans(),
)
@pytest.mark.filterwarnings(WARNS)
def test_a_quantised_weight_holds_the_sum_quantised(panel, rows, columns, block_size, nested):
    layer = make(rows, columns, "nf4", block_size=block_size, nested=nested)
    wanted = quantize(truth(layer).float(), "nf4", block_size, nested)
    old = layer.quantized_weight
    layer.merge(requantize=True)
    new = layer.quantized_weight
    assert all(map(torch.equal, new.buffers, wanted.buffers)) and new.packed is layer.weight
    for name in ("shape", "dtype", "format", "block_size", "nested"):
        assert getattr(new, name) == getattr(old, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(WARNS)
def test_a_merged_layer_is_the_plain_linear_of_its_weight(way, dtype):
    base, options = WAYS[way]
    layer, x = make(base=base), torch.randn(5, 64).to(dtype)
    layer.merge(**options)
    y, tensors = layer(x), (x, dense(layer), layer.bias)
    assert_as_good(
        y, lambda x, w, b: nn.functional.linear(x, *(t.to(x.dtype) for t in (w, b))), *tensors
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings(WARNS)
def test_unmerging_gives_back_the_very_parameter_and_its_bits(way, nested):
    base, options = WAYS[way]
    layer, x = make(base=base, nested=nested), torch.randn(5, 64)
    before, old, y = copy.deepcopy(layer.state_dict()), layer.base, layer(x)
    weight = layer.weight
    layer.merge(**options)
    assert layer.merged and layer.weight is not weight and not torch.equal(layer(x), y)
    layer.unmerge()
    assert not layer.merged and layer.weight is weight and torch.equal(layer(x), y)
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    if base:
        assert all(a is b for a, b in zip(layer.base.buffers, old.buffers, strict=True))


def test_a_sum_that_overflows_is_not_merged():
    layer = make(dtype=torch.float16)
    with torch.no_grad():
        layer.lora_B.fill_(60000)
    with pytest.raises(ValueError, match="^layer must have a finite weight once merged"):
        layer.merge()
    layer.merge(dtype=torch.float32)


# What 4 bits keep of a small change.


def of_size(share, width=1024, r=8):
    """A layer whose low-rank term is `share` times its base, in the norm."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(width, width) / 32, "nf4", 64)
    layer = QLoRALinear(weight, None, LoraConfig(r=r, init_lora_weights=False))
    with torch.no_grad():
        nn.init.normal_(layer.lora_A)
        change = layer.scaling * layer.lora_B @ layer.lora_A
        layer.lora_B.mul_(share * dense(layer).norm() / change.norm())
    return layer


@pytest.mark.parametrize(
    ("share", "error", "cosine"),
    [(0.001, 1.07, 0.04), (0.01, 1.07, 0.04), (0.02, 1.07, 0.04), (0.1, 0.78, 0.74)],
)
def test_4_bits_erase_a_small_change_and_the_loss_says_so(panel, share, error, cosine):
    layer = of_size(share)
    old, wanted = dense(layer), truth(layer)
    with pytest.warns(UserWarning, match="requantize=True"):
        layer.merge(requantize=True)
    new, change = dense(layer).double(), wanted - old
    loss = layer.original.loss
    assert loss.error == pytest.approx(((new - wanted).norm() / change.norm()).item(), rel=1e-3)
    kept = torch.cosine_similarity((new - old).flatten(), change.flatten(), dim=0)
    assert loss.cosine == pytest.approx(kept.item(), rel=1e-3)
    assert loss.error == pytest.approx(error, abs=0.03)
    assert loss.cosine == pytest.approx(cosine, abs=0.02)


class Largest(TorchDispatchMode):
    """The most elements of a float tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.filterwarnings(WARNS)
def test_no_more_than_a_panel_is_dense(monkeypatch):
    monkeypatch.setattr(merging, "PANEL", 1 << 14)
    layer, other = make(512, 512, "nf4"), make(512, 512, "nf4", merge_aware=True)
    x = torch.randn(2, 512)
    for run in (lambda: layer.merge(requantize=True), lambda: other(x)):
        with Largest() as largest:
            run()
        assert largest.elements == 1 << 14


def test_a_float_weight_keeps_the_small_change():
    layer = of_size(0.01)
    old, wanted = dense(layer), truth(layer)
    layer.merge(dtype=torch.float32)
    change = wanted - old
    assert (layer.weight - old - change).norm() < 1e-4 * change.norm()


# Copies, devices, casts and compilers.


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(WARNS)
def test_a_copy_of_a_merged_layer_is_merged_and_comes_back_too(way, copied):
    base, options = WAYS[way]
    layer, x = make(base=base), torch.randn(3, 64)
    y = layer(x)
    layer.merge(**options)
    twin = copied(layer)
    assert twin.merged and torch.equal(twin(x), layer(x))
    twin.unmerge()
    assert torch.equal(twin(x), y) and layer.merged
    if base:
        assert twin.quantized_weight.packed is twin.weight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(WARNS)
def test_the_original_moves_along(way, device):
    base, options = WAYS[way]
    layer, other = make(base=base), make(base=base).double().to(device)
    weight = layer.weight
    layer.merge(**options)
    layer.double().to(device)
    layer.unmerge()
    assert layer.weight is weight or device.type != "cpu"
    assert layer.weight.dtype == other.weight.dtype
    x = torch.randn(3, 64, dtype=torch.float64, device=device)
    assert torch.equal(layer(x), other(x))
    layer.merge(**options)
    layer.to("meta").unmerge()
    assert layer.weight.device.type == "meta"
    if base:
        assert {t.device.type for t in layer.base.buffers} == {"meta"}
        assert layer.base.packed is layer.weight


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(WARNS)
def test_merging_under_autocast_loses_no_bits(way):
    base, options = WAYS[way]
    layer, other = make(base=base), make(base=base)
    for each in (layer, other):  # so that 16 bits do not hold the products
        each.lora_A.data.mul_(0.3)
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge(**options)
        y = layer(torch.ones(2, 64))
    other.merge(**options)
    assert torch.equal(dense(layer), dense(other)) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(WARNS)
def test_merging_in_inference_mode_leaves_an_ordinary_weight(way):
    base, options = WAYS[way]
    layer, x = make(base=base), torch.randn(3, 64, requires_grad=True)
    with torch.inference_mode():
        layer.merge(**options)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(layer).float().sum(0).expand(3, -1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(WARNS)
def test_a_compiled_layer_follows_its_merge(way):
    base, options = WAYS[way]
    layer, x = make(base=base), torch.randn(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    layer.merge(**options)
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(compiled(x), y)
    layer.unmerge()
    assert torch.equal(compiled(x), y)
