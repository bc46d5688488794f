"""qlora against what users would use otherwise, on NF4 weights of block size 64, FP4 and int8.

Traffic of one product: a packed weight of N x K is read once (0.5 bytes a code and 4 for each 64;
int8: 1 byte a code and 4 for each row), activations are read and written once. Operations: 2 M N K
a product, forward or dX. Ratios are against peftkern: what is "slower" there is what a user would
wait for otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftkern import qlora
from peftkern.qlora import reference

from . import peers, qlora_gpu
from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .layers import BLOCK_SIZE, PREFILL, Case, sets
from .ours import our_layer, ours, plain
from .qlora_training import input_gradients, qkv, training, training_dora
from .row import Row

# The layers are those of Llama 3 8B: the square attention projection and the widest of the MLP.
DECODE = (
    Case("attention 4096 x 4096, 1 row", 4096, 4096, 1),
    Case("mlp 14336 x 4096, 1 row", 14336, 4096, 1),
    Case("mlp 14336 x 4096, 1 row, beyond the cache", 14336, 4096, 1, beyond_cache=True),
)
# On both sides of where one way of multiplying gives place to the next.
FEW = tuple(Case(f"attention 4096 x 4096, {m} rows", 4096, 4096, m) for m in (2, 4, 16, 32, 64, 96))
DECODE_LORA = (Case("attention 4096 x 4096, 1 row, r 16", 4096, 4096, 1, rank=16),)
FP4 = tuple(
    Case(f"fp4 4096 x 4096, {rows}", 4096, 4096, count, format="fp4")
    for count, rows in ((1, "1 row"), (512, "512 rows"))
)
INT8_ROWS = tuple(
    Case(f"int8 4096 x 4096, {rows}", 4096, 4096, count, format="int8")
    for count, rows in ((1, "1 row"), (512, "512 rows"))
)
IN_BF16 = tuple(
    Case(
        f"bf16 4096 x 4096, {m} {'row' if m == 1 else 'rows'}", 4096, 4096, m, dtype=torch.bfloat16
    )
    for m in (1, 2, 16, 64, 256, 512)
)
INT8_IN_BF16 = tuple(
    replace(case, name=f"{case.name}, x in bf16", dtype=torch.bfloat16) for case in INT8_ROWS
)
STORE = (Case("4096 x 4096", 4096, 4096, 1),)

SHORT_LIST = (
    "peftkern", "torch dense", "bitsandbytes, fresh", "bitsandbytes, repacked",
    "onnxruntime MatMulNBits",
)  # fmt: skip

INT8 = "activations in int8, weights on a uniform 4-bit grid"
BF16 = "activations, scales and products in bf16"


def forward(case: Case, contenders: Mapping[str, Contender], quick: bool) -> Iterator[Row]:
    yield from measure(
        "qlora", "linear", case.name, contenders, sets(case, quick, (case.rows, case.inputs)),
        lambda weight, x: plain(x, weight), baseline="peftkern", work=case.work(), quick=quick,
    )  # fmt: skip


def decode(quick: bool) -> Iterator[Row]:
    """Copies beyond the cache would fill the memory for every contender: that case has the short
    list, and so have those that differ from their neighbours in the number of rows alone.
    """
    contenders = {
        "peftkern": Contender(ours),
        "torch dense": Contender(peers.dense),
        "torch.compile": Contender(peers.compiled),
        "bitsandbytes, fresh": Contender(peers.bitsandbytes_fresh),
        "bitsandbytes, repacked": Contender(peers.bitsandbytes_repacked, BF16, 2e-2),
        "onnxruntime MatMulBnb4": Contender(peers.onnxruntime_bnb4),
        "onnxruntime MatMulNBits": Contender(peers.onnxruntime_nbits, INT8, 2e-1),
    }
    for case in (*DECODE, *FEW, *PREFILL):
        some = contenders
        if case.beyond_cache or case in FEW:
            some = {name: contenders[name] for name in SHORT_LIST}
        yield from forward(case, some, quick)


def int8_contenders() -> dict[str, Contender]:
    return {
        "peftkern": Contender(partial(ours, format="int8", block_size=None)),
        "torch dense": Contender(peers.dense),
        "bitsandbytes Linear8bitLt, eval": Contender(
            peers.bitsandbytes_8bit, "activations in int8", 5e-2
        ),
        "bitsandbytes Linear8bitLt, training": Contender(
            partial(peers.bitsandbytes_8bit, training=True)
        ),
    }


def in_bf16(quick: bool) -> Iterator[Row]:
    """Activations in bfloat16; what has a dense weight has it in bfloat16 as well."""

    def rounded(contender: Contender) -> Contender:
        return replace(contender, build=lambda weight: contender.build(weight.bfloat16()))

    nf4 = {
        "peftkern": Contender(ours),
        "torch dense": rounded(Contender(peers.dense)),
        "bitsandbytes, fresh": rounded(Contender(peers.bitsandbytes_fresh)),
        "bitsandbytes, repacked": rounded(Contender(peers.bitsandbytes_repacked, BF16, 2e-2)),
    }
    int8 = {
        name: contender if name == "peftkern" else rounded(contender)
        for name, contender in int8_contenders().items()
    }
    for cases, contenders in ((IN_BF16, nf4), (INT8_IN_BF16, int8)):
        for case in cases:
            yield from forward(case, contenders, quick)


def other_formats(quick: bool) -> Iterator[Row]:
    fp4 = {
        "peftkern": Contender(partial(ours, format="fp4")),
        "torch dense": Contender(peers.dense),
        "bitsandbytes, fresh": Contender(partial(peers.bitsandbytes_fresh, format="fp4")),
    }
    for cases, contenders in ((FP4, fp4), (INT8_ROWS, int8_contenders())):
        for case in cases:
            yield from forward(case, contenders, quick)


def decode_lora(quick: bool) -> Iterator[Row]:
    contenders = {
        "peftkern": Contender(ours),
        "peftkern.QLoRALinear": Contender(our_layer),
        "torch dense": Contender(peers.dense),
        "torch.compile": Contender(peers.compiled),
        "peft + bitsandbytes, fresh": Contender(peers.peft_bitsandbytes),
    }
    for case in DECODE_LORA:
        yield from measure(
            "qlora", "linear", case.name, contenders, sets(case, quick, (case.rows, case.inputs)),
            lambda weight, a, b, x: plain(x, weight, a, b), baseline="peftkern",
            work=case.work(), quick=quick,
        )  # fmt: skip


def quantizing(quick: bool) -> Iterator[Row]:
    def reference_build() -> Callable[[Tensor], Any]:
        codebook = torch.tensor(reference.NF4)
        tables = qlora.formats["nf4"].tables(codebook.device)
        return lambda w: (*reference.quantize(w, *tables, BLOCK_SIZE), codebook, w.shape)

    def round_trip(w: Tensor) -> Tensor:
        return reference.dequantize(*reference_build()(w), BLOCK_SIZE)

    contenders = {
        "peftkern": Contender(
            lambda: lambda w: qlora.quantize(w, "nf4", BLOCK_SIZE),
            view=lambda q: (reference.dequantize(*q.buffers, q.shape, BLOCK_SIZE),),
        ),
        "reference": Contender(
            reference_build, view=lambda q: (reference.dequantize(*q, BLOCK_SIZE),)
        ),
        "bitsandbytes": Contender(peers.bitsandbytes_quantize, view=peers.bitsandbytes_decoded),
    }
    for case in STORE:
        inputs = [replace(s, frozen=()) for s in sets(case, quick, (case.outputs, case.inputs))]
        # What must come back is the weight itself, and no rounding may be worse than the nearest.
        yield from measure(
            "qlora", "quantize", case.name, contenders, inputs, round_trip,
            baseline="peftkern", truth=lambda w: w.double(), factor=1.0,
            work=Work(read=4 * case.outputs * case.inputs, written=case.packed_bytes), quick=quick,
        )  # fmt: skip


def dequantizing(quick: bool) -> Iterator[Row]:
    """Into a buffer that is there already: a fresh one costs more than the work, in page faults."""
    codebook = torch.tensor(reference.NF4)

    def ours_into(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        whole, out = qlora.quantize(weight, "nf4", BLOCK_SIZE), torch.empty_like(weight)
        return lambda packed, absmax: qlora.dequantize(
            replace(whole, packed=packed, absmax=absmax), out=out
        )

    for case in STORE:
        shape = (case.outputs, case.inputs)
        contenders = {
            "peftkern": Contender(ours_into),
            "bitsandbytes": Contender(peers.bitsandbytes_dequantize),
        }
        inputs = []
        for s in sets(case, quick):
            stored = qlora.quantize(s.frozen[0], "nf4", BLOCK_SIZE)
            inputs.append(Inputs(s.frozen, (stored.packed, stored.absmax)))
        yield from measure(
            "qlora", "dequantize", case.name, contenders, inputs,
            partial(_decode, codebook, shape), baseline="peftkern",
            work=Work(read=case.packed_bytes, written=4 * case.outputs * case.inputs), quick=quick,
        )  # fmt: skip


def _decode(
    codebook: Tensor, shape: tuple[int, ...], weight: Tensor, packed: Tensor, absmax: Tensor
) -> Tensor:
    return reference.dequantize(packed, absmax, codebook, shape, BLOCK_SIZE)


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if torch.device(device).type != "cpu":
        for job in qlora_gpu.jobs(device, quick).values():
            yield from job()
        return
    parts = (
        decode, in_bf16, other_formats, decode_lora, input_gradients, training, training_dora, qkv,
        quantizing, dequantizing,
    )  # fmt: skip
    for part in parts:
        yield from part(quick)
