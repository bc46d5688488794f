"""Puts prefixes into the attention modules of transformers.

Such a module looks its attention function up by the name that its config has for it, and hands it
its query, the keys and values as the cache holds them (rotated already) and the mask. So a prefix
needs no forward of ours, and neither positions nor the cache know of it: the module keeps its class
and gets a config with another name, under which transformers' table has `attend`; and `attend`
calls the function that the model's own config names.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.bottleneck.prefix import Heads, Prefix
from peftkern.qlora.placing import features

NAME = "peftkern_prefix"  # in transformers' table of attention functions
SERVED = ("eager", "sdpa")  # whose masks are plain tensors, one column a key
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # the name that every file of models has for that table
# How modules name what they make keys and values with, and the width of a head.
KEYS = ("k_proj", "key", "k", "key_proj")
VALUES = ("v_proj", "value", "v", "value_proj")
WIDTHS = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
COUNTS = ("num_key_value_heads", "num_heads", "num_attention_heads", "n_heads")


class PrefixedConfig:
    """The config of a model, as an attention with a prefix sees it: with `attend` for its function.

    All else is read from, and written to, the model's own, so that what changes there counts here.

    Args:
        config: of the model.
        kind: the class of the attention module, of transformers.
    """

    _attn_implementation = NAME

    def __init__(self, config: Any, kind: type[nn.Module]) -> None:
        _register()
        vars(self).update(own=config, kind=kind, source=_source(kind))

    def __getattr__(self, name: str) -> Any:
        if name in ("own", "kind", "source"):  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)

    def __reduce__(self) -> tuple[type[PrefixedConfig], tuple[Any, ...]]:
        return PrefixedConfig, (self.own, self.kind)


def attention(module: nn.Module) -> bool:
    """Whether a module looks its function up in transformers' table."""
    return _kind(module) is not None


def heads(module: nn.Module) -> Heads | None:
    """Those of its keys and values; None where its attributes do not tell."""
    inside, config = vars(module), vars(module).get("config")
    widths = [inside[name] for name in WIDTHS if isinstance(inside.get(name), int)]
    if not widths:
        return None
    key, value = widths[0], inside.get("v_head_dim", widths[0])
    made_by = [[c for n in names if (c := module._modules.get(n))] for names in (KEYS, VALUES)]
    if all(made_by):
        rows = [features(linears[0])[0] for linears in made_by]
        number = rows[0] // key
        return Heads(number, key, value) if rows == [number * key, number * value] else None
    for source in (inside, vars(config) if config is not None else {}):
        for name in COUNTS:
            if isinstance(source.get(name), int):
                return Heads(source[name], key, value)
    return None


def obstacle(module: nn.Module) -> str | None:
    """Why an attention module cannot take a prefix; None where it can."""
    if (kind := _kind(module)) is None:
        return f"{type(module).__name__} asks transformers' table for no attention function"
    if "prefix" in module._modules:
        return "has a prefix already"
    if hasattr(module, "prefix"):
        return "has an attribute `prefix` of its own"
    function = _source(kind)
    compared = {*SERVED} & {c for c in function.__code__.co_consts if isinstance(c, str)}
    # What GPT-2 does itself with "eager" it does for this switch alone.
    if compared and vars(module).get("reorder_and_upcast_attn") is not False:
        return f"its forward does otherwise where attention is {' or '.join(sorted(compared))}"
    if _default(function) is None:
        return "its eager attention is not to be found"
    implementation = getattr(vars(module).get("config"), "_attn_implementation", None)
    if implementation not in SERVED:
        return f"its attention is {implementation}, not {' or '.join(SERVED)}"
    if heads(module) is None:
        return "how many heads its keys have is not to be found"
    return None


def put(module: nn.Module, prefix: Prefix) -> None:
    """Gives an attention module its prefix, as a child of that name."""
    kind = _kind(module)
    assert kind is not None
    vars(module)["config"] = PrefixedConfig(vars(module)["config"], kind)
    module.add_module("prefix", prefix)


def take_out(module: nn.Module) -> None:
    """The reverse of `put`, where that has happened."""
    config = vars(module)["config"]
    vars(module)["config"] = config.own if isinstance(config, PrefixedConfig) else config
    module._modules.pop("prefix", None)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model's config names, over the prefix and what the module gives.

    Every query sees the whole prefix, whatever its mask and window. Weights, where they are
    returned, have a column for each of its keys first.

    Args:
        module: has a `Prefix`.
        query: `[batch, heads, rows, width]`.
        key, value: `[batch, heads of keys, columns, width]`.
        attention_mask: `[batch or 1, heads or 1, rows, columns]`, bool or to be added; None.
        options: of the attention function; a `position_bias` has no part for the prefix.

    Returns:
        As the attention function does: `[batch, rows, heads, width]`, and weights or None.

    Raises:
        ValueError: an attention function that takes other masks, pages, or indices of keys.
    """
    config: Any = module.config
    implementation, source = config.own._attn_implementation, config.source
    if implementation not in SERVED:
        raise ValueError(
            f"attn_implementation must be eager or sdpa for a prefix, got {implementation!r}"
        )
    for name in ("cache", "indices"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None for a prefix, got one")
    table = source.__globals__[INTERFACE]
    function = table.get_interface(implementation, _default(source))
    prefix: Prefix = module.prefix  # type: ignore[assignment]
    if prefix.length:
        if implementation == "sdpa" and attention_mask is None:
            key, value, attention_mask = _causal(module, query, key, value, options)
        bias, columns = options.get("position_bias"), key.shape[2]
        if bias is not None:
            options["position_bias"] = _widened(bias, columns, prefix.length, 0.0)
        if attention_mask is not None:
            seen = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = _widened(attention_mask, columns, prefix.length, seen)
        key, value = prefix(key, value)
    return function(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The mask that sdpa would have made itself, which cannot see past the diagonal to a prefix.

    Of a cache that is longer than what it holds, it reads what is filled.
    """
    causal, rows = options.get("is_causal"), query.shape[2]
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if not causal or rows == 1:
        return key, value, None
    past = torch.ones(rows, rows, dtype=torch.bool, device=key.device).tril()
    return key[:, :, :rows], value[:, :, :rows], past[None, None]


def _widened(mask: Tensor, columns: int, length: int, value: float) -> Tensor:
    """With a column in front for each key of the prefix."""
    if mask.shape[-1] == 1:
        mask = mask.expand(*mask.shape[:-1], columns)
    return nn.functional.pad(mask[..., :columns], (length, 0), value=value)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The class whose forward asks the table; those that we put in front of it do not."""
    for kind in type(module).__mro__:
        if "forward" in vars(kind) and inspect.isfunction(function := _source(kind)):
            if INTERFACE in function.__code__.co_names:
                return kind
    return None


def _source(kind: type[nn.Module]) -> Any:
    """The forward of a class without what decorates it."""
    return inspect.unwrap(vars(kind)["forward"])


def _default(function: Any) -> Any:
    """What its file calls eager attention, which the table does not have."""
    names = [n for n in function.__code__.co_names if n.endswith("eager_attention_forward")]
    return function.__globals__.get(names[0]) if len(names) == 1 else None


def _register() -> None:
    table = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    if NAME not in table:
        table.register(NAME, attend)
