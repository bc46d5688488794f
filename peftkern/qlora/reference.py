"""The math of qlora, in plain torch: the oracle of every test and the baseline of every benchmark.

    W[i]       = codebook[code[i]] * absmax[i // block_size]          over the flat weight: 4 bits
    W[n, k]    = code[n, k] * (absmax[n] / 127)                       8 bits
    s          = D(x) A^T                                             D drops elements of x
    y          = x W^T + bias + scale * s B^T

Differentiable by torch's own autograd, in any floating dtype, on any device. Not for torch.compile:
where a last block is not full, inductor of torch 2.13 leaves it unwritten on a CPU, as it does in
`n[torch.arange(40) // 32] + 1`. So what a graph meets of this stands inside an op.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The 16 values of NF4 (Dettmers et al., QLoRA, 2023): quantiles of the normal distribution, scaled
# to [-1, 1], with an exact zero. Asymmetric: seven lie below zero, eight above.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# The 16 values of bitsandbytes' FP4, by code: a sign in bit 3, and magnitudes in an order of their
# own. Codes 0 and 8 are both zero. A magnitude takes the next larger value above these limits, the
# literals of bitsandbytes' CUDA kernel; the codes are in the order of their values.
FP4 = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
    -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
FP4_LIMITS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
FP4_CODES = (11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3)

NESTED_BLOCK_SIZE = 256


def midpoints(codebook: Tensor) -> Tensor:
    """The 15 midpoints between neighbouring values; a value on one takes the lower code."""
    return (codebook[:-1] + codebook[1:]) / 2


def quantize(
    weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """-> packed uint8 `[ceil(n / 2), 1]`, absmax float32 `[ceil(n / block_size)]`.

    A number's code is that of its rank: how many thresholds lie below it. The element that comes
    first lies in the high nibble. A block whose largest magnitude has no finite reciprocal is
    stored as zeros; one that holds a NaN keeps a NaN as its scale; infinity over infinity is no
    number either, and takes the highest rank.
    """
    flat = weight.detach().reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(1) if padded.numel() else flat.new_empty(0)
    inverse = 1 / absmax
    zero = inverse.isinf()
    absmax = torch.where(zero, 0.0, absmax)
    scaled = padded * torch.where(zero, 0.0, inverse)[:, None]
    ranks = (~(scaled[..., None] <= thresholds)).sum(-1).view(-1)[: flat.numel()]
    if ranks.numel() % 2:
        ranks = torch.cat([ranks, (thresholds < 0).sum()[None]])  # that of zero
    found = codes[ranks]
    return (found[::2] << 4 | found[1::2])[:, None], absmax


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-> codes int8 of the weight's shape, absmax float32 `shape[:-1]`.

    code = w * (127 * (1 / absmax)) to the nearest, a tie to the even one: bitsandbytes writes
    127 / absmax, of which torch makes these two roundings. Rows for which that is not finite are
    zeros, a NaN or an infinity is the scale of its row, and what is no number has the code of zero.
    """
    rows = weight.detach().float()
    absmax = rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])
    inverse = 127 * (1 / absmax)
    zero = inverse.isinf()
    scaled = rows * torch.where(zero, 0.0, inverse)[..., None]
    codes = scaled.round().nan_to_num(0.0).to(torch.int8)
    return codes, torch.where(zero, 0.0, absmax)


