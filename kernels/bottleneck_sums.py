"""What bottleneck's gradients sum over rows, in Triton. g is the gradient of y, t that of h.

    grad_up   = s g^T D(act(h))      grad_bias_up   = s * sum of g        s = scale * gate
    grad_down = t^T N(x)             grad_bias_down = sum of t
    grad_gate = scale * (sum of up * g^T D(act(h)) + sum of bias_up * g)
    grad_norm_weight = sum of (t down) * (x - mean) * deviation           grad_norm_bias = of t down

Rows are cut into strips, whose sums a second launch adds up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels import qlora_paths as paths
from peftkern.kernels.bottleneck_norm import centre, load_statistics
from peftkern.kernels.bottleneck_tiles import load_hidden, whole_scale
from peftkern.kernels.common import convert, dot, narrow, widen
from peftkern.kernels.qlora_strips import Groups, finish, strips_of


@triton.jit(do_not_specialize=["rows", "strip_rows"])
def grad_up_kernel(
    grad_ptr,  # [rows, outputs]
    low_ptr,  # [rows, rank]: D(act(h)), of g's dtype; or None
    up_ptr,  # [outputs, rank], as all parameters of any float dtype
    bias_up_ptr,  # [outputs], or None
    gate_ptr,  # [1], or None
    up_parts_ptr,  # [strips, outputs, rank] float32, or None
    bias_parts_ptr,  # [strips, outputs] float32, or None
    gate_parts_ptr,  # [chunks, strips, outputs] float32, or None: chunks of BLOCK_R ranks
    rows,
    outputs,
    rank,
    strip_rows,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of outputs of a strip of rows, for a chunk of the rank.

    Floor: bytes of g read once for each chunk, and of `low`, which the L2 cache holds;
    4 strips outputs rank bytes of parts; 2 rows outputs rank operations.
    """
    tile, strip, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    is_n, is_r = n < outputs, r < rank
    HAS_BIAS: tl.constexpr = bias_parts_ptr is not None or (
        gate_parts_ptr is not None and bias_up_ptr is not None
    )
    sum_up = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    # A product with ones, since a sum over rows would pass numbers from lane to lane at each step.
    # Triton 3.6's interpreter makes no constants in bfloat16.
    sixteenths = tl.full((BLOCK_M, 16), 1 / 16, tl.float32).to(grad_ptr.dtype.element_ty)
    sum_bias = tl.zeros((BLOCK_N, 16), tl.float32)
    begin = strip.to(tl.int64) * strip_rows
    end = tl.minimum(begin + strip_rows, rows)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < end
        place = grad_ptr + m[:, None] * outputs + n[None, :]
        grad = tl.load(place, mask=inside[:, None] & is_n[None, :], other=0)
        if low_ptr is not None:
            place = low_ptr + m[:, None] * rank + r[None, :]
            low = tl.load(place, mask=inside[:, None] & is_r[None, :], other=0)
            sum_up = dot(tl.trans(grad), low, sum_up)
        if HAS_BIAS:
            sum_bias = dot(tl.trans(grad), sixteenths, sum_bias)
    bias = tl.sum(sum_bias, 1)
    part = strip.to(tl.int64) * outputs + n
    matrix, mask = part[:, None] * rank + r[None, :], is_n[:, None] & is_r[None, :]
    if gate_parts_ptr is not None:
        up = tl.load(up_ptr + n.to(tl.int64)[:, None] * rank + r[None, :], mask=mask, other=0)
        # One number an output: Triton 3.6 compiles no sum of them all for sm100.
        sum = tl.sum(widen(convert(up, grad_ptr.dtype.element_ty)) * sum_up, 1)
        if bias_up_ptr is not None:
            if chunk == 0:
                sum += widen(tl.load(bias_up_ptr + n, mask=is_n, other=0)) * bias
        place = gate_parts_ptr + (chunk * tl.num_programs(1) + strip).to(tl.int64) * outputs + n
        tl.store(place, scale * sum, mask=is_n)
    scale = whole_scale(scale, gate_ptr)
    if up_parts_ptr is not None:
        tl.store(up_parts_ptr + matrix, scale * sum_up, mask=mask)
    if bias_parts_ptr is not None:
        if chunk == 0:
            tl.store(bias_parts_ptr + part, scale * bias, mask=is_n)


