"""Models for 1-bit adapters, the published module in plain torch, and a count of our ops."""

from collections import Counter

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import peftkern
from peftkern import onebit
from peftkern.onebit import reference


class Published(nn.Module):
    """A linear that trains through its quantiser, step by step as it was published."""

    def __init__(self, latent, bits=1):
        super().__init__()
        self.weight = nn.Parameter(latent.detach().clone())
        self.bits = bits

    def forward(self, x):
        return nn.functional.linear(x, reference.quantize(self.weight, self.bits))


class Branch(nn.Module):
    """The published branch, with the latents of one of ours."""

    def __init__(self, adapter):
        super().__init__()
        self.down, self.up = (Published(w, adapter.bits) for w in (adapter.down, adapter.up))
        self.relu, self.scale = adapter.activation == "relu", adapter.scale

    def forward(self, x):
        hidden = self.down(x)
        return self.scale * self.up(hidden.relu() if self.relu else hidden)


class Block(nn.Module):
    """Of a vision transformer: a norm before each of two sums, and a drop path."""

    def __init__(self, width=16):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.drop_path = nn.Dropout1d(0.0)
        self.branch = None  # the published one, where the test is about that

    def forward(self, x):
        x = x + self.drop_path(self.mix(self.norm1(x)))
        y = x + self.drop_path(self.mlp(self.norm2(x)))
        return y if self.branch is None else y + self.branch(x)


def blocks(count=2, width=16):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(count)), nn.Linear(width, 3))


def config(placement, **options):
    own = {"blocks": {"Block": "norm2"}} if placement == "adaptformer" else {}
    return onebit.OneBitConfig(**{"r": 4, "scale": 3.0, "placement": placement, **own, **options})


def adapted(placement, **options):
    """Two models of the same weights: with our adapters, and with the published ones."""
    model = blocks()
    peftkern.adapt(model, config(placement, **options))
    theirs = blocks().requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, onebit.OneBitAdapter):
            theirs.get_submodule(name.removesuffix(".adapter")).branch = Branch(module)
        elif isinstance(module, onebit.OneBitLinear):
            parent, _, child = name.rpartition(".")
            linear = theirs.get_submodule(name)
            setattr(theirs.get_submodule(parent), child, Beside(linear, Branch(module)))
    return model, theirs


class Beside(nn.Module):
    def __init__(self, linear, branch):
        super().__init__()
        self.linear, self.branch = linear, branch

    def forward(self, x):
        return self.linear(x) + self.branch(x)


def latents(model):
    return [p for p in model.parameters() if p.requires_grad]


def x_of(width=16, *, rows=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, rows, width, generator=generator).to(dtype)


def shifted(placement, seed=1, **options):
    """Trained, for what that matters: no latent is as it was drawn."""
    model = blocks()
    torch.manual_seed(seed)
    peftkern.adapt(model, config(placement, **options))
    with torch.no_grad():
        for layer in pairs(model):
            for latent in (layer.down, layer.up):
                latent.add_(torch.randn_like(latent) * 0.02 + 0.004)
    return model


def evaluated(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return model.eval()(torch.randn(2, 5, 16, generator=generator))


def pairs(model):
    layers = (onebit.OneBitAdapter, onebit.OneBitLinear)
    return [module for module in model.modules() if isinstance(module, layers)]


class Ops(TorchDispatchMode):
    """Counts the ops of ours that are called while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "peftkern":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def trained(placement, path, wrap=None):
    """Three steps, saved; -> what the model gives then."""
    model = blocks()
    torch.manual_seed(1)
    peftkern.adapt(model, config(placement))
    wrap = wrap or (lambda model: model)
    model = wrap(model)
    optimizer = torch.optim.SGD(peftkern.trainable_parameters(model), lr=0.02)
    x = torch.linspace(-2, 2, 160).view(2, 5, 16).sin()
    for _ in range(3):
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peftkern.save_adapter(model, path, latents=True)
    onebit.export_bits(model, f"{path}.bin")
    found = on_both_ways(model.eval(), x)
    model.load_state_dict({name: -value for name, value in model.state_dict().items()})
    assert not torch.equal(on_both_ways(model, x), found)
    return found


def on_both_ways(model, x):
    """What the model gives by its latents, and the same on the bits."""
    with torch.no_grad():
        y = model(x)  # first: a call that trains would drop the bits
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-5, atol=1e-6)
    return y


def trained_in_shards(rank, count, placement, units, path):
    """Every process with the same data, in the place of one."""

    def wrap(model):
        for block in model if units else ():
            fully_shard(block)
        return fully_shard(model)

    return trained(placement, path, wrap)
