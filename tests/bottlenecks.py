"""Operands for the tests of bottleneck."""

import torch
from torch import Tensor

from peftkern.bottleneck import Norm, reference


def sample(inputs, columns, rank, outputs, dtype=torch.float32, parts=()):
    """x, down, up; and by name those of `parts`, "plain norm" for one without parameters."""
    torch.manual_seed(outputs * 31 + columns)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    x, up = draw(inputs, columns), draw(outputs, rank)
    down = draw(rank, columns) / max(1, columns) ** 0.5
    found = {
        "bias_down": lambda: draw(rank),
        "bias_up": lambda: draw(outputs),
        "scale": lambda: draw(1),
        "plain norm": lambda: Norm(),
        "norm": lambda: Norm(draw(columns), draw(columns), 1e-5),
        "residual": lambda: draw(inputs, outputs),
    }
    return x, down, up, {p.removeprefix("plain "): found[p]() for p in found if p in parts}


def as_reference(x, down, up, options, fn=reference.linear):
    """`fn` as a function of tensors alone, and those tensors; those of the norm may be None."""
    norm = options.get("norm")
    tensors = {k: v for k, v in options.items() if isinstance(v, Tensor) and k != "seed"}
    others = {k: v for k, v in options.items() if k not in tensors}

    def run(x, down, up, weight, bias, *values):
        given = others | dict(zip(tensors, values, strict=True))
        if norm is not None:
            given["norm"] = norm._replace(weight=weight, bias=bias)
        return fn(x, down, up, **given)

    weight, bias = (None, None) if norm is None else norm[:2]
    return run, x, down, up, weight, bias, *tensors.values()
