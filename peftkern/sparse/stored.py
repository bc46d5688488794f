"""A support as files hold it: the values of all entries that have ever trained, and where they are.

Which base they belong to is told by 64 bits of a hash over the whole of it: values without their
weights are no adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

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


def check(
    module: str,
    found: Parts,
    hashes: Any,
    shapes: Mapping[str, Sequence[int]],
    bases: Mapping[str, str],
) -> None:
    """Raises TypeError or ValueError unless the parts are those of supports on these very bases.

    Args:
        module: its name.
        found: of that module, in the wanted shapes.
        hashes: by its parameters' names, as the file has them.
        shapes, bases: by the same names, of the module's weights.
    """
    for name, shape in shapes.items():
        unpacked(name, found, shape)
        stated = hashes.get(name) if isinstance(hashes, dict) else None
        if stated != bases[name]:
            title = f"{module}.{name}".lstrip(".")
            raise ValueError(
                f"{title} must be the base that the adapter belongs to, with hash {stated}, got "
                f"one with {bases[name]}"
            )


# Of a state dict: the entries of `State.origin`, which of them still train, and what they were.
STATE_PARTS = ("columns", "row_start", "kept", "base")


def state_parts(state: State) -> Parts:
    row_start, columns = state.origin.csr().tensors
    found = {"columns": columns, "row_start": row_start}
    if state.origin is not state.pattern:
        kept = torch.zeros(state.origin.nnz, dtype=torch.bool, device=columns.device)
        kept[common(state.pattern, state.origin)[1]] = True
        found["kept"] = kept
    return found if state.base is None else found | {"base": state.base}


def loaded(
    found: Mapping[str, Tensor | None], values: Tensor, state: State, shape: Sequence[int]
) -> tuple[Pattern, Pattern, Tensor | None]:
    """The pattern, the origin and the base that a state dict tells of.

    Raises:
        TypeError, ValueError: a part is missing, or does not fit.
    """
    columns, row_start, kept, base = (found[name] for name in STATE_PARTS)
    if columns is None or row_start is None or (base is None) != (state.base is None):
        wanted = ["columns", "row_start"] + ["base"] * (state.base is not None)
        have = [name for name, part in found.items() if part is not None]
        raise ValueError(f"state_dict must have {', '.join(wanted)}, got {', '.join(have)}")
    device = state.pattern.device
    try:
        origin = Pattern.from_csr(row_start, columns, matrix_shape(shape)).to(device)
    except IndexError as error:
        raise ValueError(str(error)) from error
    pattern = origin
    if kept is not None:
        _check.shape("kept", kept, [origin.nnz])
        rows, places = (index[kept.to(device)] for index in origin.indices())
        pattern = Pattern.from_indices(rows, places, origin.shape)
    _check.shape("values", values, [pattern.nnz])
    if base is not None:
        _check.shape("base", base, [origin.nnz])
        assert state.base is not None
        base = base.to(device, state.base.dtype, copy=True)
    return pattern, origin, base


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
