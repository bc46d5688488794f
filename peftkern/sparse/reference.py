"""The math of sparse, in plain torch: the oracle of every test and the baseline of every benchmark.

    S[i_k, j_k] = values[k]                            k counts the entries row by row
    sddmm       values[k] = scale * sum_m grad[m, i_k] x[m, j_k]
    linear      y = x W'^T + bias,  W' = W with its entries replaced by values ("value")
                                    W' = W + S ("delta")

Hu et al., SaRA (2024), trains the values themselves; SHiRA and RoSA train a difference. In both,
the gradient of the values is sddmm of x and of the gradient of y. Differentiable by torch's own
autograd, in any floating dtype, on any device. `indices` `[2, nnz]` are those of a Pattern.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sddmm(x: Tensor, grad: Tensor, indices: Tensor, scale: float = 1.0) -> Tensor:
    """-> `[nnz]`, at least float32, as all values are."""
    sums = torch.promote_types(x.dtype, torch.float32)
    rows, columns = indices.long()
    products = x.to(sums).flatten(0, -2)[:, columns] * grad.to(sums).flatten(0, -2)[:, rows]
    return scale * products.sum(0)


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    rows, columns = indices.long()
    values = matrix(weight)[rows, columns]
    return values.to(torch.promote_types(weight.dtype, torch.float32))


def scatter(weight: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """The weight with these entries, rounded to its dtype; a new tensor."""
    rows, columns = indices.long()
    found = matrix(weight).index_put((rows, columns), values.to(weight.dtype))
    return found.view(weight.shape)


def dense(values: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """S."""
    rows, columns = indices.long()
    return values.new_zeros(tuple(shape)).index_put((rows, columns), values)


def matmul(
    x: Tensor, values: Tensor, indices: Tensor, shape: Sequence[int],
    residual: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """residual + scale * x S^T."""
    sums = torch.promote_types(x.dtype, torch.float32)
    y = scale * (x.to(sums) @ dense(values.to(sums), indices, shape).t())
    return (y if residual is None else residual.to(sums) + y).to(x.dtype)


def matmul_t(
    grad: Tensor, values: Tensor, indices: Tensor, shape: Sequence[int],
    residual: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """residual + scale * grad S."""
    sums = torch.promote_types(grad.dtype, torch.float32)
    x = scale * (grad.to(sums) @ dense(values.to(sums), indices, shape))
    return (x if residual is None else residual.to(sums) + x).to(grad.dtype)


def weight(base: Tensor, values: Tensor, indices: Tensor, form: str) -> Tensor:
    """W', with a gradient of the values that is none elsewhere."""
    if form == "value":
        return scatter(base, values, indices)
    sums = torch.promote_types(base.dtype, torch.float32)
    added = dense(values.to(sums), indices, matrix(base).shape).view(base.shape)
    return (base.to(sums) + added).to(base.dtype)


def linear(
    x: Tensor, base: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None,
    form: str = "value",
) -> Tensor:  # fmt: skip
    y = x @ weight(base, values, indices, form).to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


def conv2d(
    x: Tensor, base: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1), groups: int = 1, form: str = "value",
) -> Tensor:  # fmt: skip
    return torch.nn.functional.conv2d(
        x, weight(base, values, indices, form).to(x.dtype),
        None if bias is None else bias.to(x.dtype), list(stride), list(padding), list(dilation),
        groups,
    )  # fmt: skip


def unfolded(x: Tensor, window: Sequence[int]) -> Tensor:
    """What each output of a convolution sees: `[groups, batch * outputs, weight columns]`."""
    kh, kw, sh, sw, ph, pw, dh, dw, groups = window
    columns = torch.nn.functional.unfold(x, (kh, kw), (dh, dw), (ph, pw), (sh, sw))
    batch, width, places = columns.shape
    split = columns.view(batch, groups, width // groups, places)
    return split.permute(1, 0, 3, 2).reshape(groups, batch * places, width // groups)


def conv2d_sddmm(
    x: Tensor, grad: Tensor, indices: Tensor, window: Sequence[int], scale: float = 1.0
) -> Tensor:
    """values[k] = scale * sum over images b and places p of grad[b, i_k, p] unfolded[b, p, j_k]."""
    sums = torch.promote_types(x.dtype, torch.float32)
    rows, columns = indices.long()
    groups = window[-1]
    seen = unfolded(x.to(sums), window)
    above = grad.to(sums).permute(1, 0, 2, 3).flatten(1)
    group = rows // max(1, len(above) // groups)
    return scale * (seen[group, :, columns] * above[rows]).sum(1)


def matrix(weight: Tensor) -> Tensor:
    """A tensor as its pattern sees it: its first axis by the others, or one row."""
    if weight.dim() < 2:
        return weight.reshape(1, -1)
    return weight.reshape(weight.shape[0], -1)
