"""sparse's index: schema and fake of its ops, and the functions on a single pattern; linear.py has
what multiplies by a sparse weight.

A pattern reaches an op as its tensors and its layout [kind, rows, columns, nnz], as
`Pattern.operand` gives them. Values are float32, and float64 beside float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftkern import _native
from peftkern.sparse import check, fallback
from peftkern.sparse.pattern import Pattern


def _fake_values(like: Tensor, layout: Any) -> Tensor:
    return like.new_empty(layout[3], dtype=torch.promote_types(like.dtype, torch.float32))


# x `[M, columns]` and grad `[M, rows]` of one dtype, with any strides.
sddmm_op = _native.define(
    "sparse_sddmm(Tensor x, Tensor grad, Tensor[] pattern, int[] layout, float scale) -> Tensor",
    lambda x, grad, pattern, layout, scale: _fake_values(x, layout),
    fallback.sddmm,
)
sddmm_onto_op = _native.define(
    "sparse_sddmm_(Tensor(a!) values, Tensor x, Tensor grad, Tensor[] pattern, int[] layout, "
    "float scale) -> ()",
    lambda values, x, grad, pattern, layout, scale: None,
    fallback.sddmm_,
)
# What the launchers of both call on a GPU where a csr has few entries; no float64.
_native.define(
    "sparse_sample_(Tensor(a!) values, Tensor x, Tensor grad, Tensor[] pattern, int[] layout, "
    "float scale, bool add) -> ()",
    lambda values, x, grad, pattern, layout, scale, add: None,
    fallback.sample_,
    devices=("cuda",),
)
# A weight of any number of axes, dense or channels last; its values are rounded to its dtype.
gather_op = _native.define(
    "sparse_gather(Tensor weight, Tensor[] pattern, int[] layout) -> Tensor",
    lambda weight, pattern, layout: _fake_values(weight, layout),
    fallback.gather,
)
scatter_op = _native.define(
    "sparse_scatter_(Tensor(a!) weight, Tensor values, Tensor[] pattern, int[] layout) -> ()",
    lambda weight, values, pattern, layout: None,
    fallback.scatter_,
)
# residual + scale * x S^T, and residual + scale * grad S, in x's dtype; all of them dense.
matmul_op = _native.define(
    "sparse_matmul(Tensor x, Tensor values, Tensor[] pattern, int[] layout, Tensor? residual, "
    "float scale) -> Tensor",
    lambda x, values, pattern, layout, *rest: x.new_empty(*x.shape[:-1], layout[1]),
    fallback.matmul,
)
matmul_t_op = _native.define(
    "sparse_matmul_t(Tensor grad, Tensor values, Tensor[] pattern, int[] layout, "
    "Tensor? residual, float scale) -> Tensor",
    lambda grad, values, pattern, layout, *rest: grad.new_empty(*grad.shape[:-1], layout[2]),
    fallback.matmul_t,
)
# x [batch, channels, height, width] and grad [batch, rows, ...] of one dtype, with any strides;
# window = kernel, stride, padding and dilation, each of height and width, and groups.
conv2d_sddmm_op = _native.define(
    "sparse_conv2d_sddmm(Tensor x, Tensor grad, Tensor[] pattern, int[] layout, int[] window, "
    "float scale) -> Tensor",
    lambda x, grad, pattern, layout, *rest: _fake_values(x, layout),
    fallback.conv2d_sddmm,
)
for _verb in ("sddmm", "sddmm_", "gather", "scatter_", "matmul", "matmul_t", "conv2d_sddmm"):
    _native.register_triton("sparse", _verb)


def sddmm(
    x: Tensor, grad: Tensor, pattern: Pattern, scale: float = 1.0, onto: Tensor | None = None
) -> Tensor:
    """values[k] = scale * sum_m grad[m, i_k] x[m, j_k], the dense product only where it is asked
    for.

    Args:
        x: `[..., columns]`, float32, bfloat16, float16 or float64, with any strides.
        grad: `[..., rows]`, of x's dtype, with any strides.
        pattern: its entries are (i_k, j_k).
        scale: of the sums.
        onto: `[nnz]`, float32 (float64 of float64): the sums are added to it, in place.

    Returns:
        `[nnz]`, float32 (float64 of float64); `onto` where it was given. Not differentiable.

    Raises:
        TypeError: a dtype that is not float, or two that differ.
        ValueError: a shape, layout or device that does not fit.
    """
    check.sddmm(x, grad, pattern, onto)
    rows, columns = pattern.shape
    with torch.no_grad():
        operands = (_flat(x, columns), _flat(grad, rows), *pattern.operand(), scale)
        if onto is None:
            return sddmm_op(*operands)  # type: ignore[no-any-return]
        sddmm_onto_op(onto, *operands)
    return onto


def gather(weight: Tensor, pattern: Pattern) -> Tensor:
    """values[k] = weight[i_k, j_k].

    Args:
        weight: of any float dtype; of more than two axes, it is `[shape[0], rest]`.
        pattern: of the weight's shape.

    Returns:
        `[nnz]`, float32 (float64 of float64). Not differentiable.

    Raises:
        TypeError: a weight that is not float.
        ValueError: a shape or device that does not fit.
    """
    check.gather(weight, pattern)
    with torch.no_grad():
        return gather_op(weight if _is_plain(weight) else weight.contiguous(), *pattern.operand())  # type: ignore[no-any-return]


def scatter_(weight: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """weight[i_k, j_k] = values[k], rounded to the weight's dtype, in place.

    Args:
        weight: as in `gather`.
        values: `[nnz]`, of any float dtype.
        pattern: of the weight's shape.

    Returns:
        The weight. Not differentiable.

    Raises:
        TypeError: a dtype that is not float.
        ValueError: a shape or device that does not fit.
    """
    check.scatter(weight, values, pattern)
    sums = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        target = weight if _is_plain(weight) else weight.contiguous()
        scatter_op(target, values.to(sums).contiguous(), *pattern.operand())
        if target is not weight:
            weight.copy_(target)
        elif not (torch.compiler.is_compiling() or weight.is_inference()):
            torch.autograd.graph.increment_version(weight)  # no graph may use what it was
    return weight


def _flat(x: Tensor, size: int) -> Tensor:
    """`[M, size]`, a view where there can be one."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), size)


def _is_plain(weight: Tensor) -> bool:
    """Whether the ops take it as it lies."""
    if weight.is_contiguous():
        return True
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
