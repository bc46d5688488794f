"""What the processes of test_distributed_attached.py do; they import it."""

import torch
import transformers
from distributed import batches, checkpointed, sharded, train, whole
from models import disturb
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftkern
from peftkern import BottleneckConfig, LoraConfig, PrefixConfig

BOTTLENECK = BottleneckConfig(r=3, place="both", norm="in", train_scale=True)
PREFIX = PrefixConfig(3)
PROJECTED = PrefixConfig(3, prefix_projection=True, encoder_hidden_size=5)
CONFIGS = {
    "bottleneck": BOTTLENECK,
    "prefix": PREFIX,
    "both beside LoRA": (LoraConfig(r=3, base="nf4"), PREFIX, BOTTLENECK),
}


class Language(nn.Module):
    """A small OPT, whose blocks call `fc1` and `fc2` themselves: an adapter spans both."""

    def __init__(self):
        super().__init__()
        config = transformers.OPTConfig(
            vocab_size=24, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
        self.model = transformers.OPTForCausalLM(config)

    @property
    def layers(self):
        return self.model.model.decoder.layers

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


def plain():
    torch.manual_seed(0)
    return Language().eval()


def adapted(config=BOTTLENECK, seed=2):
    return disturb(peftkern.adapt(plain(), config), seed)


def with_its_mlp(model):
    """The MLP of the prefixes of all layers is no part of one layer's unit."""
    fully_shard(model.layers[0].self_attn.prefix.trunk)
    return sharded(model)


WAYS = {
    "ddp": lambda config: DistributedDataParallel(adapted(config)),
    "ddp, activation checkpointing": lambda config: DistributedDataParallel(
        checkpointed(adapted(config))
    ),
    "fsdp2": lambda config: sharded(adapted(config)),
    "fsdp2, one unit": lambda config: sharded(adapted(config), units=False),
    "fsdp2, activation checkpointing": lambda config: sharded(checkpointed(adapted(config))),
}


def train_and_save(rank, count, folder):
    """-> by config and way, losses and adapter, saved under both; and the logits of what `single`
    holds, loaded in every way.
    """
    trained, logits = {}, {}
    projected = {"ddp": WAYS["ddp"], "fsdp2": lambda config: with_its_mlp(adapted(config))}
    for name, config in {**CONFIGS, "projected": PROJECTED}.items():
        for way, build in (projected if name == "projected" else WAYS).items():
            model = build(config)
            trained[name, way] = train(model, rank, count)
            if rank == 0 or way.startswith("fsdp2"):
                peftkern.save_adapter(model, folder / f"{name} in {way}")
    for name, config in CONFIGS.items():
        for way in ("ddp", "fsdp2", "fsdp2, one unit"):
            model = WAYS[way](config)
            peftkern.load_adapter(model, folder / f"single {name}")
            with torch.no_grad():
                logits[name, way] = whole(model(batches()[0, 0]))
    return trained, logits
