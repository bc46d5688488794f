"""Parameters that `torch.distributed.fsdp.fully_shard` has spread over processes.

A DTensor is known by its `device_mesh`, so that nobody who has none pays for the import.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from peftkern._select import is_a


def settle(model: nn.Module) -> None:
    """Makes parameters the shards that the optimiser trains.

    After an evaluation `fully_shard` leaves a root's whole copies in their places, which the next
    step would throw away.

    Raises:
        ValueError: FullyShardedDataParallel has flattened the parameters.
    """
    for module in model.modules():
        if is_a(module, "torch", "FullyShardedDataParallel"):
            raise ValueError(
                "model must be sharded by torch.distributed.fsdp.fully_shard, "
                "got FullyShardedDataParallel"
            )
        if is_a(module, "torch", "FSDPModule"):
            module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of it; of a sharded one every process of its mesh must ask at once."""
    return tensor.full_tensor() if _mesh(tensor) is not None else tensor  # type: ignore[attr-defined]


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copies a whole value into a parameter, of which this process may hold a shard alone."""
    if (mesh := _mesh(parameter)) is not None:
        from torch.distributed.tensor import distribute_tensor

        placements = parameter.placements  # type: ignore[attr-defined]
        # No source rank: every process has the value, so nothing is sent.
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.copy_(value)


@contextmanager
def first_process(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Whether this process is the one that writes; none leaves before it has.

    Without shards each process speaks for itself, and waits for nobody.
    """
    mesh = next((m for t in tensors if (m := _mesh(t)) is not None), None)
    if mesh is None:
        yield True
        return
    try:
        yield not any(mesh.get_coordinate())
    finally:
        from torch.distributed import barrier

        # One axis after the other: whoever is through has waited for one that had waited before.
        for axis in range(mesh.ndim):
            barrier(mesh.get_group(axis))


def _mesh(tensor: Tensor) -> Any:
    return getattr(tensor, "device_mesh", None)