def nest(absmax: Tensor, dynamic_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes uint8 `[blocks]`, nested absmax float32 `[ceil(blocks / 256)]`, offset `[]`."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK_SIZE))
    blocks = padded.view(-1, NESTED_BLOCK_SIZE)
    nested = blocks.abs().amax(1)
    inverse = torch.where(nested > 0, 1 / nested, 0.0)
    codes = torch.bucketize(blocks * inverse[:, None], midpoints(dynamic_map))
    return codes.view(-1)[: absmax.numel()].to(torch.uint8), nested, offset


def unnest(codes: Tensor, nested: Tensor, dynamic_map: Tensor, offset: Tensor) -> Tensor:
    per_block = nested.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    return dynamic_map[codes.long()] * per_block + offset


def dynamic_map() -> Tensor:
    """The signed 8-bit map of the nested scales (Dettmers et al., 8-bit Optimizers, 2022).

    For each power of ten from 1e-6 to 1, the midpoints of 2^i equal parts of [0.1, 1], with both
    signs; and 0 and 1. A producer's own map is kept with its weight; this one is for new weights.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10.0 ** (i - 6) * middles).tolist()
        values += (-(10.0 ** (i - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def dequantize(
    packed: Tensor, absmax: Tensor, codebook: Tensor, shape: tuple[int, ...], block_size: int
) -> Tensor:
    """-> float32 of this shape; one rounding, that of the product."""
    count = torch.Size(shape).numel()
    data = packed.reshape(-1)
    codes = torch.stack([data >> 4, data & 15], 1).view(-1)[:count]
    return (codebook[codes.long()] * absmax.repeat_interleave(block_size)[:count]).view(shape)


def dequantize_rows(codes: Tensor, absmax: Tensor) -> Tensor:
    """-> float32 of the codes' shape; a scale is rounded once, and the product once."""
    return codes.float() * (absmax / 127)[..., None]


def philox(seed: Tensor, count: int) -> Tensor:
    """The first `count` words of Philox 4x32-10 (Salmon et al., 2011), int64 in [0, 2^32).

    Word i is lane i % 4 of counter (i // 4, 0): every backend draws the same word for an element,
    whatever its tiles are.
    """
    low = 0xFFFFFFFF
    index = torch.arange((count + 3) // 4, device=seed.device)
    counter = [index & low, index >> 32, torch.zeros_like(index), torch.zeros_like(index)]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (second >> 32 & low) ^ counter[1] ^ key[0], second & low,
            (first >> 32 & low) ^ counter[3] ^ key[1], first & low,
        ]  # fmt: skip
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return torch.stack(counter, 1).view(-1)[:count]


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """D(x): keeps an element, over 1 - p, where its word is at least round(p * 2^32)."""
    if p == 0 or seed is None:
        return x
    keep = philox(seed, x.numel()).view(x.shape) >= round(p * 2**32)
    return torch.where(keep, x / (1 - p) if p < 1 else x, 0.0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x `[..., in]`, weight `[out, in]` (dequantised) -> `[..., out]` in x's dtype."""
    y = x @ weight.to(x.dtype).t()
    if lora_a is not None and lora_b is not None:
        down = dropout(x, p, seed) @ lora_a.to(x.dtype).t()
        y = y + scale * (down @ lora_b.to(x.dtype).t())
    return y if bias is None else y + bias.to(x.dtype)


def expert_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
    adapter: Tensor | None = None,
) -> Tensor:
    """x `[rows, in]` sorted by expert, weight `[experts, out, in]`, offsets `[experts + 1]`.

    Rows offsets[e] to offsets[e + 1] belong to expert e. The adapter of a row is that of its
    expert, or adapter[row] where given (-1: none).
    """
    y = x.new_zeros(x.shape[0], weight.shape[1])
    dropped = dropout(x, p, seed)
    bounds = offsets.tolist()
    for e, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        base = linear(x[begin:end], weight[e], None if bias is None else bias[e])
        y = y.index_add(0, torch.arange(begin, end, device=x.device), base)
    if lora_a is None or lora_b is None:
        return y
    if adapter is None:
        adapter = torch.repeat_interleave(torch.arange(len(lora_a)).to(offsets), offsets.diff())
    for g in range(len(lora_a)):
        rows = (adapter == g).nonzero().flatten()
        low_rank = dropped[rows] @ lora_a[g].to(x.dtype).t() @ lora_b[g].to(x.dtype).t()
        y = y.index_add(0, rows, scale * low_rank)
    return y
