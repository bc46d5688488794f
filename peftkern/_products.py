"""What a swapped layer computes of its base's weight and its adapters: what peft computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern._conditions import Adapter
from peftkern.qlora import QuantizedWeight, dora, expert_linear
from peftkern.qlora.transposed import add_low_rank, linear

NORMS = "_peftkern_norms"  # the attribute of a layer that holds its `dora.Norms`, by adapter


def adapted(
    layer: nn.Module, base: nn.Module, weight: Tensor | QuantizedWeight, adapters: list[Adapter],
    x: Tensor, names: Sequence[str] | None,
) -> Tensor:  # fmt: skip
    """The layer's output, where `_conditions` has found nothing against it.

    Args:
        layer: of peft, or a linear of bitsandbytes, which has no adapters.
        base: the module of the weight.
        weight: `[out, in]`, as `_swapped.weight_of` has it.
        adapters: those at work.
        names: peft's `adapter_names`.
    """
    bias, inner = base._parameters["bias"], in_compute_dtype(base, x)
    if adapters and names is not None:
        y = _mixed(inner, weight, bias, adapters, names)
    elif any(one.magnitude is not None for one in adapters):
        y = _with_magnitudes(layer, inner, weight, bias, adapters)
    else:
        y = linear(inner, weight, bias, *(_summed(adapters) if adapters else ()))
    return y if isinstance(weight, Tensor) else y.to(x.dtype)


def _summed(adapters: list[Adapter]) -> tuple[Tensor, Tensor, float, float]:
    """A, B, scale and dropout of their sum."""
    if len(adapters) == 1:
        one = adapters[0]
        return one.down.weight, one.up.weight, one.scale, one.dropout
    # One pass of the summed ranks: copying A and B costs less than another pass over x and y.
    a = torch.cat([one.down.weight for one in adapters])
    return a, torch.cat([one.up.weight * one.scale for one in adapters], 1), 1.0, 0.0


def _with_magnitudes(
    layer: Any, x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None,
    adapters: list[Adapter],
) -> Tensor:  # fmt: skip
    """As peft has DoRA: a magnitude scales the base and every adapter up to its own, in turn.

    Its dropout takes elements from x for the low-rank term, and for the share (m / n - 1) of the
    base's product, so for all of it but (x - D(x)) W^T.
    """
    *_, last = adapters
    if last.magnitude is not None and last.dropout:  # which is alone then
        dropped = layer.lora_dropout[last.name](x)
        product = linear(dropped, weight, None, last.down.weight, last.up.weight, last.scale)
        product = dora.rescale(product, last.magnitude, _norms(layer, weight, last), None)
        return linear(x - dropped, weight, bias) + product
    y: Tensor | None = None
    waiting: list[Adapter] = []
    for one in adapters:
        waiting.append(one)
        if one.magnitude is None and one is not last:
            continue
        sums = _summed(waiting)
        y = linear(x, weight, None, *sums) if y is None else add_low_rank(y, x, *sums)
        waiting = []
        added = bias if one is last else None
        if one.magnitude is not None:
            y = dora.rescale(y, one.magnitude, _norms(layer, weight, one), added)
        elif added is not None:
            y = y + added.to(y.dtype)
    assert y is not None
    return y


def _norms(layer: nn.Module, weight: Tensor | QuantizedWeight, one: Adapter) -> Tensor:
    a, b = one.down.weight, one.up.weight
    if torch.compiler.is_compiling():  # a graph keeps nothing between its calls
        return dora.norms(weight, dora.squares(weight), a, b, one.scale)
    kept: dict[str, dora.Norms] = vars(layer).setdefault(NORMS, {})
    return kept.setdefault(one.name, dora.Norms())(weight, a, b, one.scale, [a, b])


def _mixed(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, adapters: list[Adapter],
    names: Sequence[str],
) -> Tensor:  # fmt: skip
    """Each sample's rows belong to one adapter, or to none (-1)."""
    index = {one.name: i for i, one in enumerate(adapters)}
    chosen = [index.get(name, -1) for name in names]
    rows = x.flatten(0, -2)
    adapter = torch.tensor(chosen, dtype=torch.int32, device=x.device)
    y = expert_linear(
        rows,
        weight[None] if isinstance(weight, Tensor) else _as_expert(weight),
        torch.tensor([0, len(rows)], device=x.device),
        None if bias is None else bias[None],
        torch.stack([one.down.weight for one in adapters]),
        torch.stack([one.up.weight * one.scale for one in adapters]),
        adapter=adapter.repeat_interleave(len(rows) // max(len(x), 1)),
    )
    return y.view(*x.shape[:-1], -1)


def _as_expert(weight: QuantizedWeight) -> QuantizedWeight:
    shape = torch.Size([1, *weight.shape])
    if weight.block_size:
        return replace(weight, shape=shape)
    return replace(weight, packed=weight.packed[None], absmax=weight.absmax[None], shape=shape)


def in_compute_dtype(base: nn.Module, x: Tensor) -> Tensor:
    """As bitsandbytes where that is the narrower one; sums run in float32 in any case."""
    wanted = getattr(base, "compute_dtype", None)
    narrower = x.dtype == torch.float32 and wanted in (torch.bfloat16, torch.float16)
    return x.to(wanted) if narrower else x
