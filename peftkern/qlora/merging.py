"""The merged weight of a layer: made panel by panel, rounded once, measured where bits are few.

A panel is what the layer's `merged_rows` makes of some rows of its base, so that beside the result
only a few panels are dense; in every forward of a merge-aware layer too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern import _check
from peftkern.qlora import reference
from peftkern.qlora.codes import dequantize, quantize
from peftkern.qlora.weight import QuantizedWeight, stored_as

if TYPE_CHECKING:
    from peftkern.qlora.adapter import LinearAdapter

PANEL = 1 << 22  # elements: 16 MB of float32

MergedRows = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Loss:
    """What few bits keep of a change D of the weight W, where Q(W + D) is stored.

    Args:
        error: |Q(W + D) - (W + D)| / |D|; 1 is as much as leaving the change out.
        cosine: between Q(W + D) - W and D; 0 where nothing of the change is left.
    """

    error: float
    cosine: float


@dataclass(frozen=True)
class Merged:
    """A merged weight that is not in its layer yet.

    Args:
        weight: what the layer is to have.
        loss: None where nothing is lost but one rounding to a float.
    """

    weight: QuantizedWeight | Tensor
    loss: Loss | None = None


@dataclass(frozen=True)
class Original:
    """What a merged layer had; not an attribute of it, which would be one of its parameters.

    Args:
        weight: the very parameter, or the weight around it.
        loss: of the merge.
    """

    weight: QuantizedWeight | Tensor
    loss: Loss | None

    def moved(self, fn: Any) -> Original:
        """As `nn.Module._apply` moves what a module has."""
        weight = self.weight
        parameter: Tensor = weight.packed if isinstance(weight, QuantizedWeight) else weight
        (parameter,) = nn.ParameterList([parameter])._apply(fn)  # type: ignore[no-untyped-call]
        if not isinstance(weight, QuantizedWeight):
            return replace(self, weight=parameter)
        moved = weight.scales_to(parameter.device)
        return replace(self, weight=replace(moved, packed=parameter))


def refuse(name: str, layer: LinearAdapter, dtype: torch.dtype | None, requantize: bool) -> None:
    """Raises where it is not clear what to merge into, before anything is computed."""
    if getattr(layer.weight, "device_mesh", None) is not None:
        raise ValueError(
            f"{name} must be whole to merge, got the shards of fully_shard: save the adapter, and "
            "merge a model in one process"
        )
    if layer.merged:
        raise ValueError(f"{name} must not be merged yet, got a merged layer")
    if dtype is not None and dtype not in _check.FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if dtype is not None and requantize:
        raise ValueError(f"dtype and requantize must not come together, got {dtype} and True")
    weight = layer.quantized_weight
    if weight is not None and dtype is None and not (requantize or layer.merge_aware):
        format = weight.format.name
        raise ValueError(
            f"{name} must have a float base to merge into, got {format}: dtype=torch.bfloat16 "
            f"makes a float weight of it, requantize=True {format} again, which rounds a small "
            "adapter away"
        )


@torch.inference_mode(False)  # whose tensors no later training could use
@torch.no_grad()
def merged(name: str, layer: LinearAdapter, dtype: torch.dtype | None, requantize: bool) -> Merged:
    """The merged weight; the layer stays as it is.

    Raises:
        ValueError, TypeError: as `refuse`, or a value of the merged weight is not finite.
    """
    refuse(name, layer, dtype, requantize)
    base = layer.base
    if not (isinstance(base, QuantizedWeight) and (requantize or layer.merge_aware)):
        dense = _dense(layer, base, dtype or base.dtype)
        _check_finite(name, [dense])
        return Merged(dense)
    packed, *scales = requantized(base, layer.merged_rows)
    weight = replaced(base, stored_as(packed, base.packed.dtype), *scales)
    _check_finite(name, weight.buffers)
    if layer.merge_aware:
        return Merged(weight if dtype is None else weight.dequantize(dtype))
    return Merged(weight, _loss(layer, base, weight))


def _check_finite(name: str, tensors: list[Tensor]) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{name} must have a finite weight once merged, got NaN or infinity")


@torch.no_grad()
def requantized(base: QuantizedWeight, merged_rows: MergedRows) -> list[Tensor]:
    """packed, absmax, nested_absmax, nested_offset of the merged weight; plain, the first two."""
    parts = [
        quantize(merged_rows(panel, rows), base.format, base.block_size)
        for rows, panel in panels(base, torch.float32)
    ]
    packed, absmax = torch.cat([p.packed for p in parts]), torch.cat([p.absmax for p in parts])
    if base.nested_map is None:
        return [packed, absmax]
    return [packed, *reference.nest(absmax, base.nested_map)]


def replaced(
    base: QuantizedWeight, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> QuantizedWeight:  # fmt: skip
    """What `requantized` made, in the place of the base's."""
    return replace(
        base, packed=packed, absmax=absmax, nested_absmax=nested_absmax,
        nested_offset=nested_offset,
    )  # fmt: skip


