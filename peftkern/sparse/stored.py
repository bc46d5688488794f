"""A support as files hold it: the values of all entries that have ever trained, and where they are.

Which base they belong to is told by 64 bits of a hash over the whole of it: values without their
weights are no adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern import _check
from peftkern._family import Parts, Wanted
from peftkern.qlora.weight import QuantizedWeight
from peftkern.sparse.pattern import Pattern, matrix_shape, memory
from peftkern.sparse.state import State, common, put, take

_CHUNK = 2**22  # elements that are hashed at a time, and copied from their device


def learned(state: State, weight: Tensor, values: Tensor) -> Tensor:
    """The values on `state.origin`: of entries that no longer train, those that they had last."""
    values = values.detach()
    if state.origin is state.pattern:
        return values
    _, places = common(state.pattern, state.origin)
    found = take(weight, state.origin) if state.learned is None else state.learned
    found = found.to(values.dtype, copy=True)
    found[places] = values
    return found


def parts(name: str, state: State, weight: Tensor, values: Tensor) -> Parts:
    row_start, columns = state.origin.csr().tensors
    return {
        f"{name}.values": learned(state, weight, values),
        f"{name}.columns": columns,
        f"{name}.row_start": row_start,
    }


def wanted(name: str, shape: Sequence[int]) -> Wanted:
    """Of a parameter of this shape; how many entries there are, the file says."""
    return {
        f"{name}.values": (["entries"], True),
        f"{name}.columns": (["entries"], True),
        f"{name}.row_start": ([matrix_shape(shape)[0] + 1], True),
    }


def unpacked(name: str, found: Parts, shape: Sequence[int]) -> tuple[Pattern, Tensor]:
    """Raises TypeError or ValueError where the parts make no pattern of this shape."""
    row_start, columns = found[f"{name}.row_start"], found[f"{name}.columns"]
    values = found[f"{name}.values"]
    try:
        pattern = Pattern.from_csr(row_start, columns, matrix_shape(shape))
    except IndexError as error:  # of a file a wrong value is one like any other
        raise ValueError(f"{name}.{error}") from error
    _check.dtype(f"{name}.values", values)
    _check.shape(f"{name}.values", values, [pattern.nnz])
    return pattern, values


@torch.no_grad()
def base_hash(weight: Tensor | QuantizedWeight, state: State | None = None) -> str:
    """The first 64 bits of SHA-256 over dtype, shape and bytes of what a weight was before.

    Args:
        weight: as it is now.
        state: of what has been written into it since.
    """
    if isinstance(weight, QuantizedWeight):
        buffers, title = weight.buffers, f"{weight.format.name} {list(weight.shape)}"
    else:
        if state is not None and state.base is not None and state.base.numel():
            weight = weight.detach().clone()
            put(weight, state.origin, state.base)
        buffers = [weight.detach()]
        title = f"{str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
    digest = hashlib.sha256(title.encode())
    for buffer in buffers:
        for chunk in buffer.contiguous().view(-1).split(_CHUNK):  # type: ignore[no-untyped-call]
            if chunk.numel():
                digest.update(memory(chunk.cpu()))
    return digest.hexdigest()[:16]
