"""A step of packed AdamW in Triton, of many tensors in a launch; its equation stands in
peftkern/sparse/adamw.py."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import narrow
from peftkern.kernels.onebit_levels import at
from peftkern.kernels.sparse_tiles import BLOCK_ROWS, Operand, next_chunk, open_rows
from peftkern.sparse import adamw

# Eight addresses of each lie within the 4 KB that a kernel's arguments have; see onebit_levels.py.
TENSORS = 40
BLOCK = 2048  # values that go nowhere, of one program
POINTERS = [
    "weight_ptrs", "value_ptrs", "grad_ptrs", "exp_avg_ptrs", "exp_avg_sq_ptrs", "born_ptrs",
    "first_ptrs", "second_ptrs",
]  # fmt: skip
NUMBERS = ["begins", "rows", "columns", "step"]


@triton.jit
def _correction(age, log_beta):
    """1 - beta^age, whose digits the difference would lose where beta^age is near to 1."""
    power = age.to(tl.float32) * log_beta
    series = 1 + power * (1 / 8)
    for i in tl.static_range(7, 1, -1):
        series = 1 + power * series * (1 / i)
    return tl.where(power > -0.5, -power * series, 1 - tl.exp(power))


@triton.jit
def _move(
    value_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, born_ptr, entry, there, step, rates,
    HAS_BORN: tl.constexpr,
):  # fmt: skip
    """A step of these entries, in place. -> their values, float32."""
    lr, keep, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps = rates
    value = tl.load(value_ptr + entry, mask=there, other=0)
    grad = tl.load(grad_ptr + entry, mask=there, other=0)
    first = beta1 * tl.load(exp_avg_ptr + entry, mask=there, other=0) + rest1 * grad
    second = beta2 * tl.load(exp_avg_sq_ptr + entry, mask=there, other=0) + rest2 * (grad * grad)
    if HAS_BORN:
        age = step - tl.load(born_ptr + entry, mask=there, other=0)
    else:
        age = tl.zeros_like(entry).to(tl.int32) + step
    live = there & (age >= 1)
    age = tl.maximum(age, 1)
    root = tl.sqrt_rn(tl.div_rn(second, _correction(age, log_beta2))) + eps
    moved = value * keep - tl.div_rn(lr * first, _correction(age, log_beta1) * root)
    tl.store(exp_avg_ptr + entry, first, mask=live)
    tl.store(exp_avg_sq_ptr + entry, second, mask=live)
    tl.store(value_ptr + entry, moved, mask=live)
    return tl.where(live, moved, value)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def adamw_kernel(
    weight_ptrs,  # of each, [rows, columns], float32, bfloat16 or float16; or None
    value_ptrs,  # of each, [nnz] float32, as the next three
    grad_ptrs,
    exp_avg_ptrs,
    exp_avg_sq_ptrs,
    born_ptrs,  # of each, [nnz] int32; or None
    first_ptrs,  # of each, its pattern; without a weight None
    second_ptrs,
    begins,  # of each, its first program
    rows,  # of each, as its pattern has them; without a weight 1 and nnz
    columns,
    step,
    rates,  # lr, 1 - lr * weight_decay, beta1, beta2, 1 less each, the logarithm of each, eps
    CSR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of one tensor, or some of its values.

    Floor: 28 bytes an entry, 4 more where it has an age; those of the pattern; and the sectors of
    the weight that entries lie in, written.
    """
    program = tl.program_id(0)
    HAS_BORN: tl.constexpr = born_ptrs is not None
    which = program * 0
    for i in tl.static_range(1, len(begins)):
        which += (program >= begins[i]).to(tl.int32)
    block = program - at(begins, which)
    value_ptr, grad_ptr = at(value_ptrs, which), at(grad_ptrs, which)
    exp_avg_ptr, exp_avg_sq_ptr = at(exp_avg_ptrs, which), at(exp_avg_sq_ptrs, which)
    born_ptr = at(born_ptrs, which) if HAS_BORN else value_ptr
    height, width = at(rows, which), at(columns, which)
    if weight_ptrs is None:
        entry = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        _move(
            value_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, born_ptr, entry, entry < width,
            step, rates, HAS_BORN,
        )  # fmt: skip
    else:
        weight_ptr = at(weight_ptrs, which)
        first_ptr, second_ptr = at(first_ptrs, which), at(second_ptrs, which)
        across = tl.cdiv(width, 32 * CHUNKS)
        row = block // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        chunk = block % across * CHUNKS
        begin, end, first, last = open_rows(
            first_ptr, second_ptr, row, height, width, 0, width, chunk, CHUNKS, CSR, 0
        )
        to = weight_ptr + row.to(tl.int64)[:, None] * width
        for chunk in range(first, last):
            entry, column, there, begin = next_chunk(
                first_ptr, second_ptr, row, height, width, chunk, begin, end, CSR
            )
            value = _move(
                value_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, born_ptr, entry, there, step,
                rates, HAS_BORN,
            )  # fmt: skip
            tl.store(to + column, narrow(value, weight_ptr.dtype.element_ty), mask=there)


