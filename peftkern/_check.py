"""Refuses bad arguments, in the same words everywhere: `<name> must <rule>, got <value>`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")


def shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Each entry of `expected` is a size, or a word for an axis that may have any size."""
    if tensor.dim() != len(expected) or any(
        isinstance(want, int) and want != have
        for want, have in zip(expected, tensor.shape, strict=True)
    ):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def dense(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def count(name: str, value: object, least: int = 1) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def parameter(name: str, tensor: Tensor, expected: Sequence[int], like: Tensor) -> None:
    """Any float dtype, but dense and where `like` is."""
    if (
        tensor.shape == expected and tensor.dtype in FLOATS
        and tensor.device == like.device and tensor.is_contiguous()
    ):  # fmt: skip
        return
    shape(name, tensor, expected)
    dtype(name, tensor)
    dense(name, tensor)
    device(name, tensor, like)


def dropout(p: float, seed: Tensor | int | None, like: Tensor) -> None:
    """A seed is looked at only where something is dropped."""
    if not p:
        return
    probability("dropout", p)
    if isinstance(seed, Tensor):
        dtype("seed", seed, [torch.int64])
        shape("seed", seed, [1])
        device("seed", seed, like)
    elif seed is not None:
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an int64 tensor or an int, got {seed!r}")
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit into 64 bits, got {seed}")


def expression(name: str, value: object) -> None:
    """Of modules' names: a string is a regular expression, others are endings."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{name} must be a regular expression, got {value!r} ({error})"
            ) from error
    elif not isinstance(value, Iterable) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")


def listed(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:8]) + (f" and {len(first) - 8} more" if len(first) > 8 else "")
