"""onebit against the published module (Jie, Wang and Deng, 2023) in plain torch, and dense linears.

Traffic of a product on bits: a weight of N x K is read once (a bit a code), activations are read
and written once. Of an adapter: x is read, and y written; its weights are small. Operations: 2 M N
K a product. Dropout is off where results are compared: the published module draws its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import onebit, qlora
from peftkern.onebit import codes
from peftkern.onebit.reference import levels, pack

from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .row import Row

SIZE, ROWS = 4096, (1, 8, 64)
TOKENS, WIDTH, RANK, SCALE = 8 * 197, 768, 32, 0.1  # ViT-B/16, a batch of 8
BRANCHES, MATRICES = 12, 48
LEVEL = levels(1)[1]
NF4 = "W rounded to NF4"

Tensors = tuple[Tensor, ...]


def published(weight: Tensor) -> Tensor:
    """One bit a weight, as the published layer quantises at every forward."""
    mean, std = weight.mean(), weight.std()
    u = (weight - mean) / (std + 1e-5)
    code = torch.sign(u) * LEVEL
    return (code + u - u.detach()) * std + mean


def published_branch(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    hidden = torch.relu(nn.functional.linear(x, published(down)))
    return x + SCALE * nn.functional.linear(hidden, published(up))


def our_branch(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return onebit.adapter(x, down, up, SCALE, x)


def draw(*shapes: tuple[int, ...], sets: int = 2) -> Iterator[Tensors]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(sets):
        yield tuple(torch.randn(shape, generator=generator) for shape in shapes)


def on_bits(quick: bool) -> Iterator[Row]:
    """Inference: x times a matrix of one bit a weight."""

    def dense(latent: Tensor) -> Tensor:
        return onebit.quantize(latent).dequantize()

    def ours(latent: Tensor) -> Callable[[Tensor], Tensor]:
        weight = onebit.quantize(latent)
        return lambda x: onebit.linear(x, weight)

    def torch_dense(latent: Tensor) -> Callable[[Tensor], Tensor]:
        weight = dense(latent)
        return lambda x: nn.functional.linear(x, weight)

    def nf4(latent: Tensor) -> Callable[[Tensor], Tensor]:
        weight = qlora.quantize(dense(latent))
        return lambda x: qlora.linear(x, weight)

    contenders = {
        "peftkern": Contender(ours),
        "torch dense": Contender(torch_dense),
        "peftkern, NF4": Contender(nf4, NF4, 3e-1),
    }
    for rows in ROWS:
        shapes = (SIZE, SIZE), (rows, SIZE)
        inputs = [Inputs((weight,), (x,)) for weight, x in draw(*shapes)]
        yield from measure(
            "onebit", "linear", f"{SIZE} x {SIZE}, {rows} row{'s' if rows > 1 else ''}", contenders,
            inputs, lambda w, x: x @ dense(w.float()).to(x.dtype).t(), baseline="peftkern",
            work=Work(SIZE * SIZE // 8 + 4 * rows * SIZE, 4 * rows * SIZE, 2 * rows * SIZE * SIZE),
            quick=quick,
        )  # fmt: skip


def _forward(run: Callable[..., Tensor], compiled: bool = False) -> Callable[..., Any]:
    def build(down: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        if compiled:
            torch._dynamo.reset()
        call = torch.compile(run, fullgraph=True) if compiled else run
        return lambda x: call(x, down, up)

    return build


def _trained(run: Callable[..., Tensor], compiled: bool = False) -> Callable[..., Any]:
    """y, and the gradients of x and of the latent weights."""

    def build(*latents: Tensor) -> Callable[[Tensor, Tensor], Tensors]:
        if compiled:
            torch._dynamo.reset()
        call = torch.compile(run, fullgraph=True) if compiled else run
        parameters = [t.detach().clone().requires_grad_() for t in latents]

        def step(x: Tensor, grad: Tensor) -> Tensors:
            x = x.detach().requires_grad_()
            y = call(x, *parameters)
            return y, *torch.autograd.grad(y, (x, *parameters), grad)

        return step

    return build


def branch(quick: bool) -> Iterator[Row]:
    shapes = ((RANK, WIDTH), (WIDTH, RANK), (TOKENS, WIDTH), (TOKENS, WIDTH))
    drawn = [(down / WIDTH**0.5, up / 100, x, grad) for down, up, x, grad in draw(*shapes)]
    case, activations = f"AdaptFormer, {TOKENS} tokens, 768-32-768", 4 * TOKENS * WIDTH
    for direction, wrap, passes in (("forward", _forward, 1), ("forward+backward", _trained, 3)):
        live = 3 if direction == "forward" else 4
        yield from measure(
            "onebit", "adapter", case,
            {
                "peftkern": Contender(wrap(our_branch)),
                "published": Contender(wrap(published_branch)),
                "published, torch.compile": Contender(wrap(published_branch, compiled=True)),
            },
            [Inputs(d[:2], d[2:live]) for d in drawn],
            lambda down, up, *live, wrap=wrap: wrap(published_branch)(down, up)(*live),
            baseline="peftkern", direction=direction, quick=quick,
            work=Work(
                passes * activations, passes * activations, passes * 4 * TOKENS * WIDTH * RANK
            ),
        )  # fmt: skip


def step(quick: bool) -> Iterator[Row]:
    """All adapters of a ViT-B/16, one behind the other: statistics of all of them in one op."""

    def ours(x: Tensor, *latents: Tensor) -> Tensor:
        statistics = codes.statistics(latents)
        for i in range(0, len(latents), 2):
            found = statistics[i : i + 2]
            x = onebit.adapter(x, *latents[i : i + 2], SCALE, x, statistics=found)
        return x

    def theirs(x: Tensor, *latents: Tensor) -> Tensor:
        for i in range(0, len(latents), 2):
            x = published_branch(x, *latents[i : i + 2])
        return x

    shapes = [(RANK, WIDTH), (WIDTH, RANK)] * BRANCHES + [(TOKENS, WIDTH)] * 2
    inputs = [
        Inputs(tuple(t / (t.shape[1] ** 0.5 * 4) for t in d[:-2]), d[-2:]) for d in draw(*shapes)
    ]
    yield from measure(
        "onebit", "adapter", f"{BRANCHES} adapters of a step, {TOKENS} tokens",
        {"peftkern": Contender(_trained(ours)), "published": Contender(_trained(theirs))},
        inputs, lambda *all: _trained(theirs)(*all[:-2])(*all[-2:]), baseline="peftkern",
        direction="forward+backward", quick=quick,
        # A unit at zero in one of the twelve is past it in another rounding; then its slope is too.
        factor=8.0,
    )  # fmt: skip


def quantizing(quick: bool) -> Iterator[Row]:
    """Of 24 adapters: in two ops, and one by one as the published layers do."""
    shapes = [(RANK, WIDTH), (WIDTH, RANK)] * (MATRICES // 2)
    inputs = [Inputs((), weights) for weights in draw(*shapes)]

    def ours(*weights: Tensor) -> Tensors:
        return tuple(codes.quantize_op(weights, codes.statistics(weights), 1))

    def theirs(*weights: Tensor) -> Tensors:
        return tuple(map(published, weights))

    count = MATRICES * RANK * WIDTH
    yield from measure(
        "onebit", "quantize", f"{MATRICES} matrices of {RANK} x {WIDTH}",
        {"peftkern": Contender(lambda: ours), "one by one": Contender(lambda: theirs)},
        inputs, theirs, baseline="peftkern", work=Work(4 * count, 4 * count), quick=quick,
    )  # fmt: skip


def packing(quick: bool) -> Iterator[Row]:
    def numpy_packbits() -> Callable[[Tensor], Tensor]:
        import numpy

        return lambda c: torch.from_numpy(numpy.packbits(c.numpy(), axis=1, bitorder="little"))

    def numpy_flat() -> Callable[[Tensor], Tensor]:
        import numpy

        def call(c: Tensor) -> Tensor:
            packed = torch.from_numpy(numpy.packbits(c.numpy().reshape(-1), bitorder="little"))
            return packed.view(len(c), -1)

        return call

    generator = torch.Generator().manual_seed(0)
    inputs = [
        Inputs((), (torch.randint(0, 2, (SIZE, SIZE), generator=generator, dtype=torch.uint8),))
        for _ in range(2)
    ]
    yield from measure(
        "onebit", "pack", f"{SIZE} x {SIZE} codes",
        {
            "peftkern": Contender(lambda: partial(onebit.pack, bits=1)),
            "numpy.packbits, rows": Contender(numpy_packbits),
            "numpy.packbits, flat": Contender(numpy_flat),
        },
        inputs, lambda c: pack(c, 1), baseline="peftkern",
        work=Work(SIZE * SIZE, SIZE * SIZE // 8), quick=quick,
    )  # fmt: skip


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be cpu for onebit, got {device}")
    for part in (on_bits, branch, step, quantizing, packing):
        yield from part(quick)
