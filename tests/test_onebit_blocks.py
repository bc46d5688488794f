"""AdaptFormers of one bit beside the MLPs of vision transformers."""

from importlib import import_module

import pytest
import torch
from onebits import Block, Branch, blocks, config, latents, x_of
from torch import nn

import peftkern
from peftkern import OneBitConfig
from peftkern.onebit.blocks import KNOWN


def test_the_branch_reads_the_stream_and_no_drop_path_touches_it():
    model = blocks(1)
    peftkern.adapt(model, config("adaptformer"))
    block = model[0].train()
    block.drop_path.p = 1.0  # nothing but the stream and the branch is left
    x = x_of()
    torch.testing.assert_close(block(x), x + Branch(block.adapter)(x))


def of_transformers(module, name):
    """A block of the smallest model, and its width."""
    library = import_module(f"transformers.models.{module}.modeling_{module}")
    configs = [c for n, c in vars(library).items() if n.endswith("Config") and "Vision" in n]
    configs = configs or [c for n, c in vars(library).items() if n.endswith("Config")]
    configs = [c for c in configs if getattr(c, "model_type", "").startswith(module[:4])] or configs
    small = configs[0](hidden_size=16, intermediate_size=24, num_attention_heads=2)
    small._attn_implementation = "eager"
    return getattr(library, name)(small), 16


@pytest.mark.parametrize("path", [p for p in KNOWN if p.startswith("transformers")])
def test_every_known_block_of_transformers_gets_its_branch(path):
    module, name = path.split(".")[2], path.rpartition(".")[2]
    torch.manual_seed(0)
    block, width = of_transformers(module, name)
    angles = (torch.ones(5, width // 2), torch.zeros(5, width // 2))
    options = {"DINOv3ViTLayer": {"position_embeddings": angles}}
    masked = ("CLIPEncoderLayer", "SiglipEncoderLayer", "Siglip2EncoderLayer")
    options |= dict.fromkeys(masked, {"attention_mask": None})
    check_block(block, width, **options.get(name, {}))


@pytest.mark.parametrize("path", [p for p in KNOWN if p.startswith("timm")])
def test_every_known_block_of_timm_gets_its_branch(path, timm):
    module, _, name = path.rpartition(".")
    torch.manual_seed(0)
    block = getattr(import_module(module), name)(16, num_heads=2)
    check_block(block, 16)


def test_a_timm_model_trains_its_adapters(timm):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3,
        drop_path_rate=0.5,
    )  # fmt: skip
    peftkern.adapt(model, OneBitConfig(r=4, scale=3.0, placement="adaptformer", dropout=0.1))
    assert [row.name for row in peftkern.report(model).rows] == [
        "blocks.0.adapter", "blocks.1.adapter",
    ]  # fmt: skip
    before = [p.detach().clone() for p in latents(model)]
    optimizer = torch.optim.AdamW(latents(model), lr=1e-2)
    for _ in range(2):
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(latents(model), before, strict=True))


def check_block(block, width, **options):
    model = nn.Sequential(block).eval()
    streams = []
    x = x_of(width)
    with torch.no_grad():
        y = first(block(x, **options))
        peftkern.adapt(model, OneBitConfig(r=4, scale=3.0, placement="adaptformer"))
        model.eval()
        norm = block.get_submodule(block_norm(block))
        norm.register_forward_pre_hook(lambda module, args: streams.append(args[0]))
        branched = first(block(x, **options))
    (stream,) = streams
    assert not torch.equal(stream, x)  # attention has been added
    torch.testing.assert_close(branched, y + Branch(block.adapter)(stream), rtol=1e-5, atol=1e-6)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def block_norm(block):
    return next(n for n in ("norm2", "layernorm_after", "layer_norm2") if hasattr(block, n))


def test_an_unknown_block_is_refused_by_name():
    model = blocks()
    with pytest.raises(ValueError, match="must find blocks of vision transformers.*of Block, "):
        peftkern.adapt(model, OneBitConfig(placement="adaptformer"))
    with pytest.raises(ValueError, match=r"0: Block is no known block; blocks=\{'Block': …\}"):
        peftkern.adapt(model, OneBitConfig(placement="adaptformer", target_modules=["0"]))
    with pytest.raises(ValueError, match="0: Block has no norm with a weight named norm3"):
        peftkern.adapt(model, config("adaptformer", blocks={"Block": "norm3"}))
    assert not peftkern.report(model).rows and type(model[0]) is Block


def test_blocks_are_chosen_by_name():
    model = blocks()
    peftkern.adapt(model, config("adaptformer", target_modules=["1"]))
    assert [row.name for row in peftkern.report(model).rows] == ["1.adapter"]
