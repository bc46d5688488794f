"""Operands for the tests of bottleneck."""

import torch

from peftkern.bottleneck import Norm

PARTS = ("bias_down", "bias_up", "scale", "norm", "residual")


def sample(inputs, columns, rank, outputs, dtype=torch.float32, parts=(), lead=()):
    """x, down, up; and by name those of `parts`, with `x` for a residual that is x itself."""
    torch.manual_seed(outputs * 31 + columns)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype)

    x, down, up = (
        draw(*lead, inputs, columns),
        draw(rank, columns) / columns**0.5,
        draw(outputs, rank),
    )
    found = {
        "bias_down": lambda: draw(rank),
        "bias_up": lambda: draw(outputs),
        "scale": lambda: draw(1),
        "norm": lambda: Norm(draw(columns), draw(columns), 1e-5),
        "plain norm": lambda: Norm(),
        "residual": lambda: draw(*lead, inputs, outputs),
    }
    options = {part.removeprefix("plain "): found[part]() for part in parts if part != "x"}
    return x, down, up, options | ({"residual": x} if "x" in parts else {})
