"""What tiles are searched on: calls of a kernel, with what they have to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from peftkern import qlora
from peftkern.kernels import qlora_paths as paths

from .check import Tensors, relative_error

Call = Callable[[], Tensors]
Timer = Callable[[Call, int], float]  # the seconds of a call, by so many measurements of it
Draw = Callable[..., Tensor]

RANK = 16
TOLERANCE = 2e-2  # a bfloat16 product with sums in any order is within a few times 2^-9


def gemm(draw: Draw, count: int, outputs: int, inputs: int) -> tuple[Call, Tensors]:
    x, weight = draw(count, inputs).bfloat16(), qlora.quantize(draw(outputs, inputs))
    truth = x.float() @ weight.dequantize(torch.float32).t()
    return lambda: (qlora.linear(x, weight),), (truth,)


def down(draw: Draw, count: int, outputs: int, inputs: int) -> tuple[Call, Tensors]:
    from peftkern.kernels.qlora_forward import lora_down

    x, a = draw(count, inputs).bfloat16(), draw(RANK, inputs).bfloat16()
    return lambda: (lora_down(x, a, 0.0, None, None, None),), (x.float() @ a.float().t(),)


def lora_bwd(draw: Draw, count: int, outputs: int, inputs: int) -> tuple[Call, Tensors]:
    from peftkern.kernels import qlora_sums as sums

    grad, b = draw(count, outputs).bfloat16(), draw(outputs, RANK).bfloat16()
    low, groups = draw(count, RANK), sums.Groups(1, None)

    def call() -> Tensors:
        t, grad_b = torch.empty_like(low), torch.empty_like(b)
        sums.lora_bwd(grad, low, b, 1.0, groups, t, grad_b, None)
        return t, grad_b

    return call, (grad.float() @ b.float(), grad.float().t() @ low)


def grad_a(draw: Draw, count: int, outputs: int, inputs: int) -> tuple[Call, Tensors]:
    from peftkern.kernels import qlora_sums as sums

    t, x, groups = draw(count, RANK), draw(count, inputs).bfloat16(), sums.Groups(1, None)

    def call() -> Tensors:
        return (sums.grad_a(t, x, 0.0, None, groups, x.new_empty(1, RANK, inputs)),)

    return call, (t.t()[None] @ x.float(),)


CALLS = {"gemm": gemm, "down": down, "lora_bwd": lora_bwd, "grad_a": grad_a}


class Problem:
    """What one entry of a table is for: a kernel and so many rows, on every shape."""

    def __init__(
        self, kernel: str, count: int, shapes: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=device)
        with torch.no_grad():
            self.calls = [CALLS[kernel](draw, count, *shape) for shape in shapes]

    @torch.no_grad()
    def seconds(self, path: str, timer: Timer, tile: paths.Tile, rounds: int) -> float:
        """Infinite where the tile does not fit the device, or its result is off."""
        total = 0.0
        for call, truth in self.calls:
            with paths.forced(path, tile):
                try:
                    errors = [relative_error(*pair) for pair in zip(call(), truth, strict=True)]
                except Exception:  # too many registers or bytes, in the words of whoever notices
                    return float("inf")
                if not all(error <= TOLERANCE for error in errors):  # NaN is none
                    return float("inf")
                total += timer(call, rounds)
        return total
