"""What every layer is that stands in a linear's place: a frozen linear, and a term that trains."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern import _family
from peftkern.qlora import merging
from peftkern.qlora.frozen import FrozenLinear


class LinearAdapter(FrozenLinear, _family.Adapter):
    """y = x W^T + bias + its term, which can be merged where it is linear in x."""

    merge_aware = False  # its forward computes with the weight that merging would store

    def merged_rows(self, panel: Tensor, rows: slice) -> Tensor:
        """What merging makes of these rows of the base, which come dense in float32 or float64."""
        raise NotImplementedError

    def merge(self, dtype: torch.dtype | None = None, requantize: bool = False) -> None:
        """As `peftkern.merge`, of this layer alone."""
        merged = merging.merged("layer", self, dtype, requantize)
        merging.warn({} if merged.loss is None else {"the layer": merged.loss})
        merging.take(self, merged)

    def unmerge(self) -> None:
        """As `peftkern.unmerge`, of this layer alone."""
        merging.give_back("layer", self)

    def merge_obstacle(self) -> str | None:
        return None

    def format(self) -> str:
        weight = self.quantized_weight
        return (
            str(self.weight.dtype).removeprefix("torch.") if weight is None else weight.format.name
        )

    def nbytes(self) -> int:
        stored = self.base.nbytes + (self.original.weight.nbytes if self.original else 0)
        tensors = (*self.parameters(), *self.buffers())
        return stored + sum(tensor.nbytes for tensor in tensors if tensor is not self.weight)

    def mergeable(self) -> str:
        if self.original is not None:
            loss = self.original.loss
            return "merged" if loss is None else f"merged, error {loss.error:.2g}"
        if (obstacle := self.merge_obstacle()) is not None:
            return f"no: {obstacle}"
        if self.quantized_weight is None or self.merge_aware:
            return "exact"
        return "by dtype or requantize"
