"""bitsandbytes' quantised weights, in memory and in a state dict, and ours: the same bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern.qlora import reference
from peftkern.qlora.format import BLOCK_SIZES, Format, find_format, formats
from peftkern.qlora.weight import QuantizedWeight, stored_as

if TYPE_CHECKING:
    from bitsandbytes.nn import Int8Params, Params4bit

READ_BLOCK_SIZES = BLOCK_SIZES[1:]
SCALES, ORDER = "SCB", "weight_format"  # of 8 bits; 0 is the one order left: row after row
REPACKED = "bitsandbytes has repacked it at an eval forward, with other scales"


def taken(params: nn.Parameter | nn.Module) -> QuantizedWeight:
    """See `QuantizedWeight.from_bnb`."""
    if (state := _state_4bit(params)) is not None:
        return _taken_4bit(_weight(params), state)
    codes, scales = _state_8bit(params)
    if codes is None or scales is None:
        name = type(params).__name__
        raise TypeError(f"params must be a quantised Params4bit or Int8Params, got {name}")
    # bitsandbytes rounds to float16 before it quantises.
    return QuantizedWeight(codes, scales, None, codes.shape, torch.float16, formats["int8"], None)


def is_quantized(module: nn.Module) -> bool:
    """Whether `taken` takes it, or says why it cannot."""
    return _state_4bit(module) is not None or None not in _state_8bit(module)


def _weight(params: Any) -> Tensor:
    weight: Tensor = getattr(params, "weight", params)
    return weight


def _state_4bit(params: Any) -> Any:
    """On the weight; on the layer alone where the weight has been sharded and put back."""
    own = getattr(_weight(params), "quant_state", None)
    return own if own is not None else getattr(params, "quant_state", None)


def _state_8bit(params: Any) -> tuple[Tensor | None, Tensor | None]:
    """Codes and scales: on the weight before the first forward, on the layer's state after it."""
    weight, state = _weight(params), getattr(params, "state", None)
    scales = getattr(weight, SCALES, None)
    if scales is None:
        scales = getattr(state, SCALES, None)
    if scales is None or weight.dtype != torch.int8:
        return None, None
    return weight.data, scales


def _taken_4bit(packed: Tensor, state: Any) -> QuantizedWeight:
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("params must be as they were quantised, got them repacked for a CPU")
    second = state.state2 if state.nested else None
    if second and second.blocksize != reference.NESTED_BLOCK_SIZE:
        wanted = reference.NESTED_BLOCK_SIZE
        raise ValueError(f"nested_blocksize must be {wanted}, got {second.blocksize}")
    return QuantizedWeight(
        packed=packed.data.reshape(-1, 1),
        absmax=state.absmax,
        codebook=state.code,
        shape=torch.Size(state.shape),
        dtype=state.dtype,
        format=find_format(state.quant_type),
        block_size=state.blocksize,
        nested_absmax=second.absmax if second else None,
        nested_map=second.code if second else None,
        nested_offset=torch.as_tensor(state.offset) if second else None,
    )


def given(weight: QuantizedWeight) -> Params4bit | Int8Params:
    """See `QuantizedWeight.to_bnb`."""
    if weight.format not in formats.values():
        known = ", ".join(formats)
        raise ValueError(f"format must be one of {known} for bitsandbytes, got {weight.format}")
    return _given_4bit(weight) if weight.format.in_blocks else _given_8bit(weight)


def _given_8bit(weight: QuantizedWeight) -> Int8Params:
    from bitsandbytes.nn import Int8Params

    if len(weight.shape) != 2:
        shape = list(weight.shape)
        raise ValueError(f"weight must have shape [out, in] for bitsandbytes' int8, got {shape}")
    codes, scales = weight.packed.data, weight.absmax
    return Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)


