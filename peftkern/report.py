"""What an adapted model consists of, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftkern import _peft
from peftkern._select import starred
from peftkern.adapt import Skipped, adapters
from peftkern.qlora import QLoRALinear

VLLM_DEFAULT_RANK, VLLM_MAX_RANK = 16, 512  # of vLLM's option max_lora_rank


@dataclass(frozen=True)
class Row:
    """One adapted module.

    Args:
        name: in the model.
        layer: its class.
        format: how its base is stored: a 4-bit format or a dtype.
        trainable: parameters that take a gradient.
        bytes: of base, bias and adapter.
        mergeable: "exact", or "no: " and the reason.
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
    """The adapted modules of a model, and what was left as it is; prints as a table.

    Args:
        rows: one a module, in the model's order.
        skipped: what a config named, or would name, with the reason why it has no adapter.
        parameters: of the whole model.
    """

    rows: list[Row]
    skipped: list[Skipped]
    parameters: int

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
            f"{len(self.rows)} adapted modules, {self.trainable:,} of {self.parameters:,} "
            f"parameters train ({share:.2f} %), {self.bytes:,} bytes"
        )
        left_out = [f"left out: {starred(s.name)}: {s.reason}" for s in self.skipped]
        lines += dict.fromkeys(left_out)
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What `adapt` has put where, and what it left out.

    Args:
        model: adapted or not; then the report is empty.

    Returns:
        A `Report` with a row for every adapted module.
    """
    layers = adapters(model)
    rows = [_row(name, layer, list(layers.values())) for name, layer in layers.items()]
    parameters = sum(p.numel() for p in model.parameters())
    for layer in layers.values():  # a packed byte holds two weights
        if (weight := layer.quantized_weight) is not None:
            parameters += weight.shape.numel() - weight.packed.numel()
    return Report(rows, list(getattr(model, "_peftkern_skipped", ())), parameters)


def _row(name: str, layer: QLoRALinear, layers: list[QLoRALinear]) -> Row:
    weight = layer.quantized_weight
    tensors = [*layer.parameters(), *layer.buffers()]
    stored = layer.weight.nbytes if weight is None else weight.nbytes
    dtype = str(layer.weight.dtype).removeprefix("torch.")
    return Row(
        name=name,
        layer=type(layer).__name__,
        format=dtype if weight is None else weight.format.name,
        trainable=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        bytes=stored + sum(t.nbytes for t in tensors if t is not layer.weight),
        mergeable="exact" if weight is None else f"no: {weight.format.bits}-bit base",
        vllm=_vllm(layer, layers),
    )


def _vllm(layer: QLoRALinear, layers: list[QLoRALinear]) -> str:
    """vLLM takes the scale of every module from the config's r and lora_alpha, patterns unread."""
    if layer.use_dora:
        return "no: DoRA"
    if layer.trains_bias:
        return "no: a trained bias"
    r, alpha, rslora = _peft.common(layers)
    if (_peft.rank(layer), _peft.alpha(layer, rslora)) != (r, alpha):
        return "no: a rank or alpha of its own"
    ranks = max(map(_peft.rank, layers))
    if ranks > VLLM_MAX_RANK:
        return f"no: r above {VLLM_MAX_RANK}"
    return "yes" if ranks <= VLLM_DEFAULT_RANK else f"yes, with max_lora_rank >= {ranks}"


def _table(rows: list[list[str]], numbers: tuple[int, ...]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