@triton.jit(do_not_specialize=["rows", "strip_rows"])
def grad_down_kernel(
    t_ptr,  # [rows, rank] float32
    x_ptr,  # [rows, columns]
    down_ptr,  # [rank, columns], as all parameters of any float dtype
    norm_weight_ptr,  # [columns], or None
    norm_bias_ptr,  # [columns], or None
    statistics_ptr,  # [2, rows] float32, see statistics_kernel, or None: no norm
    down_parts_ptr,  # [strips, rank, columns] float32, or None
    bias_parts_ptr,  # [strips, rank] float32, or None
    norm_parts_ptr,  # [2, chunks, strips, columns] float32: of weight, then of bias; or None
    rows,
    columns,
    rank,
    strip_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of columns of a strip of rows, for a chunk of the rank; the first tile sums t too.

    Floor: bytes of x read once for each chunk, 4 rows rank bytes of t, which the L2 cache holds;
    4 strips rank columns bytes of parts; 2 rows columns rank operations. All that the norm has a
    part in follows from t^T (x - mean) * deviation and the sum of t.
    """
    tile, strip, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    is_k, is_r = k < columns, r < rank
    mask = is_r[:, None] & is_k[None, :]
    products = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    sums = tl.zeros((BLOCK_R,), tl.float32)
    begin = strip.to(tl.int64) * strip_rows
    end = tl.minimum(begin + strip_rows, rows)
    for start in range(begin, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < end
        t = load_hidden(t_ptr, m, inside, r, rows, rank, 1)
        if statistics_ptr is not None:
            sums += tl.sum(t, 0)
        elif bias_parts_ptr is not None:
            if tile == 0:
                sums += tl.sum(t, 0)
        if down_parts_ptr is not None or norm_parts_ptr is not None:
            place = x_ptr + m[:, None] * columns + k[None, :]
            x = tl.load(place, mask=inside[:, None] & is_k[None, :], other=0)
            if statistics_ptr is not None:
                mean, deviation = load_statistics(statistics_ptr, m, inside, rows)
                x = narrow(centre(x, mean, deviation), x.dtype)
            products = dot(tl.trans(narrow(t, x.dtype)), x, products)
    if norm_parts_ptr is not None:
        from_down = down_ptr + r.to(tl.int64)[:, None] * columns + k[None, :]
        down = tl.load(from_down, mask=mask, other=0)
        down = widen(convert(down, x_ptr.dtype.element_ty))
        part = norm_parts_ptr + (chunk * tl.num_programs(1) + strip).to(tl.int64) * columns + k
        tl.store(part, tl.sum(down * products, 0), mask=is_k)
        part += (tl.num_programs(1) * tl.num_programs(2)).to(tl.int64) * columns
        tl.store(part, tl.sum(down * sums[:, None], 0), mask=is_k)
    if down_parts_ptr is not None:
        if norm_weight_ptr is not None:
            products *= widen(tl.load(norm_weight_ptr + k, mask=is_k, other=0))[None, :]
        if norm_bias_ptr is not None:
            norm_bias = widen(tl.load(norm_bias_ptr + k, mask=is_k, other=0))
            products += sums[:, None] * norm_bias[None, :]
        to = down_parts_ptr + (strip.to(tl.int64) * rank + r)[:, None] * columns + k[None, :]
        tl.store(to, products, mask=mask)
    if bias_parts_ptr is not None:
        if tile == 0:
            tl.store(bias_parts_ptr + strip * rank + r, sums, mask=is_r)


def grad_up(
    grad: Tensor, low: Tensor | None, up: Tensor, bias_up: Tensor | None, gate: Tensor | None,
    scale: float, of_up: Tensor | None, of_bias_up: Tensor | None, of_gate: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradients of up, bias_up and gate, those that are given; low: D(act(h))."""
    if of_up is None and of_bias_up is None and of_gate is None:
        return
    (rows, outputs), rank = grad.shape, up.shape[1]
    sides, length, strips, chunks = _cut(grad, rank if low is not None else 1)
    block = sides.pop("outputs")
    programs = max(triton.cdiv(outputs, block), 1)
    up_parts = None if of_up is None else _float(grad, strips, outputs, rank)
    bias_parts = None if of_bias_up is None else _float(grad, strips, outputs)
    gate_parts = None if of_gate is None else _float(grad, chunks * strips, outputs)
    if strips:
        grad_up_kernel[(programs, strips, chunks)](
            grad, low, up, bias_up, gate, up_parts, bias_parts, gate_parts, rows, outputs, rank,
            length, scale, BLOCK_N=block, **sides,
        )  # fmt: skip
    _add_up(strips, outputs, rank, (up_parts, of_up), (bias_parts, of_bias_up))
    if of_gate is not None:
        of_outputs = _float(grad, outputs)
        _add_up(chunks * strips, outputs, 1, (gate_parts, of_outputs))
        of_gate.copy_(of_outputs.sum())


def grad_down(
    t: Tensor, x: Tensor, down: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
    statistics: Tensor | None, of_down: Tensor | None, of_bias_down: Tensor | None,
    of_norm_weight: Tensor | None, of_norm_bias: Tensor | None,
) -> None:  # fmt: skip
    """Fills the gradients of down, bias_down and the norm's parameters: those that are given."""
    has_norm = of_norm_weight is not None or of_norm_bias is not None
    if of_down is None and of_bias_down is None and not has_norm:
        return
    (rows, columns), rank = x.shape, t.shape[1]
    sides, length, strips, chunks = _cut(x, rank)
    block = sides.pop("outputs")
    down_parts = None if of_down is None else _float(x, strips, rank, columns)
    bias_parts = None if of_bias_down is None else _float(x, strips, rank)
    norm_parts = _float(x, 2, chunks * strips, columns) if has_norm else None
    if strips:
        reads_x = of_down is not None or has_norm
        programs = max(triton.cdiv(columns, block), 1) if reads_x else 1
        grad_down_kernel[(programs, strips, chunks)](
            t, x, down, norm_weight, norm_bias, statistics, down_parts, bias_parts, norm_parts,
            rows, columns, rank, length, BLOCK_K=block, **sides,
        )  # fmt: skip
    _add_up(strips, rank, columns, (down_parts, of_down), (bias_parts, of_bias_down))
    if norm_parts is not None:
        of_weight = (None, None) if of_norm_weight is None else (norm_parts[0], of_norm_weight)
        of_bias = (None, None) if of_norm_bias is None else (norm_parts[1], of_norm_bias)
        _add_up(chunks * strips, columns, 1, of_weight, of_bias)


def _cut(x: Tensor, rank: int) -> tuple[dict[str, int], int, int, int]:
    """-> what both kernels ask for, and `outputs`; rows of a strip; strips; chunks of the rank."""
    rows, columns = x.shape
    tile = paths.tile("bottleneck_sums", x.device, x.dtype, rows)
    # A row that starts anywhere is read one number at a time: few rows, or registers run out.
    most = tile.rows if columns % 8 == 0 else 16
    sides = {
        "BLOCK_M": min(most, max(triton.next_power_of_2(rows), 16)),
        "BLOCK_R": min(tile.inner, max(triton.next_power_of_2(rank), 16)),
        "outputs": tile.outputs,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    strips = strips_of(rows, Groups(), sides["BLOCK_M"])
    return sides, strips.rows, strips.count, triton.cdiv(rank, sides["BLOCK_R"])


_Part = tuple[Tensor | None, Tensor | None]  # and their sum


def _add_up(parts: int, rows: int, columns: int, out: _Part, bias: _Part = (None, None)) -> None:
    """So many parts of a matrix, and of a vector of its rows, in their order."""
    finish(Groups(), (parts, rows, columns, 0, columns, 1, 1), 0, (None, None), out, bias)


def _float(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
