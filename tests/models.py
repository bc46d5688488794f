"""Small models in the shapes that adapters meet."""

import torch
from torch import nn

import peftkern
from peftkern import LoraConfig, QLoRALinear

EVERYTHING = LoraConfig(
    r=4,
    lora_alpha=6,
    target_modules=["q_proj", "0.down_proj"],
    rank_pattern={"0.q_proj": 2},
    alpha_pattern={"1.q_proj": 5},
)


class Toy(nn.Module):
    """Names like those of language models, an expert router among them."""

    def __init__(self, width=32, vocabulary=24, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width)
        self.gate = nn.Linear(width, 2, bias=False)

    def forward(self, x):
        choice = self.gate(x).softmax(-1)
        hidden = self.gate_proj(x + self.q_proj(x)).relu()
        return x + choice[..., :1] * self.down_proj(hidden)


def toy(seed=0, **options):
    torch.manual_seed(seed)
    return Toy(**options).eval()


def tokens(seed=1, shape=(2, 5)):
    return torch.randint(24, shape, generator=torch.Generator().manual_seed(seed))


def disturb(model, seed=2):
    """As after training: no adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def snapshot(model):
    """Everything of a model that a refusal must leave alone."""
    return (
        [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()],
        set(vars(model)),
    )


def assert_unchanged(model, before):
    modules, parameters, attributes = snapshot(model)
    assert modules == before[0] and attributes == before[2]
    assert len(parameters) == len(before[1])
    for (*facts, value), (*old_facts, old_value) in zip(parameters, before[1], strict=True):
        assert facts == old_facts and torch.equal(value, old_value)


def placed(model):
    return [name for name, module in model.named_modules() if isinstance(module, QLoRALinear)]


def reasons(model):
    return {s.name: s.reason for s in peftkern.report(model).skipped}


def adapted(config=EVERYTHING, seed=2, **options):
    return disturb(peftkern.adapt(toy(**options), config), seed)


def assert_same_outputs(model, other):
    torch.testing.assert_close(model(tokens()), other(tokens()))
