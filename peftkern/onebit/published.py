"""The flat binary that Bi-AdaptFormer and Bi-LoRA were published in, both ways.

One matrix after the other, as `model.named_modules()` meets them (an adapter's `down`, then its
`up`): its codes in one row, without a gap between its own rows, the first in the low bits; then its
mean, then its std, each a float32. After them, if at all, the weight of a head and its bias, in
float32. Numbers are little-endian, as on every machine that has written such a file. There is no
name, no shape, no scale and no version in it: whoever reads it has the model and its config.

The published writer drops the codes of a last byte that it cannot fill, and its reader then takes
bytes of the mean for them. We write that byte, with zeros in its upper bits; a file without it is
refused.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from peftkern import _folder, _sharded
from peftkern.onebit.codes import pack, unpack
from peftkern.onebit.pair import Pair
from peftkern.onebit.weight import OneBitWeight

Model = TypeVar("Model", bound=nn.Module)

STATISTICS = 8  # bytes of a mean and a std


def export_bits(
    model: nn.Module, path: str | os.PathLike[str], head: nn.Module | None = None
) -> None:
    """Writes the model's 1-bit adapters as they were published, and nothing that could tell whose.

    Killed at any moment, it leaves the file that was there, or the new one.

    Args:
        model: has 1-bit adapters; of each pair `down` is written first, in the model's order.
        path: the file.
        head: a linear whose weight and bias follow in float32, as they do in the published files of
            a head that is not quantised.

    Raises:
        ValueError: the model has no 1-bit adapter, or a latent that is not finite.
    """
    layers = _pairs(model)
    _sharded.settle(model)
    data = [_flat(weight) for layer in layers for weight in layer.weights()]
    data += [_floats(_sharded.whole(tensor)) for tensor in _parameters(head)]
    with _sharded.first_process(model.parameters()) as first:
        if first:
            _folder.replace(Path(path), b"".join(data))


def import_bits(model: Model, path: str | os.PathLike[str], head: nn.Module | None = None) -> Model:
    """Reads what `export_bits` or the published code has written; the model then computes on it.

    In place, and all or nothing. Training from there starts at latents of one value a level, with
    the file's mean and std: the bits are all that is known of those it was trained to.

    Args:
        model: has the 1-bit adapters of the file: as many, of the same shapes, bits and order.
            Their scale is not in the file, and stays.
        path: the file.
        head: a linear that takes the weight and bias at the file's end.

    Returns:
        The same model.

    Raises:
        ValueError: the file has another length than the model's adapters, or a value in it is not
            finite.
    """
    layers, data = _pairs(model), Path(path).read_bytes()
    _sharded.settle(model)
    shapes = [(m.shape, layer.bits) for layer in layers for m in layer.latents()]
    weights, rest = _parsed(data, shapes, [p.numel() for p in _parameters(head)])
    found = iter(weights)
    pairs = [(layer, (next(found), next(found))) for layer in layers]
    for layer, pair in pairs:
        layer.set_bits(*pair)
    with torch.no_grad():
        for parameter, values in zip(_parameters(head), rest, strict=True):
            _sharded.fill(parameter, values.view(parameter.shape))
    return model


def _pairs(model: nn.Module) -> list[Pair]:
    if not (layers := [module for module in model.modules() if isinstance(module, Pair)]):
        raise ValueError("model must have 1-bit adapters (OneBitConfig puts them in), got none")
    return layers


def _parameters(head: nn.Module | None) -> list[Tensor]:
    if head is None:
        return []
    return [p for name in ("weight", "bias") if (p := getattr(head, name)) is not None]


def _flat(weight: OneBitWeight) -> bytes:
    codes = unpack(weight.packed, weight.bits, weight.shape[1])
    packed = pack(codes.reshape(-1), weight.bits)
    return bytes(packed.tolist()) + _floats(weight.statistics)


def _floats(tensor: Tensor) -> bytes:
    values = tensor.detach().float().flatten().tolist()
    return struct.pack(f"<{len(values)}f", *values)


def _read_floats(data: bytes) -> Tensor:
    return torch.tensor(struct.unpack(f"<{len(data) // 4}f", data), dtype=torch.float32)


def _length(shape: Sequence[int], bits: int) -> int:
    """Bytes of a matrix's codes."""
    return -(-shape[0] * shape[1] * bits // 8)


def _parsed(
    data: bytes, shapes: Iterable[tuple[Sequence[int], int]], rest: Sequence[int]
) -> tuple[list[OneBitWeight], list[Tensor]]:
    """The matrices, and the float32 tensors of so many elements that follow them."""
    shapes = list(shapes)
    want = sum(_length(*one) + STATISTICS for one in shapes) + 4 * sum(rest)
    if len(data) != want:
        raise ValueError(
            f"path must be a file of {want:,} bytes for {len(shapes)} matrices of this model"
            f"{' and its head' if rest else ''}, got {len(data):,} bytes"
            + _known_reason(len(data) - want, shapes)
        )
    weights, at = [], 0
    for number, (shape, bits) in enumerate(shapes):
        middle = at + _length(shape, bits)
        codes = unpack(
            torch.frombuffer(bytearray(data[at:middle]), dtype=torch.uint8),
            bits,
            shape[0] * shape[1],
        )
        at = middle + STATISTICS
        mean, std = _read_floats(data[middle:at])
        if not (mean.isfinite() and std.isfinite() and std >= 0):
            raise ValueError(
                f"path must hold a mean and a std for each matrix, got {mean:g} and {std:g} for "
                f"number {number}: is this file of another model, or of another order of bytes?"
            )
        packed = pack(codes.view(*shape), bits)
        weights.append(OneBitWeight(packed, mean, std, torch.Size(shape), bits, torch.float32))
    tensors = torch.split(_read_floats(data[at:]), list(rest)) if rest else ()
    return weights, list(tensors)


def _known_reason(excess: int, shapes: list[tuple[Sequence[int], int]]) -> str:
    dropped = sum(bool(s[0] * s[1] * bits % 8) for s, bits in shapes)
    if dropped and excess == -dropped:
        return ": the published code has dropped the last codes of some, perhaps"
    return ": a head follows the matrices, perhaps" if excess > 0 and excess % 4 == 0 else ""
