"""Parameters of any module on a support: what they compute, their gradient, and how they train."""

import copy

import pytest
import torch
from sparse_models import BATCHES, chosen, masked_training, trained, zoo
from sparses import normal
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftkern.sparse import Pattern, SparseConv2d, SparseLinear
from peftkern.sparse.state import take
from peftkern.sparse.support import attach, detach, supports


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def transposed():
    utils = pytest.importorskip("transformers.pytorch_utils", reason="adapts transformers' Conv1D")
    return utils.Conv1D(6, 8)


IMAGES = (2, 4, 9, 7)
MODULES = {
    "linear": (lambda: nn.Linear(8, 6), (5, 8)),
    "three axes": (lambda: nn.Linear(8, 6, bias=False), (2, 3, 8)),
    "a row": (lambda: nn.Linear(8, 6), (8,)),
    "Conv1D": (transposed, (2, 3, 8)),
    "norm": (lambda: nn.LayerNorm(8), (5, 8)),
    "bilinear": (lambda: nn.PReLU(8), (5, 8)),
    "attention": (lambda: Attention(8, 2, batch_first=True), (2, 3, 8)),
    "recurrent": (lambda: Recurrent(8, 4, 2, bidirectional=True), (2, 3, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1), IMAGES),
    "groups": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 2), groups=2), IMAGES),
    "same": (lambda: nn.Conv2d(4, 6, 2, padding="same"), IMAGES),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), IMAGES),
    "no batch": (lambda: nn.Conv2d(4, 6, 3), IMAGES[1:]),
    "channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), IMAGES),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (1, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("build, shape", MODULES.values(), ids=MODULES)
def test_every_module_has_the_dense_gradient_on_its_support_and_no_other(build, shape):
    torch.manual_seed(0)
    module = build().double()
    dense = copy.deepcopy(module)
    selection = chosen(module)
    attach(module, selection)
    x = normal(1, *shape, dtype=torch.float64).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, wanted = module(x), dense(other)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    grad = normal(2, *y.shape, dtype=torch.float64)
    y.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in dense.named_parameters()}
    assert [s.name for s in supports(module)] == list(selection)
    for support in supports(module):
        on_support = take(gradients[support.name], support.pattern)
        torch.testing.assert_close(support.values.grad, on_support, rtol=1e-12, atol=1e-12)
        assert support.weight.grad is None and not support.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_an_ordinary_optimizer_trains_as_dense_adamw_with_masked_gradients(tied):
    model = zoo(torch.float64, tied=tied)
    selection = chosen(model)
    masks = {name: pattern.mask() for name, pattern in selection.items()}
    wanted = masked_training(model, masks, lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    attach(model, selection)
    trained(model, lr=1e-2)
    found = model.state_dict()
    for name, tensor in wanted.named_parameters():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-12, atol=1e-12)
        off = ~masks[name].view_as(tensor)
        assert torch.equal(found[name][off], before[name][off])
    if tied:
        assert model.head._parameters["weight"] is model.embed._parameters["weight"]
        assert len(supports(model)) == len(selection)


def test_of_sixteen_bits_the_values_stay_wide_and_the_weight_is_their_rounding():
    model = zoo().bfloat16()
    attach(model, chosen(model))
    trained(model, lr=1e-4)
    moved = 0
    for support in supports(model):
        assert support.values.dtype == torch.float32
        held = take(support.weight, support.pattern)
        assert torch.equal(held, support.values.detach().bfloat16())
        moved += int((support.values.detach() != held.float()).sum())
    assert moved > 0


def test_the_dense_gradient_of_a_linear_never_exists():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = out if isinstance(out, (tuple, list)) else [out]
            if "t.default" not in str(func) and "detach" not in str(func):
                sizes = (t.numel() for t in found if isinstance(t, torch.Tensor))
                self.size = max([self.size, *sizes])
            return out

    linear = nn.Linear(96, 80)
    attach(linear, {"weight": Pattern.from_mask(torch.rand(80, 96) < 0.1)})
    x = torch.randn(7, 96, requires_grad=True)
    with Largest() as largest:
        linear(x).sum().backward()
    assert 0 < largest.size < 80 * 96


def test_a_step_between_forward_and_backward_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    attach(model, chosen(model))
    x = torch.randn(3, 8)
    loss = model(x).sum()
    with torch.no_grad():
        for support in supports(model):
            support.values.add_(1)
    model(x)  # writes
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_it_compiles_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    attach(model, chosen(model))
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second time on values that have moved
        x = torch.randn(4, 8)
        for run, owner in ((compiled, model), (other, other)):
            for support in supports(owner):
                support.values.grad = None
            run(x).square().sum().backward()
        torch.testing.assert_close(compiled(x), other(x))
        for mine, theirs in zip(supports(model), supports(other), strict=True):
            torch.testing.assert_close(mine.values.grad, theirs.values.grad)
            with torch.no_grad():
                mine.values.sub_(mine.values.grad, alpha=1e-2)
                theirs.values.sub_(theirs.values.grad, alpha=1e-2)


def test_under_autocast_the_values_have_wide_gradients():
    linear = nn.Linear(16, 12)
    attach(linear, chosen(linear))
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for support in supports(linear):
        assert support.values.grad.dtype == torch.float32
        assert support.values.grad.abs().max() > 0


def test_activation_checkpointing_gives_the_same_gradients():
    model = zoo()
    attach(model, chosen(model))
    tokens, targets = BATCHES[0]
    grads = []
    for run in (model, lambda t: checkpoint(model, t, use_reentrant=False)):
        for support in supports(model):
            support.values.grad = None
        nn.functional.cross_entropy(run(tokens).flatten(0, 1), targets.flatten()).backward()
        grads.append([s.values.grad.clone() for s in supports(model)])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("build, shape", [MODULES["linear"], MODULES["conv2d"], MODULES["conv1d"]])
def test_a_delta_is_added_and_never_written(build, shape):
    torch.manual_seed(0)
    module = build().double()
    before = module.weight.detach().clone()
    (support,) = attach(module, {"weight": chosen(module)["weight"]}, "delta")
    x = normal(1, *shape, dtype=torch.float64)
    plain = copy.deepcopy(module)(x)
    with torch.no_grad():
        support.values.copy_(normal(3, support.pattern.nnz, dtype=torch.float64))
        dense = copy.deepcopy(module)
        detach(supports(dense)[0], dense)
        assert torch.equal(dense(x), plain)
        dense.weight.view(support.pattern.shape)[support.pattern.mask()] += support.values
    torch.testing.assert_close(module(x), dense(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(module.weight, before)


def test_a_layer_from_a_module_shares_its_parameters():
    linear, conv = nn.Linear(8, 6), nn.Conv2d(4, 6, 3)
    layer = SparseLinear.from_linear(linear, {"weight": torch.rand(6, 8) < 0.5})
    image = SparseConv2d.from_conv2d(conv, {"weight": torch.rand(6, 4, 3, 3) < 0.5})
    assert type(linear) is nn.Linear and type(layer) is SparseLinear and type(image) is SparseConv2d
    assert layer._parameters["weight"] is linear.weight and list(linear._parameters) == [
        "weight", "bias",
    ]  # fmt: skip
    x, y = torch.randn(3, 8), torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), linear(x)) and torch.equal(image(y), conv(y))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["weight_sparse"]
