"""A `QLoRALinear` as files, reports and `explain` describe it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkern import _family, _native, _sharded
from peftkern._family import Explained, Parts, Wanted
from peftkern.qlora.adapter import LinearAdapter
from peftkern.qlora.config import LoraConfig
from peftkern.qlora.weight import QuantizedWeight

VLLM_DEFAULT_RANK, VLLM_MAX_RANK = 16, 512  # of vLLM's option max_lora_rank


class LoraAdapter(LinearAdapter):
    """What `QLoRALinear` answers to the questions of `_family.Adapter`."""

    method = "lora"

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    scaling: float
    trains_bias: bool
    own_base: bool
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    initial_A: Tensor | None
    initial_B: Tensor | None

    @property
    def use_dora(self) -> bool:
        return self._parameters.get("lora_magnitude_vector") is not None

    def rescale(self, config: LoraConfig) -> None:
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        """The parameters that are not the frozen base's."""
        names = ("lora_", "bias") if self.trains_bias else ("lora_",)
        return [p for name, p in self.named_parameters() if name.startswith(names)]

    def parts(self) -> Parts:
        parts: dict[str, Tensor | None] = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.initial_A is not None and self.initial_B is not None:
            parts = {
                "lora_A": torch.cat([_sharded.whole(self.lora_A), self.initial_A]),
                "lora_B": torch.cat([_sharded.whole(self.lora_B), -self.initial_B], 1),
            }
        parts["lora_magnitude_vector"] = self.lora_magnitude_vector
        parts["bias"] = self.bias if self.trains_bias else None
        return {name: part.detach() for name, part in parts.items() if part is not None}

    def fill(self, parts: Parts) -> None:
        a, b = parts["lora_A"], parts["lora_B"]
        if self.initial_A is not None and self.initial_B is not None:
            self.initial_A.copy_(a[self.r :])
            self.initial_B.copy_(-b[:, self.r :])
        _sharded.fill(self.lora_A, a[: self.r])
        _sharded.fill(self.lora_B, b[:, : self.r])
        if self.lora_magnitude_vector is not None:
            _sharded.fill(self.lora_magnitude_vector, parts["lora_magnitude_vector"])
        if self.bias is not None and "bias" in parts:
            _sharded.fill(self.bias, parts["bias"])

    def wanted(self) -> Wanted:
        size = (rank(self), self.out_features, self.in_features)
        return wanted(*size, self.use_dora, self.bias is not None, self.trains_bias)

    def fields(self) -> dict[str, Any]:
        return {
            "r": rank(self),
            "lora_alpha": alpha(self, self.use_rslora),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "bias": "lora_only" if self.trains_bias else "none",
        }

    def misfit(self, config: _family.Config) -> str | None:
        return None  # what does not fit has other parts, or other shapes

    def take(self, config: _family.Config) -> None:
        """The file's scale, at the layer's own rank."""
        assert isinstance(config, LoraConfig)
        self.rescale(config.at_rank(self.r))

    def warning(self) -> str | None:
        if not self.own_base:
            return None
        return (
            "the adapter belongs to the base that 'loftq_N' has made, which its files do not hold: "
            "save model.state_dict() as well"
        )

    def vllm(self, layers: Sequence[_family.Adapter]) -> str:
        """vLLM takes every module's scale from the config's r and lora_alpha, patterns unread."""
        if self.merge_aware:
            return "no: merge_aware, only merged"
        if self.use_dora:
            return "no: DoRA"
        if self.trains_bias:
            return "no: a trained bias"
        others = [layer for layer in layers if isinstance(layer, LoraAdapter)]
        if len(others) < len(layers):
            return "no: it is saved beside adapters that vLLM does not know"
        r, lora_alpha, rslora = common(others)
        if (rank(self), alpha(self, rslora)) != (r, lora_alpha):
            return "no: a rank or alpha of its own"
        return vllm_rank(max(map(rank, others)))

    def explained(self) -> Explained:
        return of_weight(self.quantized_weight or self.weight, self._terms())

    def _terms(self) -> str:
        if self.merged:
            return "the merged weight alone"
        if self.merge_aware:
            return f"the weight that merging its adapter of rank {self.r} would store"
        rows = ", then a factor for each row (DoRA)" * self.use_dora
        return f"base and adapter of rank {self.r} in one pass{rows}"


def of_weight(weight: Tensor | QuantizedWeight, terms: str) -> Explained:
    """What `explain` tells of a layer on this weight, by what it computes in terms of it."""
    device = weight.device.type
    return Explained(
        holds=_text(weight),
        device=device,
        runs=f"peftkern.qlora, {terms}",
        ops={"forward": "qlora_linear", "backward": "qlora_linear_bwd"},
        paths=lambda: _paths(weight),
    )


def _text(weight: Tensor | QuantizedWeight) -> str:
    rows, columns = weight.shape
    if isinstance(weight, Tensor):
        return f"{rows} x {columns} in {str(weight.dtype).removeprefix('torch.')}"
    size = weight.block_size
    blocks = f"blocks of {size}" + ", nested scales" * weight.nested if size else "a scale a row"
    return f"{rows} x {columns} in {weight.format.name}, {blocks},"


def _paths(weight: Tensor | QuantizedWeight) -> str:
    """Of a GPU: what the number of rows decides, and by whose measurement."""
    from peftkern.kernels import qlora_paths  # of use on GPUs alone

    bits = 0 if isinstance(weight, Tensor) else weight.format.bits
    decodes = _native.serves("qlora_decode", weight.device.type)
    return qlora_paths.describe(weight.device, weight.dtype, bits, decodes)


def wanted(r: int, rows: int, columns: int, dora: bool, bias: bool, trains_bias: bool) -> Wanted:
    """What files hold of LoRA on such a linear."""
    parts: Wanted = {"lora_A": ([r, columns], True), "lora_B": ([rows, r], True)}
    if dora:
        parts["lora_magnitude_vector"] = ([rows], True)
    if bias:
        parts["bias"] = ([rows], trains_bias)
    return parts


def vllm_rank(rank: int) -> str:
    """Whether vLLM loads adapters of ranks up to this one."""
    if rank > VLLM_MAX_RANK:
        return f"no: r above {VLLM_MAX_RANK}"
    return "yes" if rank <= VLLM_DEFAULT_RANK else f"yes, with max_lora_rank >= {rank}"


def common(layers: Iterable[LoraAdapter]) -> tuple[int, float, bool]:
    """r, alpha and use_rslora as most layers have them: what a config says outside its patterns."""
    layers = list(layers)
    rslora = all(layer.use_rslora for layer in layers)
    ranks = Counter(map(rank, layers))
    alphas = Counter(alpha(layer, rslora) for layer in layers)
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0], rslora


def rank(layer: LoraAdapter) -> int:
    """In a file, where what is taken off again is part of the adapter."""
    return layer.r if layer.initial_A is None else 2 * layer.r


def alpha(layer: LoraAdapter, rslora: bool) -> float:
    """The lora_alpha that gives this layer its scale; one file holds one value of use_rslora."""
    r = rank(layer)
    value = layer.scaling * (math.sqrt(r) if rslora else r)
    if layer.use_rslora == rslora and r == layer.r:
        value = layer.lora_alpha
    return int(value) if value == int(value) else value