def _given_4bit(weight: QuantizedWeight) -> Params4bit:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    if weight.block_size not in READ_BLOCK_SIZES:
        raise ValueError(
            f"block_size must be one of {READ_BLOCK_SIZES} for bitsandbytes, "
            f"got {weight.block_size}"
        )
    nested: dict[str, Any] = {}
    if weight.nested:
        second = QuantState(
            absmax=weight.nested_absmax,
            code=weight.nested_map,
            blocksize=reference.NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        nested = {"offset": weight.nested_offset, "state2": second}
    state = QuantState(
        absmax=weight.absmax,
        shape=weight.shape,
        code=weight.codebook,
        blocksize=weight.block_size,
        quant_type=weight.format.name,
        dtype=weight.dtype,
        **nested,
    )
    return Params4bit(
        data=weight.packed.data,
        requires_grad=False,
        quant_state=state,
        blocksize=weight.block_size,
        compress_statistics=weight.nested,
        quant_type=weight.format.name,
        quant_storage=weight.packed.dtype,
        bnb_quantized=True,
    )


def statistics(weight: QuantizedWeight) -> dict[str, Tensor]:
    """All but the packed codes, under bitsandbytes' keys in the state dict of a layer."""
    if not weight.format.in_blocks:
        return {SCALES: weight.absmax, ORDER: torch.tensor(0, dtype=torch.uint8)}
    assert weight.codebook is not None
    named = {"weight.absmax": weight.absmax, "weight.quant_map": weight.codebook}
    facts: dict[str, Any] = {
        "quant_type": weight.format.name,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested:
        assert weight.nested_absmax is not None and weight.nested_map is not None
        assert weight.nested_offset is not None
        named["weight.nested_absmax"] = weight.nested_absmax
        named["weight.nested_quant_map"] = weight.nested_map
        facts["nested_blocksize"] = reference.NESTED_BLOCK_SIZE
        facts["nested_dtype"] = "float32"
        facts["nested_offset"] = weight.nested_offset.item()
    text = bytearray(json.dumps(facts).encode())
    return named | {_facts_key(weight.format): torch.frombuffer(text, dtype=torch.uint8)}


def is_statistic(key: str) -> bool:
    """Whether a layer's state dict has under this key a part of its weight."""
    return key.startswith("weight.") or key in (SCALES, ORDER)


def _facts_key(form: Format) -> str:
    return f"weight.quant_state.bitsandbytes__{form.name}"


def loaded(like: QuantizedWeight, packed: Tensor, named: dict[str, Tensor]) -> QuantizedWeight:
    """The weight that a state dict holds, which must be of the format and shape of `like`.

    Args:
        like: what it will replace; its storage dtype is kept.
        packed: under the key `weight`.
        named: what `statistics` gave, for this or another weight.

    Raises:
        ValueError: a part is missing or does not fit.
    """
    read = _loaded_4bit if like.format.in_blocks else _loaded_8bit
    weight = read(like, packed, named)
    if weight.shape != like.shape:
        raise ValueError(f"shape must be {list(like.shape)}, got {list(weight.shape)}")
    return weight


def _require(named: dict[str, Tensor], *keys: str) -> None:
    missing = [key for key in keys if key not in named]
    if missing:
        raise ValueError(f"state_dict must have {', '.join(missing)}, got {sorted(named)}")


def _loaded_8bit(like: QuantizedWeight, codes: Tensor, named: dict[str, Tensor]) -> QuantizedWeight:
    _require(named, SCALES)
    if (order := named.get(ORDER)) is not None and order.any():
        raise ValueError(f"{ORDER} must be 0, row after row, got {order.tolist()}")
    scales = named[SCALES]
    return QuantizedWeight(codes, scales, None, codes.shape, like.dtype, like.format, None)


def _loaded_4bit(
    like: QuantizedWeight, packed: Tensor, named: dict[str, Tensor]
) -> QuantizedWeight:
    key = _facts_key(like.format)
    _require(named, "weight.absmax", "weight.quant_map", key)
    if named["weight.absmax"].dtype == torch.bfloat16:
        raise ValueError(f"absmax must be as it was quantised, got bfloat16: {REPACKED}")
    nested = "weight.nested_absmax" in named
    try:
        facts = json.loads(bytes(named[key].tolist()))
        offset = facts["nested_offset"] if nested else 0.0
        if nested and facts["nested_blocksize"] != reference.NESTED_BLOCK_SIZE:
            raise ValueError(f"nested_blocksize {facts['nested_blocksize']}")
        return QuantizedWeight(
            packed=stored_as(packed.reshape(-1, 1), like.packed.dtype),
            absmax=named["weight.absmax"],
            codebook=named["weight.quant_map"],
            shape=torch.Size(facts["shape"]),
            dtype=getattr(torch, facts["dtype"]),
            format=like.format,
            block_size=facts["blocksize"],
            nested_absmax=named["weight.nested_absmax"] if nested else None,
            nested_map=named["weight.nested_quant_map"] if nested else None,
            nested_offset=torch.tensor(offset, dtype=torch.float32) if nested else None,
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{key} must be what bitsandbytes writes, got {error!r}") from error
