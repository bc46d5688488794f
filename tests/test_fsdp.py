"""Does a quantised model shard? Two processes on the CPU, bytes stored as the adapter's dtype."""

import warnings

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import peftkern

WORLD = 2


def of_bitsandbytes(storage):
    kinds = ("nf4", "fp4", "nf4")
    layers = [
        bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind, quant_storage=storage)
        for kind in kinds
    ]
    return peftkern.adapt(nn.Sequential(*layers).to("cpu"), peftkern.LoraConfig(r=4))


def of_ours(storage):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(3)])
    config = peftkern.LoraConfig(r=4, base="nf4", quant_storage=storage)
    return peftkern.adapt(model, config)


def build(make, storage):
    torch.manual_seed(0)
    model = make(storage)
    for layer in model:
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.to(storage)


def flat_sharding(model):
    """FSDP: all parameters of a unit in one flat tensor, so of one dtype."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({peftkern.QLoRALinear})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )


def tensor_sharding(model):
    """FSDP2: each parameter by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    return model


def train(rank, file, make, storage):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    try:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(storage)
        for shard in (flat_sharding, tensor_sharding):
            losses = [steps(build(make, storage), x), steps(shard(build(make, storage)), x)]
            torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
            assert losses[0][-1] < losses[0][0]
            whole = build(make, storage)
            assert torch.equal(shard(build(make, storage))(x), whole(x))
        sharded = flat_sharding(whole)
        state = sharded.state_dict()
        assert {k: v.dtype for k, v in state.items()} == {
            k: v.dtype for k, v in build(make, storage).state_dict().items()
        }
        for name, tensor in build(make, storage).state_dict().items():
            assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    finally:
        dist.destroy_process_group()


def steps(model, x):
    optimizer = torch.optim.SGD(peftkern.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("make", [of_bitsandbytes, of_ours])
def test_a_model_stored_as_floats_trains_in_shards(make, tmp_path):
    arguments = (tmp_path / "rendezvous", make, torch.bfloat16)
    torch.multiprocessing.spawn(train, arguments, nprocs=WORLD)
