"""What the processes of test_sparse_distributed.py do, in a module that they can import."""

import torch
from sparse_models import batches, dense, loss_of, zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peftkern.sparse import Id3AdamW, SaraAdamW

STEPS = batches(5)


def part(batch, rank, count):
    size = batch.shape[1] // count
    return batch[:, rank * size : (rank + 1) * size]


def sara(rank, count, clip=0.05):
    """Reselects after two of five steps; -> the weights, and how many entries were left."""
    model = zoo(torch.float64)
    # So small a threshold that steps of 0.01 leave many behind.
    optimizer = SaraAdamW(model, 0.1, lr=1e-2, progressive_iter=2)
    wrapped = DistributedDataParallel(model) if count > 1 else model
    for batch in STEPS:
        loss_of(wrapped, part(batch, rank, count)).backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return dense(model)


def id3(rank, count, alike):
    """Every process with the same batches, or with a part of each; -> weights and patterns."""
    model = zoo(torch.float64)
    optimizer = Id3AdamW(model, 103, 4, lr=1e-2)
    for batch in STEPS:
        loss_of(model, batch if alike else part(batch, rank, count)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.selected <= 103
    return dense(model), [(s.name, s.pattern.nnz, s.pattern.hash) for s in optimizer.supports]