def adding(a: Tensor, b: Tensor, scale: float) -> MergedRows:
    """What adds scale * B A to rows of a weight, in the dtype in which they come."""

    def merged_rows(panel: Tensor, rows: slice) -> Tensor:
        # In place, which autocast leaves in its dtype.
        low_rank = torch.empty_like(panel)
        low_rank.addmm_(b[rows].to(panel.dtype), a.to(panel.dtype), beta=0, alpha=scale)
        return low_rank.add_(panel)

    return merged_rows


def panels(weight: QuantizedWeight | Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight's rows, dense and in `dtype`, a slice at a time; no block straddles two slices."""
    rows, columns = weight.shape
    block = weight.block_size if isinstance(weight, QuantizedWeight) else None
    block = block or 1  # a scale for each row parts no row
    unit = block // math.gcd(columns, block)
    step = unit * max(PANEL // max(columns, 1) // unit, 1)
    plain = _plain(weight) if isinstance(weight, QuantizedWeight) else weight
    for begin in range(0, rows, step):
        part = slice(begin, min(begin + step, rows))
        if isinstance(plain, QuantizedWeight):
            yield part, dequantize(_rows(plain, part), dtype)
        else:
            yield part, plain[part].to(dtype)


def _plain(weight: QuantizedWeight) -> QuantizedWeight:
    """With its scales decoded, whose blocks of 256 end anywhere in a row."""
    if weight.nested_absmax is None:
        return weight
    assert weight.nested_map is not None and weight.nested_offset is not None
    scales = reference.unnest(
        weight.absmax, weight.nested_absmax, weight.nested_map, weight.nested_offset
    )
    return replace(weight, absmax=scales, nested_absmax=None, nested_map=None, nested_offset=None)


def _rows(weight: QuantizedWeight, part: slice) -> QuantizedWeight:
    """These rows, which begin where a block begins; in the same storage."""
    columns, block = weight.shape[1], weight.block_size
    shape = torch.Size([part.stop - part.start, columns])
    if block is None:
        return replace(weight, packed=weight.packed[part], absmax=weight.absmax[part], shape=shape)
    begin, end, codes = part.start * columns, part.stop * columns, 8 // weight.format.bits
    return replace(
        weight,
        packed=stored_as(weight.packed, torch.uint8)[begin // codes : -(-end // codes)],
        absmax=weight.absmax[begin // block : -(-end // block)],
        shape=shape,
    )


def _dense(layer: LinearAdapter, base: QuantizedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    double = torch.float64 in (base.dtype, dtype)
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    for rows, panel in panels(base, torch.float64 if double else torch.float32):
        out[rows] = layer.merged_rows(panel, rows)
    return out


def _loss(layer: LinearAdapter, base: QuantizedWeight, weight: QuantizedWeight) -> Loss | None:
    """None where there is no change to lose."""
    change_2 = error_2 = kept_2 = product = 0.0
    for (rows, old), (_, new) in zip(
        panels(base, torch.float32), panels(weight, torch.float32), strict=True
    ):
        wanted = layer.merged_rows(old, rows)
        change, error, kept = wanted - old, new - wanted, new - old
        change_2 += _dot(change, change)
        error_2 += _dot(error, error)
        kept_2 += _dot(kept, kept)
        product += _dot(kept, change)
    if change_2 == 0:
        return None
    cosine = product / math.sqrt(kept_2 * change_2) if kept_2 else 0.0
    return Loss(math.sqrt(error_2 / change_2), cosine)


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def warn(losses: dict[str, Loss]) -> None:
    """Once for all layers that were requantised."""
    if not losses:
        return
    worst = max(losses, key=lambda name: losses[name].error)
    error, cosine = (median(getattr(x, n) for x in losses.values()) for n in ("error", "cosine"))
    warnings.warn(
        f"requantize=True stores Q(W + D) for W + D in {len(losses)} layers: relative error of the "
        f"change D {error:.3g} (median; {losses[worst].error:.3g} in {worst}), cosine of what is "
        f"left of it with D {cosine:.2f}. A float weight (dtype=torch.bfloat16) keeps it; "
        "LoraConfig(merge_aware=True) trains for it",
        stacklevel=3,
    )


def take(layer: LinearAdapter, merged: Merged) -> None:
    """Puts the merged weight in, and keeps the original."""
    layer.original = Original(layer.base, merged.loss)
    layer.set_base(merged.weight)


def give_back(name: str, layer: LinearAdapter) -> None:
    if layer.original is None:
        raise ValueError(f"{name} must be merged, got a layer that is not")
    layer.set_base(layer.original.weight)
    layer.original = None


def refuse_training(layer: LinearAdapter) -> None:
    """Raises rather than let a step train nothing."""
    trains = any(parameter.requires_grad for parameter in layer.trained())
    if layer.training and trains and torch.is_grad_enabled():
        raise RuntimeError(
            "layer must be unmerged to train, got a merged one in training mode: unmerge it, call "
            "eval(), or freeze its adapter"
        )
