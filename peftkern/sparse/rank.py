"""The nuclear norm of a sparse matrix, and its gradient on the support, without a decomposition.

    ||A||_* = sum of A's singular values = sum_k values[k] Q[i_k, j_k]
    d||A||_* / d values[k] = Q[i_k, j_k],    Q = U V^T, A's polar factor

Q is the limit of X <- (a + b G + c G^2) X, G = X X^T, which moves each singular value s to
a s + b s^3 + c s^5 and leaves the singular vectors as they are: products alone, on the short side.
Each step's polynomial is the one that is nearest to 1 on the interval in which the singular values
then lie (Remez); the first interval comes from Lanczos' method. That of zero is empty rows' and
stays zero: of the subgradients there, the one of the smallest norm.

Hu et al., SaRA (2024), weigh this norm of |w| < threshold, of a matrix a step.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from peftkern import _check
from peftkern.sparse import check
from peftkern.sparse.ops import gather, scatter_
from peftkern.sparse.pattern import Pattern

BACKENDS = ("polar", "svd")
_LANCZOS = 32  # steps, whose error falls as exp(-4 steps / condition of A)
_TRUSTED = 1e-3  # what is less of the largest eigenvalue they may have missed
_SAFETY = 1.02  # of what they say
_SLOWEST = 1e-3  # a smaller singular value than this takes a step of this one's
_LEAST = 1e-7  # singular values from here on are brought to 1
_STEPS = {"cpu": 7}  # from more on, a decomposition is cheaper
_PROBES = 4
# How far from 1 a singular value may end.
_TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-14}

Step = tuple[float, float, float]


def nuclear(values: Tensor, pattern: Pattern, backend: str = "polar") -> tuple[Tensor, Tensor]:
    """||A||_*, and its gradient: g_k = Q[i_k, j_k], Q the polar factor of A.

    Args:
        values: `[nnz]`, float32 or float64: A's entries.
        pattern: where they are.
        backend: "polar", by products; "svd", by torch's decomposition, which also serves a matrix
            that products cannot do in a few steps: of low rank, or of bad condition on a CPU.

    Returns:
        The norm, `[]`, and its gradient `[nnz]`, in the values' dtype. Not differentiable.

    Raises:
        TypeError: values of another dtype.
        ValueError: a shape or device that does not fit; a backend that there is not.
    """
    _check.dtype("values", values, list(_TOLERANCE))
    check.values("values", values, pattern)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be polar or svd, got {backend!r}")
    values = values.detach()
    with torch.no_grad():
        dense = values.new_zeros(pattern.shape)
        scatter_(dense, values, pattern)
        wide = dense.t() if pattern.shape[0] > pattern.shape[1] else dense
        factor = _by_products(wide) if backend == "polar" else None
        if factor is None:
            factor = _by_svd(wide)
        if wide is not dense:
            factor = factor.t()
        gradient = gather(factor.contiguous(), pattern)
        return values @ gradient, gradient


def _by_svd(matrix: Tensor) -> Tensor:
    """What belongs to singular values that are rounding alone is left out."""
    if matrix.numel() == 0 or not matrix.any():
        return torch.zeros_like(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    noise = s[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    factor: Tensor = (u * (s > noise)) @ vh
    return factor


def _by_products(matrix: Tensor) -> Tensor | None:
    """None where a decomposition is cheaper, or is needed for what is hardly there."""
    gram = matrix @ matrix.t()
    present = gram.diagonal() > 0
    if not present.any():
        return torch.zeros_like(matrix)
    lowest, highest = _ends(gram)
    if not 0 < highest < math.inf:
        return None
    scale = math.sqrt(highest)
    least = math.sqrt(lowest / highest) if lowest > _TRUSTED * highest else _LEAST
    steps = _steps(least, _TOLERANCE[matrix.dtype], _STEPS.get(matrix.device.type, 16))
    if steps is None:
        return None
    x, gram = matrix / scale, gram / highest
    for i, (a, b, c) in enumerate(steps):
        if i:
            gram = x @ x.t()
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        x = polynomial @ x
    return x if _is_orthogonal(x, present) else None


def _is_orthogonal(x: Tensor, present: Tensor) -> bool:
    """By the length of x^T z for a few z: a direction of many that x has not is seen in it."""
    probes = _normal(len(x), _PROBES, x) * present[:, None]
    lengths, wanted = ((t * t).sum(0) for t in (x.t() @ probes, probes))
    allowed = 2 * _TOLERANCE[x.dtype] + 64 * torch.finfo(x.dtype).eps
    return bool(((lengths / wanted - 1).abs() <= allowed).all())


def _ends(gram: Tensor) -> tuple[float, float]:
    """Between which the eigenvalues lie, but for those of an empty row; by Lanczos' method."""
    count = min(_LANCZOS, len(gram))
    start = torch.mv(gram, _normal(len(gram), 1, gram)[:, 0])
    found = start / start.norm()
    basis = gram.new_zeros(count, len(gram))
    diagonal, beside = gram.new_zeros(count), gram.new_zeros(count)
    for k in range(count):
        basis[k] = found
        rest = torch.mv(gram, found)
        diagonal[k] = rest @ found
        for _ in range(2):  # once does not make it orthogonal, twice does
            rest -= basis[: k + 1].t() @ (basis[: k + 1] @ rest)
        beside[k] = rest.norm()
        found = rest / beside[k]
    small = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
    if not small.isfinite().all():  # the last vectors of a matrix of low rank, or a NaN in it
        return 0.0, float(gram.trace())
    values, vectors = torch.linalg.eigh(small.double().cpu())
    errors = (float(beside[-1]) * vectors[-1]).abs()
    return float(values[0] - errors[0]) / _SAFETY, float(values[-1] + errors[-1]) * _SAFETY


def _steps(least: float, tolerance: float, most: int) -> list[Step] | None:
    """The polynomials that take [least, 1] to 1; None where these are more than `most`."""
    found: list[Step] = []
    low, high = least, 1.0
    while max(1 - low, high - 1) > tolerance:
        if len(found) == most:
            return None
        start = max(low, _SLOWEST * high)
        *step, error = _nearest(round(start, 12), round(high, 12))
        found.append((step[0], step[1], step[2]))
        low, high = min(1 - error, low * (1 - error) / start), 1 + error
    return found


@lru_cache(maxsize=64)
def _nearest(low: float, high: float) -> tuple[float, float, float, float]:
    """a, b, c of the odd polynomial that is nearest to 1 on [low, high], and how far off it is."""
    if 1 - low < 1e-2:  # the limit, where Remez' equations have lost their digits
        return 1.875, -1.25, 0.375, 2.5 * max(1 - low, high - 1) ** 3
    inner, outer, error = (3 * low + high) / 4, (low + 3 * high) / 4, math.inf
    while True:
        points = ((low, 1.0), (inner, -1.0), (outer, 1.0), (high, -1.0))
        rows = [[x, x**3, x**5, sign] for x, sign in points]
        matrix = torch.tensor(rows, dtype=torch.float64)
        a, b, c, now = torch.linalg.solve(matrix, matrix.new_ones(4)).tolist()
        if abs(error - now) < 1e-10:
            return a, b, c, abs(now)
        # It turns where its slope a + 3 b x^2 + 5 c x^4 is 0.
        error, root = now, math.sqrt(9 * b * b - 20 * a * c)
        inner, outer = (math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))


def _normal(rows: int, columns: int, like: Tensor) -> Tensor:
    """The same numbers at every call, so that the result is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator).to(like)
