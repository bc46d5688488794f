"""The vision transformers' blocks that an AdaptFormer stands in, beside their MLPs.

    x = x + attention(norm(x))                    y = block(x): the last of both sums
    y = x + mlp(norm(x))            becomes       y = x + mlp(norm(x)) + adapter(x)

So a block is known by the norm before its MLP, whose input is x. Its own forward stays, with all
that it does besides; of drop path and layer scale, which it has for its MLP, the adapter sees none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from peftkern import _select
from peftkern._attached import AttachedTarget, original

if TYPE_CHECKING:
    from peftkern.onebit.config import OneBitConfig

# By package, module and class: there are many a `Block`.
KNOWN = {
    "timm.models.beit.Block": "norm2",
    "timm.models.eva.EvaBlock": "norm2",
    "timm.models.vision_transformer.Block": "norm2",
    "timm.models.vision_transformer_relpos.RelPosBlock": "norm2",
    **{
        f"transformers.models.{module}.modeling_{module}.{name}": norm
        for module, name, norm in (
            ("audio_spectrogram_transformer", "ASTLayer", "layernorm_after"),
            ("beit", "BeitLayer", "layernorm_after"),
            ("clip", "CLIPEncoderLayer", "layer_norm2"),
            ("deit", "DeiTLayer", "layernorm_after"),
            ("dinov2", "Dinov2Layer", "norm2"),
            ("dinov2_with_registers", "Dinov2WithRegistersLayer", "norm2"),
            ("dinov3_vit", "DINOv3ViTLayer", "norm2"),
            ("ijepa", "IJepaLayer", "layernorm_after"),
            ("siglip", "SiglipEncoderLayer", "layer_norm2"),
            ("siglip2", "Siglip2EncoderLayer", "layer_norm2"),
            ("videomae", "VideoMAELayer", "layernorm_after"),
            ("vit", "ViTLayer", "layernorm_after"),
            ("vit_mae", "ViTMAELayer", "layernorm_after"),
            ("vit_msn", "ViTMSNLayer", "layernorm_after"),
            ("vivit", "VivitLayer", "layernorm_after"),
            ("yolos", "YolosLayer", "layernorm_after"),
        )
    },
}


def targets(model: nn.Module, config: OneBitConfig) -> Iterator[AttachedTarget]:
    """Every block that the config names, those of classes that it does not know among them."""
    for module, names in _select.names(model).items():
        if any(_named(module, name, config) for name in names):
            norm = norm_of(module, config)
            reader = None if norm is None else f"{names[0]}.{norm}"
            yield BlockTarget(module, names, config, reader, _widths(module, norm))


class BlockTarget(AttachedTarget):
    """A block that gets an adapter, or why it cannot."""

    def obstacle(self, model: nn.Module) -> str | None:
        name = original(type(self.module)).__name__
        if self.reader is None:
            return f"{name} is no known block; blocks={{'{name}': …}} would name its norm"
        if self.widths is None:
            norm = self.reader.rpartition(".")[2]
            return f"{name} has no norm with a weight named {norm}"
        return super().obstacle(model)


def norm_of(module: nn.Module, config: OneBitConfig) -> str | None:
    """The name of the norm before the MLP; None of a class that nobody knows."""
    cls = original(type(module))
    for kind in cls.__mro__:
        if kind.__name__ in config.blocks:
            return config.blocks[kind.__name__]
    return KNOWN.get(f"{cls.__module__}.{cls.__name__}")


def nothing(model: nn.Module, config: OneBitConfig) -> str:
    """What to say of a model without a block."""
    stacks = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    kinds = {type(layer).__name__ for stack in stacks for layer in stack.children()}
    return (
        "placement 'adaptformer' must find blocks of vision transformers (those of timm and "
        "transformers that peftkern.onebit.blocks.KNOWN lists), or have them named, as in "
        f"blocks={{'MyBlock': 'norm2'}}, got target_modules {config.target_modules!r} and layers "
        f"of {', '.join(sorted(kinds)) or type(model).__name__}"
    )


def _named(module: nn.Module, name: str, config: OneBitConfig) -> bool:
    if _select.matches(config.exclude_modules, name):
        return False
    if config.target_modules == "all-linear":
        return norm_of(module, config) is not None
    return _select.matches(config.target_modules, name)


def _widths(module: nn.Module, norm: str | None) -> tuple[int, int] | None:
    weight = getattr(getattr(module, norm, None), "weight", None) if norm else None
    return None if weight is None else (weight.shape[-1], weight.shape[-1])