def adamw_(
    weights: Sequence[Tensor], values: Sequence[Tensor], grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], born: Sequence[Tensor],
    patterns: Sequence[Tensor], layouts: Sequence[int], step: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    packed = (values, grads, exp_avg, exp_avg_sq, born)
    rates = _rates(lr, beta1, beta2, eps, weight_decay)
    for tensors in _alike(weights, values, patterns, layouts):
        operands = [_operand(patterns, layouts, i) for i in tensors] if weights else []
        if values[tensors[0]].dtype == torch.float64:
            adamw.fallback(
                [weights[i] for i in tensors if weights],
                *([each[i] for i in tensors if each] for each in packed),
                [t for i in tensors for t in patterns[2 * i : 2 * i + 2]],
                [n for i in tensors for n in layouts[4 * i : 4 * i + 4]],
                step, lr, beta1, beta2, eps, weight_decay,
            )  # fmt: skip
            continue
        grids = [math.prod(o.grid(o.columns)) for o in operands]
        grids = grids or [triton.cdiv(values[i].numel(), BLOCK) for i in tensors]
        adamw_kernel[(sum(grids),)](
            _of(weights, tensors), *(_of(each, tensors) for each in packed),
            tuple(o.first for o in operands) or None, tuple(o.second for o in operands) or None,
            tuple(itertools.accumulate(grids[:-1], initial=0)),
            tuple(o.rows for o in operands) or (1,) * len(tensors),
            tuple(o.columns for o in operands) or tuple(values[i].numel() for i in tensors),
            step, rates,
            CSR=bool(operands) and operands[0].csr,
            BLOCK_ROWS=BLOCK_ROWS,
            CHUNKS=operands[0].chunks if operands else 1,
            BLOCK=BLOCK,
        )  # fmt: skip


def _rates(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    """As `adamw_kernel` takes them: what float32 would lose in a difference is one already."""
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    return lr, 1 - lr * weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, *logs, eps


def _alike(
    weights: Sequence[Tensor], values: Sequence[Tensor], patterns: Sequence[Tensor],
    layouts: Sequence[int],
) -> list[list[int]]:  # fmt: skip
    """Which tensors one launch serves: TENSORS of the same dtypes and kind. What has no values is
    left out."""
    groups = defaultdict(list)
    for i, value in enumerate(values):
        if value.numel():
            held = [value, *patterns[2 * i : 2 * i + 2], *weights[i : i + 1]]
            groups[(*(t.dtype for t in held), *layouts[4 * i : 4 * i + 1])].append(i)
    return [
        group[begin : begin + TENSORS]
        for group in groups.values()
        for begin in range(0, len(group), TENSORS)
    ]


def _operand(patterns: Sequence[Tensor], layouts: Sequence[int], i: int) -> Operand:
    return Operand.of(patterns[2 * i : 2 * i + 2], layouts[4 * i : 4 * i + 4])


def _of(all: Sequence[Tensor], tensors: list[int]) -> tuple[Tensor, ...] | None:
    """These of them, where there are any at all."""
    return tuple(all[i] for i in tensors) if all else None
