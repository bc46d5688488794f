"""qlora's passes with a gradient: of the input alone, of a layer with its adapter, of siblings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import qlora
from peftkern.qlora.siblings import Sibling, siblings

from . import peers
from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .layers import BLOCK_SIZE, PREFILL, Case, sets, weights
from .ours import our_layer, ours, plain
from .peers import SCALE
from .row import Row

TRAIN = (
    Case("attention 4096 x 4096, 512 rows, r 16", 4096, 4096, 512, rank=16),
    Case("call 16 x 16, 1 row, r 4", 16, 16, 1, rank=4),
)
TRAIN_DORA = TRAIN[:1]
# Outputs of q, k and v of SmolLM2-135M, and what they read.
QKV, QKV_INPUTS, QKV_ROWS, QKV_RANK = (576, 192, 192), 576, 512, 16


def with_gradients(build: Callable[..., Callable[[Tensor], Tensor]]) -> Callable[..., Any]:
    """The same contender, forward and backward: y and the gradients of x and of the adapter."""

    def trained(weight: Tensor, *adapter: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        adapter = tuple(t.detach().clone().requires_grad_() for t in adapter)
        layer = build(weight, *adapter)
        trains = adapter
        if isinstance(layer, nn.Module):
            trains = tuple(p for p in layer.parameters() if p.requires_grad)

        def call(x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            y = layer(x)
            return y, *torch.autograd.grad(y, (x, *trains), grad)

        return call

    return trained


def input_gradient(build: Callable[..., Callable[[Tensor], Tensor]]) -> Callable[..., Any]:
    """The backward pass alone, of a frozen weight: dX = g W."""

    def backward(weight: Tensor, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        x = torch.zeros(shape, requires_grad=True)
        y = build(weight)(x)
        return lambda grad: torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    return backward


def input_gradients(quick: bool) -> Iterator[Row]:
    contenders = {
        "peftkern": Contender(input_gradient(ours)),
        "torch dense": Contender(input_gradient(peers.dense)),
        "bitsandbytes, fresh": Contender(input_gradient(peers.bitsandbytes_fresh)),
    }
    for case in PREFILL:
        shape = torch.Size((case.rows, case.inputs))
        inputs = sets(case, quick, (case.rows, case.outputs))
        yield from measure(
            "qlora", "linear dX", case.name, contenders,
            [replace(s, frozen=(*s.frozen, shape)) for s in inputs],
            lambda weight, shape, grad: grad @ weight, baseline="peftkern", direction="backward",
            work=case.work(), quick=quick,
        )  # fmt: skip


def training(quick: bool) -> Iterator[Row]:
    builds = {
        "peftkern": ours,
        "peftkern.QLoRALinear": our_layer,
        "torch dense": peers.dense,
        "peft, dense": peers.peft_dense,
        "peft + bitsandbytes, fresh": peers.peft_bitsandbytes,
    }
    contenders = {name: Contender(with_gradients(build)) for name, build in builds.items()}

    def gradients(weight: Tensor, a: Tensor, b: Tensor, x: Tensor, grad: Tensor) -> Any:
        return with_gradients(lambda w, a, b: lambda x: plain(x, w, a, b))(weight, a, b)(x, grad)

    for case in TRAIN:
        shapes = (case.rows, case.inputs), (case.rows, case.outputs)
        yield from measure(
            "qlora", "linear", case.name, contenders, sets(case, quick, *shapes), gradients,
            baseline="peftkern", direction="forward+backward", work=case.work(products=2),
            quick=quick,
        )  # fmt: skip


def training_dora(quick: bool) -> Iterator[Row]:
    """With magnitudes as they are before training, and A and B as after it."""
    builds = {
        "peftkern.QLoRALinear": partial(our_layer, use_dora=True),
        "peft, dense": partial(peers.peft_dense, use_dora=True),
        "peft + bitsandbytes, fresh": partial(peers.peft_bitsandbytes, use_dora=True),
    }
    contenders = {name: Contender(with_gradients(build)) for name, build in builds.items()}

    def product(weight: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Callable[[Tensor], Tensor]:
        norms = torch.linalg.vector_norm(weight + SCALE * (b @ a), dim=1).detach()
        return lambda x: m / norms * plain(x, weight, a, b)

    def gradients(weight: Tensor, a: Tensor, b: Tensor, x: Tensor, grad: Tensor) -> Any:
        magnitude = torch.linalg.vector_norm(weight, dim=1)
        return with_gradients(product)(weight, a, b, magnitude)(x, grad)

    for case in TRAIN_DORA:
        shapes = (case.rows, case.inputs), (case.rows, case.outputs)
        yield from measure(
            "qlora", "linear with DoRA", case.name, contenders, sets(case, quick, *shapes),
            gradients, baseline="peftkern.QLoRALinear", direction="forward+backward",
            work=case.work(products=2), quick=quick,
        )  # fmt: skip


def qkv(quick: bool) -> Iterator[Row]:
    """Three layers that read one x, computed together and one by one."""

    def trained(run: Callable[..., Any], quantized: bool) -> Callable[..., Any]:
        def build(*frozen: Tensor) -> Callable[..., Any]:
            dense, parameters = frozen[::3], [t.clone().requires_grad_() for t in _adapters(frozen)]
            bases = [qlora.quantize(w, "nf4", BLOCK_SIZE) if quantized else w for w in dense]
            parts = [
                Sibling(base, None, *parameters[2 * i : 2 * i + 2], SCALE)
                for i, base in enumerate(bases)
            ]

            def call(x: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
                x = x.detach().requires_grad_()
                ys = run(x, parts)
                return *ys, *torch.autograd.grad(ys, (x, *parameters), grads)

            return call

        return build

    def one_by_one(x: Tensor, parts: list[Sibling]) -> tuple[Tensor, ...]:
        return tuple(qlora.linear(x, *part) for part in parts)

    def by_hand(x: Tensor, parts: list[Sibling]) -> tuple[Tensor, ...]:
        return tuple(peers.dense(w, a, b)(x) for w, _, a, b, _ in parts)

    def expected(*operands: Tensor) -> Any:
        frozen, live = operands[: 3 * len(QKV)], operands[3 * len(QKV) :]
        return trained(by_hand, False)(*frozen)(*live)

    contenders = {
        "peftkern, together": Contender(trained(siblings, True)),
        "peftkern, one by one": Contender(trained(one_by_one, True)),
        "torch dense": Contender(trained(by_hand, False)),
    }
    cases = [Case("", rows, QKV_INPUTS, QKV_ROWS, QKV_RANK) for rows in QKV]
    generator = torch.Generator().manual_seed(1)
    shapes = [(QKV_ROWS, QKV_INPUTS), *((QKV_ROWS, rows) for rows in QKV)]
    inputs = [
        Inputs(
            tuple(t for part in frozen for t in part),
            tuple(torch.randn(shape, generator=generator) for shape in shapes),
        )
        for frozen in zip(*(weights(case, 2) for case in cases), strict=True)
    ]
    yield from measure(
        "qlora", "q, k, v", "SmolLM2-135M, 512 rows, r 16", contenders, inputs, expected,
        baseline="peftkern, together", direction="forward+backward", quick=quick,
        work=Work(flops=sum(case.work(products=2).flops for case in cases)),
    )  # fmt: skip


def _adapters(frozen: tuple[Tensor, ...]) -> list[Tensor]:
    return [t for i, t in enumerate(frozen) if i % 3]
