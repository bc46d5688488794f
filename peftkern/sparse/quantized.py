"""A sparse S beside a linear whose base is quantised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftkern._family import Explained
from peftkern.qlora.adapter import LinearAdapter
from peftkern.qlora.config import quantized_base
from peftkern.qlora.described import of_weight
from peftkern.qlora.frozen import FrozenLinear, base_of
from peftkern.qlora.weight import QuantizedWeight
from peftkern.sparse import stored, swap
from peftkern.sparse.layer import Product
from peftkern.sparse.linear import linear
from peftkern.sparse.pattern import Pattern
from peftkern.sparse.state import SUFFIX, State, states


class SparseQuantizedLinear(Product, LinearAdapter):
    """y = x W^T + bias + x S^T: W stays quantised, and the values of S, `weight_sparse`, train.

    Args:
        weight: `[out, in]`, quantised or dense. Its storage is shared, never copied or changed.
        bias: `[out]` or None.
        pattern: `[out, in]`, where S has entries; they start at 0.
        rule: by which they were selected, for files.

    Shape:
        `[..., in]` -> `[..., out]`, in the input's dtype.
    """

    parent = FrozenLinear
    parameters_read = ()

    merged = LinearAdapter.merged
    format, mergeable = LinearAdapter.format, LinearAdapter.mergeable
    merge_obstacle = LinearAdapter.merge_obstacle
    __reduce_ex__ = object.__reduce_ex__  # type: ignore[assignment]  # pickle finds this class by its name

    def __init__(
        self,
        weight: QuantizedWeight | Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        rule: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(weight, bias)
        device = self.weight.device
        state = State(pattern.to(device), "delta", None)
        state.rule = rule
        self._sparse_states, self._sparse_guests = {}, set()
        swap.swap(self, "weight", state, nn.Parameter(torch.zeros(pattern.nnz, device=device)))

    @classmethod
    def from_config(
        cls, module: nn.Module, config: Any, pattern: Pattern | None
    ) -> SparseQuantizedLinear:
        """In the place of a linear; None is a pattern without entries."""
        base = base_of(module)
        rows, columns = base.shape
        if isinstance(base, Tensor):
            base = base.detach().contiguous()
            base = base if config.base is None else quantized_base(base, config.of_base())
        if pattern is None:
            none = torch.empty(0, dtype=torch.int64)
            pattern = Pattern.from_indices(none, none, (rows, columns))
        rule = config.fields()["rule"]
        return cls(base, module.bias, pattern, rule).train(module.training)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            self.refuse_training()
            return FrozenLinear.forward(self, x)
        state, values = states(self)["weight"], self._parameters["weight" + SUFFIX]
        assert values is not None
        return linear(x, self.base, values, state.pattern, self.bias, "delta")

    @torch.no_grad()
    def merged_rows(self, panel: Tensor, rows: slice) -> Tensor:
        """What merging makes of these rows of the base, which come dense in float32 or float64."""
        state, values = states(self)["weight"], self._parameters["weight" + SUFFIX]
        assert values is not None
        row_start, columns = state.pattern.csr().tensors
        begin, end = (int(row_start[n]) for n in (rows.start, rows.stop))
        counts = row_start[rows.start : rows.stop + 1].diff()
        height = torch.arange(len(counts), device=panel.device)
        places = height.repeat_interleave(counts, output_size=end - begin)
        merged = panel.clone()
        merged[places, columns[begin:end].long()] += values[begin:end].to(panel.dtype)
        return merged

    def explained(self) -> Explained:
        if self.merged:
            return of_weight(self.base, "the merged weight alone")
        share = 100 * states(self)["weight"].pattern.density
        told = of_weight(self.base, f"base, and peftkern.sparse, S on {share:.3g} % beside it")
        added = {"S": "sparse_matmul", "gradient": "sparse_sddmm"}
        return replace(told, ops=told.ops | added)

    def nbytes(self) -> int:
        return LinearAdapter.nbytes(self) + states(self)["weight"].pattern.nbytes

    def shape_of(self, name: str) -> Sequence[int]:
        return self.out_features, self.in_features

    def base_hash(self) -> dict[str, str]:
        weight = self.base if self.original is None else self.original.weight
        return {"weight": stored.base_hash(weight)}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in stored.STATE_PARTS:
                destination.pop(f"{prefix}weight{SUFFIX}.{name}", None)
