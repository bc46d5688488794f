"""The ops in plain torch, for devices that have no kernel.

A dense gradient is made panel by panel, and S too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftkern.sparse import bits
from peftkern.sparse.pattern import Pattern

_PANEL = 2**22  # elements of a dense matrix that are made at a time


def sddmm(
    x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int], scale: float
) -> Tensor:
    sums = torch.promote_types(x.dtype, torch.float32)
    values = x.new_zeros(layout[3], dtype=sums)
    sddmm_(values, x, grad, pattern, layout, scale)
    return values


def sddmm_(
    values: Tensor, x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    scale: float,
) -> None:  # fmt: skip
    wide = x.to(values.dtype)
    for rows, entries, row, column in _panels(pattern, layout):
        dense = grad[:, rows].to(values.dtype).t() @ wide
        values[entries] += scale * dense[row - rows.start, column]


def sample_(
    values: Tensor, x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    scale: float, add: bool,
) -> None:  # fmt: skip
    sddmm_(values if add else values.zero_(), x, grad, pattern, layout, scale)


def gather(weight: Tensor, pattern: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    sums = torch.promote_types(weight.dtype, torch.float32)
    values = weight.new_empty(layout[3], dtype=sums)
    for _, entries, row, column in _panels(pattern, layout):
        values[entries] = weight[_places(weight, row, column)].to(sums)
    return values


def scatter_(
    weight: Tensor, values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int]
) -> None:
    for _, entries, row, column in _panels(pattern, layout):
        weight[_places(weight, row, column)] = values[entries].to(weight.dtype)


def matmul(
    x: Tensor, values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    residual: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    wide = x.to(values.dtype).flatten(0, -2) if x.dim() > 1 else x.to(values.dtype)[None]
    y = wide.new_zeros(len(wide), layout[1])
    for rows, dense in _dense(values, pattern, layout):
        y[:, rows] = scale * (wide @ dense.t())
    y = y.view(*x.shape[:-1], layout[1])
    return (y if residual is None else residual.to(y.dtype) + y).to(x.dtype)


def matmul_t(
    grad: Tensor, values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    residual: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    wide = grad.to(values.dtype).flatten(0, -2) if grad.dim() > 1 else grad.to(values.dtype)[None]
    x = wide.new_zeros(len(wide), layout[2])
    for rows, dense in _dense(values, pattern, layout):
        x += scale * (wide[:, rows] @ dense)
    x = x.view(*grad.shape[:-1], layout[2])
    return (x if residual is None else residual.to(x.dtype) + x).to(grad.dtype)


def conv2d_sddmm(
    x: Tensor, grad: Tensor, pattern: Sequence[Tensor], layout: Sequence[int],
    window: Sequence[int], scale: float,
) -> Tensor:  # fmt: skip
    """One product for each group and place of the kernel: its inputs are a view of x."""
    kh, kw, sh, sw, ph, pw, dh, dw, groups = window
    sums = torch.promote_types(x.dtype, torch.float32)
    values = x.new_zeros(layout[3], dtype=sums)
    padded = torch.nn.functional.pad(x.to(sums), (pw, pw, ph, ph)).chunk(groups, 1)
    above = grad.to(sums).chunk(groups, 1)
    height, width = grad.shape[2:]
    entries = torch.arange(layout[3], device=x.device)
    rows, columns = Pattern.of(pattern, layout).indices().long()
    per_group = layout[1] // groups
    for group in range(groups):
        for place in range(kh * kw):
            r, s = divmod(place, kw)
            seen = padded[group][:, :, r * dh :, s * dw :][..., ::sh, ::sw][..., :height, :width]
            dense = torch.einsum("bopq,bcpq->oc", above[group], seen)
            here = entries[(columns % (kh * kw) == place) & (rows // per_group == group)]
            values[here] = scale * dense[rows[here] % per_group, columns[here] // (kh * kw)]
    return values


def _panels(
    pattern: Sequence[Tensor], layout: Sequence[int]
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, their entries, and the row and the column of each of those."""
    csr = Pattern.of(pattern, layout).csr()
    row_start, columns = csr.tensors
    for rows, entries, row in bits.entries_of(row_start, columns, csr.shape, _PANEL):
        yield rows, entries, row, columns[entries].long()


def _dense(
    values: Tensor, pattern: Sequence[Tensor], layout: Sequence[int]
) -> Iterator[tuple[slice, Tensor]]:
    for rows, entries, row, column in _panels(pattern, layout):
        dense = values.new_zeros(rows.stop - rows.start, layout[2])
        dense[row - rows.start, column] = values[entries]
        yield rows, dense


def _places(weight: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, ...]:
    """Indices into a weight of any number of axes and any strides, of which no view is a matrix."""
    if weight.dim() < 2:
        return (column,) * weight.dim()
    places: list[Tensor] = []
    for size in reversed(weight.shape[1:]):
        places.insert(0, column % size)
        column = column // size
    return (row, *places)
