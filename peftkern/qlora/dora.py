"""DoRA (Liu et al., 2024): a trained magnitude for every row, and a direction that LoRA shifts.

    V   = W + c B A                                  never formed
    n_i = |V_i|                                      no gradient flows through it
    y   = (m / n) * (x W^T + c (D(x) A^T) B^T) + b

    n_i^2 = |W_i|^2 + 2 c <(W A^T)_i, B_i> + c^2 B_i (A A^T) B_i^T

W A^T is `linear` at x = A: one pass over the weight as it is stored, and `[out, r]` of memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern._seen import Seen
from peftkern.qlora.codes import dequantize
from peftkern.qlora.ops import linear
from peftkern.qlora.weight import QuantizedWeight

# The three terms may cancel, which costs n twice the digits that it costs V, and what rounding
# leaves at last says nothing of n. So n^2 counts as at least this many eps of the terms' magnitude
# (n as a 1000th of it in float32): the gain m / n stays finite, and a row that has shrunk so far
# keeps its gradient.
FLOOR = 8
PANEL = 1024  # columns of a weight


class Norms:
    """Row norms of W + c B A, and what of them need not be computed again.

    |W_i|^2 lasts as long as the weight's storage and version. n itself lasts from one call without
    a gradient to the next in which A and B are the same; a call with one forgets it, so that no
    optimiser can change them unnoticed, though it writes past torch's counters.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self._norms: Tensor | None = None
        self._weight, self._factors = Seen(), Seen()

    def __reduce__(self) -> tuple[type[Norms], tuple[()]]:
        return Norms, ()  # a copy has other tensors to look at

    def __call__(
        self,
        weight: Tensor | QuantizedWeight,
        a: Tensor,
        b: Tensor,
        scale: float,
        made_of: Sequence[Tensor],
    ) -> Tensor:
        """`[out]`, at least float32, without a gradient.

        Args:
            weight, a, b, scale: W, A, B and c.
            made_of: the parameters behind a and b, by which a change of them is known.
        """
        compiling = torch.compiler.is_compiling()  # then there are no storages to look at
        if self._squares is None or not (compiling or self._weight.is_of([_stored(weight)])):
            self._squares, self._norms = squares(weight), None
            self._weight = Seen() if compiling else Seen([_stored(weight)])
        if compiling or torch.is_grad_enabled():
            self._norms = None
            return norms(weight, self._squares, a, b, scale)
        if self._norms is None or not self._factors.is_of(made_of, scale):
            self._norms = norms(weight, self._squares, a, b, scale)
            self._factors = Seen(made_of, scale)
        return self._norms


def squares(weight: Tensor | QuantizedWeight) -> Tensor:
    """|W_i|^2 `[out]`; at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, QuantizedWeight):
        weight = dequantize(weight, dtype)
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=dtype)
    return norms.square()


@torch.no_grad()
def norms(
    weight: Tensor | QuantizedWeight, squares: Tensor, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """n `[out]`. A row of W + c B A that is zero with all its terms has n = 0."""
    a, b = a.to(squares.dtype), b.to(squares.dtype)
    with torch.autocast(a.device.type, enabled=False):
        cross = 2 * (_product(a, weight).t() * b).sum(1)
        quadratic = ((b @ (a @ a.t())) * b).sum(1)
        # Above |c B_i A|, whatever cancels in it.
        bound = scale * (b.abs() @ torch.linalg.vector_norm(a, dim=1))
    n = squares + scale * cross + scale**2 * quadratic
    floor = FLOOR * torch.finfo(n.dtype).eps * (squares + bound.square())
    return torch.maximum(n, floor).sqrt()


def _product(a: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """A W^T `[r, out]`; by panels where W is stored `[in, out]`, lest a cast copy all of it."""
    if isinstance(weight, QuantizedWeight) or weight.is_contiguous():
        return linear(a, weight)
    product = a.new_zeros(len(a), len(weight))
    panels = zip(torch.split(a, PANEL, 1), torch.split(weight.t(), PANEL), strict=True)
    for left, right in panels:
        product.addmm_(left, right.to(a.dtype))
    return product


def rescale(product: Tensor, magnitude: Tensor, norms: Tensor, bias: Tensor | None) -> Tensor:
    """(m / n) * product + bias, in the product's dtype, rounded once.

    Where n = 0 the product is 0 as well, and so are the row's gain and gradients: such a row stays
    zero, where peft's is NaN.
    """
    by = gain(magnitude, norms)
    if bias is None:
        return (product * by).to(product.dtype)
    return torch.addcmul(bias.to(by.dtype), product, by).to(product.dtype)


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / n `[out]`; 0 where n = 0."""
    return magnitude * torch.where(norms > 0, 1 / norms, 0.0)


def _stored(weight: Tensor | QuantizedWeight) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return weight.packed
    # Of a view, which may be made anew for each call, what it is a view of.
    return weight if weight._base is None else weight._base
