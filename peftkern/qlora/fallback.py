"""The ops in plain torch, with the gradient by hand, for devices that have no kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peftkern.qlora import reference


def quantize(
    weight: Tensor, tables: Sequence[Tensor], block_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    if bits == 8:
        return reference.quantize_rows(weight)
    thresholds, codes = tables
    return reference.quantize(weight, thresholds, codes, block_size)


def dequantize(weight: Sequence[Tensor], layout: Sequence[int], out: Tensor) -> None:
    out.copy_(dense(weight, layout).view(out.shape))


def linear(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, scale: float, dropout: float,
    seed: Tensor | None, offsets: Tensor | None, adapter: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    flat, w = _rows(x), dense(weight, layout).to(x.dtype)
    y = flat.new_zeros(len(flat), layout[1])
    for e, rows in _expert_rows(flat, offsets):
        y[rows] = reference.linear(flat[rows], w[e], None if bias is None else _at(bias, 1, e))
    rank = 0 if lora_a is None else lora_a.shape[-2]
    down = flat.new_zeros(len(flat), rank, dtype=torch.promote_types(x.dtype, torch.float32))
    if lora_a is not None and lora_b is not None:
        dropped = reference.dropout(flat, dropout, seed)
        for g, chosen in _adapter_rows(flat, lora_a, offsets, adapter):
            down[chosen] = (dropped[chosen] @ _at(lora_a, 2, g).to(x.dtype).t()).to(down.dtype)
            y[chosen] += scale * (down[chosen].to(x.dtype) @ _at(lora_b, 2, g).to(x.dtype).t())
    return y.view(*x.shape[:-1], layout[1]), down


def decode(
    x: Tensor, weight: Sequence[Tensor], layout: Sequence[int], bias: Tensor | None,
    down: Tensor | None, lora_b: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    y = reference.linear(x, dense(weight, layout)[0], None if bias is None else bias.view(-1))
    if down is not None and lora_b is not None:
        up = lora_b.view(layout[1], down.shape[-1]).to(x.dtype)
        y += scale * (down.to(x.dtype) @ up.t())
    return y


def linear_bwd(
    grad: Tensor, x: Tensor | None, down: Tensor, weight: Sequence[Tensor], layout: Sequence[int],
    bias: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scale: float,
    dropout: float, seed: Tensor | None, offsets: Tensor | None, adapter: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    g, w = _rows(grad), dense(weight, layout)
    flat = g.new_empty(0) if x is None else _rows(x)  # none comes where none is needed
    originals = (grad.new_empty(*grad.shape[:-1], layout[2]), weight[0], bias, lora_a, lora_b)
    grad_x, grad_w, grad_bias, grad_a, grad_b = grads = [
        torch.zeros(t.shape, dtype=grad.dtype, device=grad.device)
        if need and t is not None
        else None
        for t, need in zip(originals, needs, strict=True)
    ]
    for e, rows in _expert_rows(g, offsets):
        if grad_x is not None:
            _rows(grad_x)[rows] = g[rows] @ w[e].to(g.dtype)
        if grad_w is not None:
            grad_w.view(w.shape)[e] = g[rows].t() @ flat[rows]
        if grad_bias is not None:
            _at(grad_bias, 1, e).copy_(g[rows].sum(0))
    if lora_a is not None and lora_b is not None:
        dropped = flat if grad_a is None else reference.dropout(flat, dropout, seed)
        low_rank = g.new_zeros(len(g), layout[2])
        for i, chosen in _adapter_rows(g, lora_a, offsets, adapter):
            up = scale * (g[chosen] @ _at(lora_b, 2, i).to(g.dtype))
            if grad_b is not None:
                _at(grad_b, 2, i).copy_(scale * (g[chosen].t() @ down[chosen].to(g.dtype)))
            if grad_a is not None:
                _at(grad_a, 2, i).copy_(up.t() @ dropped[chosen])
            low_rank[chosen] = up @ _at(lora_a, 2, i).to(g.dtype)
        if grad_x is not None:
            grad_x += reference.dropout(low_rank, dropout, seed).view(grad_x.shape)
    return [
        g.to(t.dtype)
        for g, t in zip(grads, originals, strict=True)
        if g is not None and t is not None
    ]


def _rows(x: Tensor) -> Tensor:
    """`[rows, columns]`, a view where x is whole."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


def dense(weight: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    """`[experts, rows, columns]`, float32 unless it was dense already."""
    *shape, block_size, bits = layout
    if bits == 0:
        return weight[0].view(shape)
    if bits == 8:
        codes, absmax = weight
        return reference.dequantize_rows(codes.view(shape), absmax.view(shape[:-1]))
    packed, absmax, codebook, *nested = weight
    scales = reference.unnest(absmax, *nested) if nested else absmax
    return reference.dequantize(packed, scales, codebook, tuple(shape), block_size)


def _at(tensor: Tensor, dim: int, index: int) -> Tensor:
    """One expert's or adapter's part, of a tensor that has no such axis where there is only one."""
    return tensor if tensor.dim() == dim else tensor[index]


def _expert_rows(x: Tensor, offsets: Tensor | None) -> Iterator[tuple[int, slice]]:
    bounds = [0, len(x)] if offsets is None else offsets.tolist()
    for e, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield e, slice(begin, end)


def _adapter_rows(
    x: Tensor, lora_a: Tensor, offsets: Tensor | None, adapter: Tensor | None
) -> Iterator[tuple[int, Tensor | slice]]:
    if adapter is None:
        yield from _expert_rows(x, offsets)
    else:
        for g in range(len(lora_a)):
            yield g, (adapter == g).nonzero().flatten()
