"""A model of every kind of parameter, its training on supports, and dense AdamW beside it."""

import copy

import torch
from torch import nn

from peftkern.sparse import Pattern
from peftkern.sparse.support import supports


class Zoo(nn.Module):
    """An embedding, a convolution, a norm, linears of which two share a weight, and a loose one."""

    def __init__(self, width=12, vocabulary=10, tied=False):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.loose = nn.Parameter(torch.randn(width))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.down(self.up(self.norm(x)).relu()) * self.loose
        return self.head(x)


def zoo(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return Zoo(**options).to(dtype)


def batches(count=3, size=4, length=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, (count, 2, size, length), generator=generator)


BATCHES = batches()


def loss_of(model, batch):
    tokens, targets = batch
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model, optimizer, steps=BATCHES, clip=None, parts=1):
    losses = []
    for batch in steps:
        total = 0.0
        for part in batch.chunk(parts, 1):
            loss = loss_of(model, part) / parts
            loss.backward()
            total += loss.detach()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.stack(losses)


def chosen(model, density=0.3, seed=5):
    """A pattern for every parameter, tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Pattern.from_mask(torch.rand(p.shape, generator=generator) < density)
        for name, p in model.named_parameters()
    }


def trained(model, **options):
    """The model itself, its values trained by an ordinary AdamW and written."""
    values = [support.values for support in supports(model)]
    train(model, torch.optim.AdamW(values, **{"weight_decay": 0.0, **options}))
    for support in supports(model):
        support.write()
    return model


def dense(model):
    """Every parameter of a model by its name, values of supports aside."""
    return {n: p for n, p in model.state_dict().items() if "_sparse" not in n}


def masked_training(model, masks, steps=BATCHES, clip=None, **options):
    """AdamW on everything, whose gradient is zero off the masks; -> a trained copy."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), **{"weight_decay": 0.0, **options})
    for batch in steps:
        loss_of(model, batch).backward()
        for name, parameter in model.named_parameters():
            parameter.grad.mul_(masks[name].view_as(parameter))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
