"""What the self-check asks of sparse: every op, on either format of a pattern, against its
reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from peftkern import _native, sparse
from peftkern._verdict import Case, Verdict, compare, judge
from peftkern.sparse import ops, reference
from peftkern.sparse.given import KINDS
from peftkern.sparse.pattern import Pattern

# Sizes that end within a vector, a word and a tile; a density at which kernels sample, and one at
# which they may take the whole product.
ROWS, COLUMNS, TOKENS, DENSITIES, SCALE = 37, 150, 40, (0.1, 0.7), 0.5
CHANNELS, WINDOW = 6, [3, 2, 2, 1, 1, 0, 1, 2, 2]  # of a convolution in two groups
DTYPES = (torch.float32, torch.bfloat16)

Verdicts = Callable[..., Iterator[Verdict]]


def cases(device: torch.device) -> Iterator[Case]:
    asked: dict[str, tuple[str, Verdicts]] = {
        "sparse_sddmm": ("sparse.sddmm", _sddmm),
        "sparse_sddmm_": ("sparse.sddmm onto", _sddmm_onto),
        "sparse_gather": ("sparse.gather", _gather),
        "sparse_scatter_": ("sparse.scatter_", _scatter),
        "sparse_matmul": ("sparse_matmul", partial(_matmul, ops.matmul_op, reference.matmul)),
        "sparse_matmul_t": (
            "sparse_matmul_t", partial(_matmul, ops.matmul_t_op, reference.matmul_t),
        ),
        "sparse_conv2d_sddmm": ("sparse_conv2d_sddmm", _conv2d_sddmm),
    }  # fmt: skip
    for op, (words, verdicts) in asked.items():
        for kind in KINDS:
            for dtype in DTYPES:
                name = f"{words} {kind} {str(dtype).removeprefix('torch.')}"
                yield Case(name, (op,), partial(verdicts, kind, dtype, device))
    for dtype in DTYPES:
        name = f"sparse_sample_ csr {str(dtype).removeprefix('torch.')}"
        yield Case(name, ("sparse_sample_",), partial(_sample, dtype, device))


def _sddmm(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    x, grad = _random(1, TOKENS, COLUMNS).to(dtype), _random(2, TOKENS, ROWS).to(dtype)
    for found, indices in _patterns(kind):
        values = sparse.sddmm(x.to(device), grad.to(device), found.to(device), SCALE)
        yield from judge([values], _listed(reference.sddmm), x, grad, indices, SCALE)


def _sddmm_onto(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    x, grad = _random(1, TOKENS, COLUMNS).to(dtype), _random(2, TOKENS, ROWS).to(dtype)

    def plain(x: Tensor, grad: Tensor, onto: Tensor, indices: Tensor) -> list[Tensor]:
        return [onto + reference.sddmm(x, grad, indices, SCALE)]

    for found, indices in _patterns(kind):
        start = _random(3, found.nnz)
        onto = start.to(device, copy=True)
        sparse.sddmm(x.to(device), grad.to(device), found.to(device), SCALE, onto)
        yield from judge([onto], plain, x, grad, start, indices)


def _sample(dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    """What a GPU's launchers of both call for few entries."""
    x, grad = _random(1, TOKENS, COLUMNS).to(dtype), _random(2, TOKENS, ROWS).to(dtype)
    for found, indices in _patterns("csr"):
        values = torch.full([found.nnz], torch.nan, device=device)
        operand = found.to(device).operand()
        torch.ops.peftkern.sparse_sample_(
            values, x.to(device), grad.to(device), *operand, SCALE, False
        )
        yield from judge([values], _listed(reference.sddmm), x, grad, indices, SCALE)


def _gather(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    weight = _random(1, ROWS, COLUMNS).to(dtype)
    for found, indices in _patterns(kind):
        values = sparse.gather(weight.to(device), found.to(device))
        yield compare(values, reference.gather(weight, indices))


def _scatter(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    for found, indices in _patterns(kind):
        weight, values = _random(1, ROWS, COLUMNS).to(dtype), _random(2, found.nnz)
        there = weight.to(device, copy=True)
        sparse.scatter_(there, values.to(device), found.to(device))
        yield compare(there, reference.scatter(weight, values, indices))


def _matmul(
    op: Callable[..., Tensor], plain: Callable[..., Tensor], kind: str, dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Verdict]:  # fmt: skip
    sides = _random(1, TOKENS, COLUMNS).to(dtype), _random(2, TOKENS, ROWS).to(dtype)
    left, beside = sides if plain is reference.matmul else sides[::-1]
    for found, indices in _patterns(kind):
        values = _random(3, found.nnz)
        operand = found.to(device).operand()
        out = op(left.to(device), values.to(device), *operand, beside.to(device), SCALE)
        rest = (left, values, indices, found.shape, beside, SCALE)
        yield from judge([out], _listed(plain), *rest)


def _conv2d_sddmm(kind: str, dtype: torch.dtype, device: torch.device) -> Iterator[Verdict]:
    kh, kw, sh, sw, ph, pw, dh, dw, groups = WINDOW
    x, weight = _random(1, 2, CHANNELS, 9, 8), _random(2, 4, CHANNELS // groups, kh, kw)
    y = torch.nn.functional.conv2d(x, weight, None, (sh, sw), (ph, pw), (dh, dw), groups)
    x, grad = x.to(dtype), _random(3, *y.shape).to(dtype)
    for found, indices in _patterns(kind, 4, weight[0].numel()):
        operand = found.to(device).operand()
        values = ops.conv2d_sddmm_op(x.to(device), grad.to(device), *operand, WINDOW, SCALE)
        rest = (x, grad, indices, WINDOW, SCALE)
        yield from judge([values], _listed(reference.conv2d_sddmm), *rest)


def _patterns(
    kind: str, rows: int = ROWS, columns: int = COLUMNS
) -> Iterator[tuple[Pattern, Tensor]]:
    """And their indices; made by references, so that a wrong kernel spoils its own lines alone."""
    for density in DENSITIES:
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(4)) < density
        with _native.Instead(_native.references):
            found = Pattern.from_mask(mask, kind)
            indices = found.indices()
        yield found, indices


def _listed(plain: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda *args: [plain(*args)]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
