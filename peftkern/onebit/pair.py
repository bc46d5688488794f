"""The two latent weights of a 1-bit adapter: how they start, train, become bits and come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern import _inputs, _sharded
from peftkern._seen import Seen
from peftkern.bottleneck.reference import ACTIVATIONS
from peftkern.onebit import codes, reference
from peftkern.onebit.branch import adapter
from peftkern.onebit.ops import linear
from peftkern.onebit.statistics import Statistics
from peftkern.onebit.weight import OneBitWeight

if TYPE_CHECKING:
    from peftkern.onebit.config import OneBitConfig


class Pair(nn.Module):
    """scale * D(act(x Down^T)) Up^T, where Down `[r, in]` and Up `[out, r]` are `down` and `up`
    quantised.

    A start as published: `down` uniform in +-1 / sqrt(in), `up` normal with deviation 1e-3, cut at
    twice that. So the branch is small at first and not zero: an `up` of zeros would have no sign.

    Latents stay float32, whatever the model's dtype: a step of AdamW is lost in one of 16 bits.
    Where no latent wants a gradient, in eval mode, the products are made on the bits, which are
    kept until the latents change: until a counter of torch moves, or a call that trains.
    """

    config: Any
    down: nn.Parameter
    up: nn.Parameter
    scale: float
    bits: int
    activation: str
    dropout: float
    statistics: Statistics | None

    def start(
        self, columns: int, rows: int, config: OneBitConfig, device: torch.device | str | None
    ) -> None:
        """Draws the latents of a branch from `columns` features to `rows`."""
        self.config, self.bits = config, config.bits
        self.scale, self.dropout = config.scale, config.dropout
        self.down = nn.Parameter(_empty(config.r, columns, device))
        self.up = nn.Parameter(_empty(rows, config.r, device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.trunc_normal_(self.up, std=1e-3, a=-2e-3, b=2e-3)
        self.statistics = None
        self._kept: tuple[Seen, tuple[OneBitWeight, OneBitWeight]] | None = None

    def share(self, statistics: Statistics) -> None:
        """Has its statistics computed with those of the others that share them."""
        self.statistics = statistics
        statistics.join(self)

    def latents(self) -> list[Tensor]:
        """`down` and `up`, whole or in shards.

        Raises:
            TypeError: the model's dtype was changed, and theirs with it.
        """
        found: list[Tensor] = [self.down, self.up]
        for name, latent in zip(("down", "up"), found, strict=True):
            if latent.dtype != torch.float32:
                raise TypeError(
                    f"{name} must be float32, in which small steps add up to a change of sign, got "
                    f"{latent.dtype}: cast the model before it is adapted"
                )
        return found

    def branch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """residual + the branch of x, in one op; on the bits where nothing of it trains."""
        down, up = self.latents()
        if _is_sharded(down) or _is_sharded(up):
            raise ValueError(
                "down and up must be whole, for their bits hang on the mean and the std of all of "
                "each, got a shard of fully_shard, whose own module was not called"
            )
        trains = torch.is_grad_enabled() and (down.requires_grad or up.requires_grad)
        if not (self.training or trains or torch.compiler.is_compiling()):
            return self._on_bits(x, residual)
        self._kept = None
        shared = None if self.statistics is None else self.statistics.of(self)
        dropout = self.dropout if self.training else 0.0
        return adapter(
            x, down, up, self.scale, residual, self.activation, dropout, None, self.bits, shared
        )

    def _on_bits(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """As the op: of 16-bit x the sums and what is between them are float32, rounded once."""
        down, up = self.weights()
        x = _inputs.autocast(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            hidden = ACTIVATIONS[self.activation](linear(x.to(wide), down))
            y = linear(hidden, up)
            if residual is None:
                return (self.scale * y).to(x.dtype)
            sum = torch.add(residual, y, alpha=self.scale)
            return sum.to(torch.promote_types(residual.dtype, x.dtype))

    def weights(self) -> tuple[OneBitWeight, OneBitWeight]:
        """`down` and `up` as they are computed with and stored: bits, mean and std.

        Of latents in shards every process of their mesh must ask at once.

        Raises:
            ValueError: a latent is not finite.
        """
        latents = self.latents()
        if self._kept is not None and self._kept[0].is_of(latents):
            return self._kept[1]
        with torch.inference_mode(False):  # whose tensors no later gradient could pass
            down, up = (codes.quantize(_sharded.whole(w.detach()), self.bits) for w in latents)
        if not any(latent.is_inference() for latent in latents):  # of which no change is seen
            self._kept = Seen(latents), (down, up)
        return down, up

    @torch.no_grad()
    def set_bits(self, *weights: OneBitWeight, latents: Sequence[Tensor] = ()) -> None:
        """Takes bits in the place of the latents' own, and computes on these very bits.

        Latents become those that are given, or else what can be known of those that were trained:
        one value a level, with the mean and the std of the bits. So training goes on from the same
        function, but whatever had nearly changed its sign is as far from it as all others.
        """
        own = self.latents()
        found = latents or [_latent(weight) for weight in weights]
        for latent, value in zip(own, found, strict=True):
            _sharded.fill(latent, value.to(latent.device))
        down, up = (w.to(latent.device) for w, latent in zip(weights, own, strict=True))
        self._kept = Seen(own), (down, up)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Down and Up as the kernels use them, float32: scale * Up Down is what merging adds."""
        down, up = self.weights()
        return codes.dequantize(down), codes.dequantize(up)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has other latents to look at

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._kept = None  # of shards that are loaded, what calls compute with shows nothing

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.statistics is not None:
            self.statistics.join(self)


def _is_sharded(latent: Tensor) -> bool:
    return hasattr(latent, "device_mesh")


def _empty(rows: int, columns: int, device: torch.device | str | None) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float32, device=device)


def _latent(weight: OneBitWeight) -> Tensor:
    """One value a level, such that the mean and the std of all are the weight's.

    Of 2 and 4 bits, codes that are far from those of a normal distribution come out changed.
    """
    mean, std = weight.mean.double(), weight.std.double()
    levels = mean.new_tensor(reference.levels(weight.bits))
    spread = levels[codes.unpack(weight.packed, weight.bits, weight.shape[1]).long()]
    spread = spread - spread.mean()
    size = spread.square().sum().div(max(spread.numel() - 1, 1)).sqrt()
    return (mean + std * spread / size.clamp(min=torch.finfo(size.dtype).tiny)).float()


def connect(model: nn.Module) -> None:
    """Has the statistics of all adapters of a model computed together."""
    shared = Statistics()
    for module in model.modules():
        if isinstance(module, Pair):
            module.share(shared)
