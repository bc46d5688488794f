"""What onebit's kernels in Triton share: a matrix of a list, codes and levels.

    code = how many thresholds t have  w - mean > t * (std + 1e-5)
    W    = mean + std * level[code]

Each step is rounded as in peftkern.onebit.reference, so that every device gives the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftkern.kernels.common import widen
from peftkern.onebit import reference

EPS = tl.constexpr(reference.EPS)
# As many matrices as one launch takes: three addresses and a size of each lie well within the 4 KB
# that a kernel's arguments have. So no table of addresses is copied to the device, which would wait
# for it, and which no CUDA graph could hold.
MATRICES = 96
# Addresses count as multiples of an element alone: with those of a list goes the way in which lanes
# share what they read, and with that the order of the sums.
ANY_ADDRESS = ["weight_ptrs", "grad_ptrs", "counts"]
UNSPECIALIZED = ["counts", "parts"]


@triton.jit
def at(values, index):
    """values[index] of a tuple of numbers or addresses, for an index known on the device alone."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def load(ptrs, matrix, begin, held, BLOCK: tl.constexpr):
    """A matrix from `begin` on, `held` of its elements and then zeros; float32 [BLOCK]."""
    lane = tl.arange(0, BLOCK)
    return widen(tl.load(at(ptrs, matrix) + begin + lane, mask=lane < held, other=0))


@triton.jit
def load_statistics(statistics_ptr, matrix):
    """-> mean and std of a matrix, float32."""
    return tl.load(statistics_ptr + 2 * matrix), tl.load(statistics_ptr + 2 * matrix + 1)


@triton.jit
def code_of(weight, mean, std, THRESHOLDS: tl.constexpr):
    """int32 codes of float32 weights; 0 where std is, and for what is no number."""
    above, reach = weight - mean, std + EPS
    code = tl.zeros(weight.shape, tl.int32)
    for i in tl.static_range(len(THRESHOLDS)):
        code += (above > THRESHOLDS[i] * reach).to(tl.int32)
    return tl.where(std == 0, 0, code)


@triton.jit
def value_of(code, mean, std, LEVELS: tl.constexpr):
    """mean + std * LEVELS[code] in float32: a product and a sum, each rounded.

    One of two values is selected; one of more is looked up in shared memory, in fewer instructions.
    """
    COUNT: tl.constexpr = len(LEVELS)
    if COUNT == 2:
        return tl.where(code != 0, mean + std * LEVELS[1], mean + std * LEVELS[0])
    else:
        index = tl.arange(0, COUNT)
        level = tl.zeros((COUNT,), tl.float32)
        for i in tl.static_range(COUNT):
            level = tl.where(index == i, LEVELS[i], level)
        return tl.reshape(tl.gather(mean + std * level, tl.ravel(code), 0), code.shape)


def runs(*lists: Sequence[Tensor]) -> Iterator[slice]:
    """Where to cut lists of as many tensors each, so that one launch serves every cut.

    A launch takes MATRICES at most, and tensors of one dtype for each of its arguments.
    """
    dtypes = [tuple(t.dtype for t in each) for each in zip(*lists, strict=True)]
    begin = 0
    for i in range(1, len(dtypes) + 1):
        if i == len(dtypes) or i - begin == MATRICES or dtypes[i] != dtypes[begin]:
            yield slice(begin, i)
            begin = i


def counts_of(weights: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(w.numel() for w in weights)
