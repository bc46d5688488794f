"""What the processes of test_distributed.py do; in a module of its own, since they import it."""

import os
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import disturb, toy
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import peftkern
from peftkern import LoraConfig, _native, qlora

# A rank that no number of processes divides: shards are uneven.
CONFIG = LoraConfig(r=3, lora_alpha=6, base="nf4")
BASES = {f"a base in {name}": replace(CONFIG, base=name) for name in (None, *qlora.formats)}
STEPS, BATCH, LENGTH = 3, 8, 5


def in_processes(count, task, folder, *args):
    """What `task(rank, count, *args)` returns in each of so many processes, by rank."""
    folder.mkdir()
    # One server imports torch once; what it forks starts in a moment.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "peftkern"])
    multiprocessing.start_processes(
        _enter, (count, task, folder, args), nprocs=count, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _enter(rank, count, task, folder, args):
    torch.set_num_threads(1)
    if _native.loaded:
        torch.ops.peftkern.poison(True)
    torch.use_deterministic_algorithms(True)  # torch fills its fresh memory with NaN, too
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    torch.save(task(rank, count, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def adapted(seed=2, config=CONFIG):
    return disturb(peftkern.adapt(toy(), config), seed)


def checkpointed(model):
    """Every block computes its activations again in backward."""
    for block in model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def sharded(model, units=True, replicas=1, **options):
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    mesh = mesh if replicas > 1 else mesh["shards"]
    for block in model.layers if units else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state(model):
    """The adapter; every process must ask."""
    return {k: whole(v).clone() for k, v in peftkern.adapter_state_dict(model).items()}


def batches():
    generator = torch.Generator().manual_seed(4)
    return torch.randint(24, (STEPS, 2, BATCH, LENGTH), generator=generator)


def loss_of(model, tokens, targets):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def train(model, rank=0, count=1, accumulate=1):
    """Each process takes its part of every batch; -> its losses and the whole adapter."""
    optimizer = torch.optim.SGD(peftkern.trainable_parameters(model), lr=0.2, momentum=0.9)
    losses = []
    for batch in batches():
        parts = batch[:, rank * BATCH // count : (rank + 1) * BATCH // count].chunk(accumulate, 1)
        total = 0.0
        for i, (tokens, targets) in enumerate(parts):
            waits = i + 1 < len(parts) and isinstance(model, DistributedDataParallel)
            with model.no_sync() if waits else nullcontext():
                loss = loss_of(model, tokens, targets) / len(parts)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return torch.stack(losses), state(model)


DDP = {
    "plain": lambda: DistributedDataParallel(adapted()),
    "a static graph": lambda: DistributedDataParallel(adapted(), static_graph=True),
    "activation checkpointing": lambda: DistributedDataParallel(checkpointed(adapted())),
    "accumulation": lambda: DistributedDataParallel(adapted()),
}

FSDP2 = {
    "plain": lambda: sharded(adapted()),
    "one unit": lambda: sharded(adapted(), units=False),
    "whole until backward": lambda: sharded(adapted(), reshard_after_forward=False),
    "activation checkpointing": lambda: sharded(checkpointed(adapted())),
    "replicas of shards": lambda: sharded(adapted(), replicas=2),
    **{way: partial(lambda config: sharded(adapted(config=config)), c) for way, c in BASES.items()},
}


def train_in_ddp(rank, count):
    return {
        way: train(build(), rank, count, accumulate=2 if way == "accumulation" else 1)
        for way, build in DDP.items()
    }


def train_in_fsdp2(rank, count):
    return {way: train(build(), rank, count) for way, build in FSDP2.items()}


def step_in_16_bits(rank, count):
    """-> the packed bytes' dtype in forward and their share here, logits, and every gradient."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(adapted(), mp_policy=policy)
    layer = model.layers[0].q_proj
    share = layer.weight.to_local().numel() / layer.weight.numel()
    seen = []
    layer.register_forward_hook(lambda layer, *_: seen.append(layer.quantized_weight.packed.dtype))
    part = batches()[0, :, rank * BATCH // count : (rank + 1) * BATCH // count]
    loss_of(model, *part).backward()
    logits = model(part[0]).detach()
    grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    return seen[0], share, logits, grads


def save(rank, count, folder):
    """Trains and saves in every way; -> what was saved."""
    found = {}
    wrapped = DistributedDataParallel(adapted())
    found["ddp"] = train(wrapped, rank, count)[1]
    if rank == 0:
        peftkern.save_adapter(wrapped, folder / "ddp")
    model = sharded(adapted(), units=False)
    found["fsdp2"] = train(model, rank, count)[1]
    with torch.no_grad():
        model(batches()[0, 0])  # leaves the root unsharded
    peftkern.save_adapter(model, folder / "fsdp2")
    # It is there when the call returns, in every process; and one process has written it.
    assert os.path.exists(folder / "fsdp2" / "adapter_model.safetensors")
    peftkern.save_adapter(model, folder / f"of process {rank}")
    assert os.path.exists(folder / f"of process {rank}") == (rank == 0)
    dcp.save(peftkern.adapter_state_dict(model), checkpoint_id=folder / "dcp")
    dcp.save(model.state_dict(), checkpoint_id=folder / "dcp of all")
    return found


def state_by_torch(rank, count, folder):
    """-> by base, whole states: what was got of a model, and of two that have taken it."""
    return {way: _state_by_torch(config, folder / way) for way, config in BASES.items()}


def _state_by_torch(config, folder):
    full, model = StateDictOptions(full_state_dict=True), sharded(adapted(config=config))
    shards = get_model_state_dict(model)
    dcp.save(shards, checkpoint_id=folder)
    found = [get_model_state_dict(model, options=full)]
    for state, options in ((shards, None), (found[0], full)):
        other = sharded(another(config))
        set_model_state_dict(other, dict(state), options=options)
        found.append(get_model_state_dict(other, options=full))
    return found


def another(config):
    """Other weights, on which other scales fit."""
    return disturb(peftkern.adapt(toy(seed=7), config), 5)


def save_replicas(rank, count, folder):
    """-> what was saved, by one process of all replicas."""
    model = sharded(adapted(), replicas=2)
    peftkern.save_adapter(model, folder / f"of process {rank}")
    return state(model)


def load(rank, count, folder, names):
    """-> the adapter and logits of every saved one, loaded in every way."""
    found = {}
    tokens = batches()[0, 0]
    ways = {
        "ddp": lambda: DistributedDataParallel(adapted(seed=5)),
        "fsdp2": lambda: sharded(adapted(seed=5)),
        "one unit": lambda: sharded(adapted(seed=5), units=False),
    }
    for way, build in ways.items():
        for name in names:
            model = build()
            with torch.no_grad():
                model(tokens)  # leaves the root unsharded, where the adapter must not be put
            peftkern.load_adapter(model, folder / name)
            logits = model(tokens)
            logits.sum().backward()  # shards everything again
            found[f"{name} in {way}"] = state(model), logits.detach()
    return found


def load_dcp(rank, count, folder):
    return _load_dcp(lambda: sharded(adapted(seed=5)), folder)


def load_dcp_alone(folder):
    return _load_dcp(lambda: adapted(seed=5), folder)


def _load_dcp(build, folder):
    """-> the adapter, read as such and as part of the whole state dict."""
    model, other = build(), build()
    dcp.load(peftkern.adapter_state_dict(model), checkpoint_id=folder / "dcp")
    all_of_it = other.state_dict()
    dcp.load(all_of_it, checkpoint_id=folder / "dcp of all")
    other.load_state_dict(all_of_it)
    return state(model), state(other)
