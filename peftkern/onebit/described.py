"""A 1-bit adapter as files, reports and `explain` describe it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftkern import _family
from peftkern._family import Explained, Parts, Wanted
from peftkern.onebit.config import FORMAT, OneBitConfig
from peftkern.onebit.pair import Pair
from peftkern.onebit.weight import OneBitWeight


class Described(Pair, _family.Adapter):
    """What both layers answer to the questions of `_family.Adapter`.

    A file holds the bits of both matrices, rows padded to whole bytes, and their statistics; and
    the latents as well where they were asked for.
    """

    method = "onebit"
    config: OneBitConfig

    def trained(self) -> list[nn.Parameter]:
        return [self.down, self.up]

    def parts(self) -> Parts:
        """The bits lie nowhere else, so these are copies."""
        down, up = self.weights()
        rows = torch.cat([down.statistics, up.statistics])
        return {"down.bits": down.packed, "up.bits": up.packed, "statistics": rows}

    def training_parts(self) -> Parts:
        return {"down": self.down.detach(), "up": self.up.detach()}

    def fill(self, parts: Parts) -> None:
        names = ("down", "up")
        weights = [
            OneBitWeight(parts[f"{name}.bits"], mean, std, latent.shape, self.bits, latent.dtype)
            for name, latent, (mean, std) in zip(
                names, self.latents(), parts["statistics"], strict=True
            )
        ]
        self.set_bits(*weights, latents=[parts[name] for name in names if name in parts])

    def wanted(self) -> Wanted:
        return wanted(self.config, *self.widths())

    def widths(self) -> tuple[int, int]:
        """in and out."""
        return self.down.shape[1], self.up.shape[0]

    def fields(self) -> dict[str, Any]:
        columns, rows = self.widths()
        own = {"r": len(self.down), "scale": self.scale, "bits": self.bits, "dropout": self.dropout}
        sizes = {"in_features": columns, "out_features": rows, "activation": self.activation}
        return self.config.fields() | own | sizes | FORMAT

    def misfit(self, config: _family.Config) -> str | None:
        """Scale and dropout may differ: the one comes from the file, the other stays."""
        assert isinstance(config, OneBitConfig)
        have = {"r": len(self.down), "bits": self.bits, "placement": self.config.placement}
        want = {name: getattr(config, name) for name in have}
        other = [f"{n} {want[n]!r}, not {have[n]!r}" for n in have if want[n] != have[n]]
        return ", ".join(other) or None

    def take(self, config: _family.Config) -> None:
        assert isinstance(config, OneBitConfig)
        self.scale = config.scale

    def facts(self) -> str:
        """For `extra_repr`."""
        return f"r={len(self.down)}, scale={self.scale:g}, bits={self.bits}, dropout={self.dropout}"

    def explained(self) -> Explained:
        columns, rows = self.widths()
        sizes = f"{columns} to {len(self.down)} to {rows} in {self.bits} bit{'s' * (self.bits > 1)}"
        return Explained(
            holds=sizes,
            device=self.down.device.type,
            runs="peftkern.onebit, quantiser, both products and the sum in one pass; in eval mode "
            "each product on the packed bits",
            ops={
                "forward": "onebit_adapter", "backward": "onebit_adapter_bwd",
                "eval": "onebit_linear",
            },
        )  # fmt: skip


def wanted(config: OneBitConfig, columns: int, rows: int) -> Wanted:
    """What files hold of a branch of these widths; its latents need not be there."""
    shapes = {"down": [config.r, columns], "up": [rows, config.r]}
    parts: Wanted = {name: (shape, False) for name, shape in shapes.items()}
    for name, (height, width) in shapes.items():
        parts[f"{name}.bits"] = ([height, (width * config.bits + 7) // 8], True)
    return parts | {"statistics": ([2, 2], True)}
