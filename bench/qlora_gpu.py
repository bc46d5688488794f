"""qlora on a GPU: decoding, what lies between, and training, each in bfloat16 on NF4 weights.

Traffic and operations are those of qlora.py, with two bytes an activation. A case is a job of its
own, so that a run that was stopped goes on with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import peers, peers_gpu
from .harness import Contender, measure
from .layers import Case, sets
from .ours import our_layer, ours, plain
from .qlora_training import with_gradients
from .row import Row

Job = Callable[[], Iterator[Row]]

# Of Llama 3: the attention projection and the widest of the MLP, of the 8B and the 70B model.
# Packed they are 9.4, 33 and 132 MB, below and above what a second-level cache holds.
SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
DECODE_ROWS = (1, 2, 4, 8, 16)
BETWEEN_ROWS = (32, 64, 128, 256, 512)  # where one way of multiplying gives place to the next
TRAIN_ROWS = (2048, 4096, 8192)
DROPOUT = 0.1
RANK = 16

MASK = "drops other elements"
NESTED = "scales in 8 bits"


def _case(rows: int, outputs: int, inputs: int, rank: int = 0, dropout: float = 0.0) -> Case:
    name = f"{outputs} x {inputs}, {rows} row{'s' * (rows > 1)}"
    name += f", r {rank}" * bool(rank) + f", dropout {dropout:g}" * bool(dropout)
    return Case(name, outputs, inputs, rows, rank, dtype=torch.bfloat16, dropout=dropout)


DECODE = tuple(_case(m, *shape) for m in DECODE_ROWS for shape in SHAPES)
DECODE_LORA = tuple(_case(1, *shape, RANK) for shape in SHAPES)
BETWEEN = tuple(_case(m, *SHAPES[0]) for m in BETWEEN_ROWS)
TRAIN = (
    *(_case(m, *SHAPES[0], RANK, p) for m in TRAIN_ROWS for p in (DROPOUT, 0.0)),
    *(_case(TRAIN_ROWS[1], *SHAPES[1], RANK, p) for p in (DROPOUT, 0.0)),
)
# To see that all of it works, where there is no GPU.
TINY = {
    "decode": (_case(1, 128, 64), _case(16, 128, 64)),
    "lora": (_case(1, 128, 64, RANK),),
    "train": tuple(_case(32, 128, 64, RANK, p) for p in (DROPOUT, 0.0)),
}


def in_bf16(build: Callable[..., Any]) -> Callable[..., Any]:
    """The weight rounded first: what is dense, or quantises for itself, has it in bfloat16."""
    return lambda weight, *adapter: build(weight.bfloat16(), *adapter)


def decode(case: Case, device: str, quick: bool) -> Iterator[Row]:
    contenders = {
        "peftkern": Contender(ours),
        "torch dense": Contender(in_bf16(peers.dense)),
        "bitsandbytes": Contender(in_bf16(peers.bitsandbytes_fresh)),
    }
    if case.rank:
        contenders = {
            "peftkern": Contender(ours),
            "peftkern.QLoRALinear": Contender(our_layer),
            "torch dense": Contender(in_bf16(peers.dense)),
            "torch.compile": Contender(in_bf16(peers.compiled)),
            "peft + bitsandbytes": Contender(in_bf16(peers.peft_bitsandbytes)),
        }
    yield from measure(
        "qlora", "linear", case.name, contenders,
        sets(case, quick, (case.rows, case.inputs), device=device),
        lambda weight, *rest: plain(rest[-1], weight, *rest[:-1]),
        baseline="peftkern", work=case.work(), device=device, quick=quick,
    )  # fmt: skip


def training(case: Case, device: str, quick: bool) -> Iterator[Row]:
    """Forward and backward. With dropout a peer draws a mask of its own: its low-rank term is off
    by sqrt(2 p / (1 - p)) of itself, so it passes with a wide tolerance and is called inexact.
    """
    p = case.dropout
    theirs = (MASK, 0.7) if p else ()
    contenders = {
        "peftkern": Contender(with_gradients(partial(ours, dropout=p))),
        "peftkern.QLoRALinear": Contender(with_gradients(partial(our_layer, dropout=p)), *theirs),
        "torch dense": Contender(with_gradients(in_bf16(partial(peers.dense, dropout=p))), *theirs),
        "torch.compile": Contender(
            with_gradients(in_bf16(partial(peers.compiled, dropout=p))), *theirs
        ),
        "peft + bitsandbytes": Contender(
            with_gradients(in_bf16(partial(peers.peft_bitsandbytes, dropout=p))), *theirs
        ),
    }
    if not p:  # with it neither takes its fast path
        for name, build in {"unsloth": peers_gpu.unsloth, "axolotl": peers_gpu.axolotl}.items():
            contenders[name] = Contender(with_gradients(in_bf16(build)), NESTED, 5e-2)

    def build(weight: Tensor, *adapter: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: plain(x, weight, *adapter, dropout=p)

    shapes = (case.rows, case.inputs), (case.rows, case.outputs)
    yield from measure(
        "qlora", "linear", case.name, contenders, sets(case, quick, *shapes, device=device),
        lambda weight, a, b, x, grad: with_gradients(build)(weight, a, b)(x, grad),
        baseline="peftkern", direction="forward+backward", work=case.work(products=2),
        device=device, quick=quick,
    )  # fmt: skip


def jobs(device: str, quick: bool = False) -> dict[str, Job]:
    """By name, those first that are wanted most."""
    cases = {
        decode: TINY["decode"] + TINY["lora"] if quick else DECODE + DECODE_LORA + BETWEEN,
        training: TINY["train"] if quick else TRAIN,
    }
    first = [(f, c) for f, some in cases.items() for c in some if c.rows in (1, TRAIN_ROWS[1])]
    every = [(f, c) for f, some in cases.items() for c in some]
    return {
        f"{function.__name__}: {case.name}": partial(function, case, device, quick)
        for function, case in dict.fromkeys([*first, *every])
    }
