"""sparse's gradient against a dense one that is gathered, and torch.sparse.sampled_addmm.

Operations: 2 M a value. Traffic: x and grad are read once, values are written once; a dense
gradient is as large as the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from peftkern import sparse
from peftkern.sparse import Pattern

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .row import Row

SIZE, TOKENS, DENSITIES = 4096, 512, (0.001, 0.01, 0.1, 0.3, 0.5)
DTYPES = (torch.float32, torch.bfloat16)
BF16 = "dW rounded to bfloat16"


def patterns(density: float) -> Pattern:
    generator = torch.Generator().manual_seed(1)
    return Pattern.from_mask(torch.rand(SIZE, SIZE, generator=generator) < density)


def contenders(found: Pattern, dtype: torch.dtype) -> dict[str, Contender]:
    rows, columns = found.indices().long()
    places, mask = rows * SIZE + columns, found.mask()

    def ours() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, grad: sparse.sddmm(x, grad, found)

    def by_index() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, grad: (grad.t() @ x).view(-1)[places].float()

    def by_mask() -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, grad: (grad.t() @ x)[mask].float()

    def sampled_addmm() -> Callable[[Tensor, Tensor], Tensor]:
        row_start, columns = (t.long() for t in found.csr().tensors)
        zero = torch.sparse_csr_tensor(row_start, columns, torch.zeros(found.nnz), (SIZE, SIZE))
        return lambda x, grad: torch.sparse.sampled_addmm(zero, grad.t(), x, beta=0.0).values()

    inexact = (BF16, 1e-2) if dtype == torch.bfloat16 else ("", 0.0)
    entrants = {
        "peftkern": Contender(ours),
        "dense dW, gathered by index": Contender(by_index, *inexact),
        "dense dW, gathered by mask": Contender(by_mask, *inexact),
    }
    if dtype == torch.float32:  # it takes no bfloat16
        entrants["torch.sparse.sampled_addmm"] = Contender(sampled_addmm)
    return entrants


def gradients(quick: bool) -> Iterator[Row]:
    for dtype in DTYPES:
        for density in DENSITIES:
            found = patterns(density)
            generator = torch.Generator().manual_seed(0)
            drawn = [
                tuple(torch.randn(TOKENS, SIZE, generator=generator).to(dtype) for _ in range(2))
                for _ in range(2)
            ]
            indices = found.indices()

            def plain(x: Tensor, grad: Tensor, indices: Tensor = indices) -> Tensor:
                rows, columns = indices.long()
                sums = torch.promote_types(x.dtype, torch.float32)
                return (grad.to(sums).t() @ x.to(sums))[rows, columns]

            name = str(dtype).removeprefix("torch.")
            read = 2 * TOKENS * SIZE * drawn[0][0].element_size()
            yield from measure(
                "sparse", "sddmm", f"{SIZE} x {SIZE}, {TOKENS} tokens, {density:.1%}, {name}",
                contenders(found, dtype), [Inputs((), pair) for pair in drawn], plain,
                baseline="peftkern", direction="backward", quick=quick,
                work=Work(read, 4 * found.nnz, 2 * TOKENS * found.nnz),
            )  # fmt: skip


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be cpu for sparse, got {device}")
    yield from gradients(quick)
