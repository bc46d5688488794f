"""What an adapted model consists of, as a table."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peftkern import _conditions, _swapped
from peftkern._family import Adapter, adapters
from peftkern._select import starred
from peftkern.adapt import Skipped
from peftkern.qlora import QLoRALinear
from peftkern.qlora.described import vllm_rank
from peftkern.qlora.frozen import FrozenLinear


@dataclass(frozen=True)
class Row:
    """One adapted or optimized module.

    Args:
        name: in the model.
        layer: its class.
        format: how its base is stored: a 4-bit format or a dtype.
        trainable: parameters that take a gradient.
        bytes: of base, bias and adapter; where it is merged, of the original too.
        mergeable: "exact", or what `merge` must be told, or "merged" and what that lost; "by peft"
            (its way, its rounding), or "no: " and the reason.
        vllm: "yes", or "no: " and the reason, or what vLLM must be told.
    """

    name: str
    layer: str
    format: str
    trainable: int
    bytes: int
    mergeable: str
    vllm: str


@dataclass(frozen=True)
class Report:
    """The adapted and optimized modules of a model, and what was left as it is; prints as a table.

    Args:
        rows: one a module, in the model's order.
        skipped: what a config named, or would name, or `optimize` would take, and why it was left.
        parameters: of the whole model.
        shared: names of rows that read one input, in one pass over it: q, k and v, say.
    """

    rows: list[Row]
    skipped: list[Skipped]
    parameters: int
    shared: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def trainable(self) -> int:
        """Trainable parameters of all rows."""
        return sum(row.trainable for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        head = ["name", "layer", "format", "trainable", "bytes", "mergeable", "vLLM"]
        body = [
            [r.name, r.layer, r.format, f"{r.trainable:,}", f"{r.bytes:,}", r.mergeable, r.vllm]
            for r in self.rows
        ]
        share = 100 * self.trainable / max(self.parameters, 1)
        lines = _table([head, *body], numbers=(3, 4))
        lines.append(
            f"{len(self.rows)} modules, {self.trainable:,} of {self.parameters:,} "
            f"parameters train ({share:.2f} %), {self.bytes:,} bytes"
        )
        together = [" + ".join(map(starred, names)) for names in self.shared]
        lines += dict.fromkeys(f"one pass over the input: {names}" for names in together)
        left_out = Counter(f"left out: {starred(s.name)}: {s.reason}" for s in self.skipped)
        lines += [line + (f" ({n} modules)" if n > 1 else "") for line, n in left_out.items()]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What `adapt` has put where, what `optimize` runs on our kernels, and what was left out.

    Args:
        model: adapted or not; then the report is empty.

    Returns:
        A `Report` with a row for every adapted or optimized module.
    """
    layers = adapters(model)
    rows = [_row(name, layer, list(layers.values())) for name, layer in layers.items()]
    parameters = sum(p.numel() for p in model.parameters())
    for layer in layers.values():  # a packed byte holds two weights
        weight = layer.quantized_weight if isinstance(layer, FrozenLinear) else None
        if weight is not None:
            parameters += weight.shape.numel() - weight.packed.numel()
    skipped = list(getattr(model, "_peftkern_skipped", ()))
    optimized = {n: m for n, m in model.named_modules() if isinstance(m, _swapped.Swapped)}
    for name, module in optimized.items():
        if (reason := _conditions.why_not(module)) is not None:
            skipped.append(Skipped(name, reason))
            continue
        rows.append(_row_of_optimized(name, module, list(optimized.values())))
        base = _conditions.base_of(module)
        packed = base._parameters["weight"]
        assert packed is not None
        parameters += _swapped.weight_of(base).shape.numel() - packed.numel()
    served = {row.name for row in rows}
    return Report(rows, skipped, parameters, _shared(layers | optimized, served))


def _shared(layers: dict[str, Any], served: set[str]) -> list[tuple[str, ...]]:
    """The groups that are computed together: one layer that is not has all of its group alone."""
    groups = defaultdict(list)
    for name, layer in layers.items():
        if (group := getattr(layer, "shared_input", None)) is not None:
            groups[id(group)].append(name)
    return [
        tuple(names)
        for names in groups.values()
        if len(names) > 1 and all(n in served and _is_plain(layers[n]) for n in names)
    ]


def _is_plain(layer: Any) -> bool:
    """As its `operands` asks, of all but the input."""
    if isinstance(layer, QLoRALinear):
        return not (layer.original or layer.merge_aware or layer.use_dora)
    adapters = _conditions.adapters_of(layer)
    return len(adapters) == 1 and adapters[0].magnitude is None


def _row(name: str, layer: Adapter, layers: list[Adapter]) -> Row:
    return Row(
        name=name,
        layer=type(layer).__name__,
        format=layer.format(),
        trainable=sum(p.numel() for p in layer.trained() if p.requires_grad),
        bytes=layer.nbytes(),
        mergeable=layer.mergeable(),
        vllm=layer.vllm(layers),
    )


def _row_of_optimized(name: str, layer: Any, layers: list[Any]) -> Row:
    base = _conditions.base_of(layer)
    weight, stored = _swapped.weight_of(base), base._parameters["weight"]
    dtype = str(weight.dtype).removeprefix("torch.")
    others = [p for p in layer.parameters() if p is not stored]
    adapted = isinstance(layer, _swapped.Lora)
    return Row(
        name=name,
        layer=_swapped.title(layer),
        format=dtype if isinstance(weight, Tensor) else weight.format.name,
        trainable=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        bytes=weight.nbytes + sum(p.nbytes for p in others),
        mergeable="by peft" if adapted else "no: no adapter",
        vllm=_vllm_of_peft(layer, layers) if adapted else "no: no adapter",
    )


def _vllm_of_peft(layer: Any, layers: list[Any]) -> str:
    """Of its layer alone: what else vLLM refuses, such as `modules_to_save`, peft's config says."""
    if layer.lora_magnitude_vector:
        return "no: DoRA"
    others: list[Any] = [other for other in layers if isinstance(other, _swapped.Lora)]
    for name in layer.r:
        facts = [(other.r[name], other.scaling[name]) for other in others if name in other.r]
        if (layer.r[name], layer.scaling[name]) != Counter(facts).most_common(1)[0][0]:
            return "no: a rank or alpha of its own"
    return vllm_rank(max(max(other.r.values(), default=0) for other in others))


def _table(rows: list[list[str]], numbers: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
