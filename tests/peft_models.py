"""Toy models as peft and bitsandbytes make them, for the tests of `optimize`."""

import bitsandbytes as bnb
import peft
import torch
from models import disturb, toy
from torch import nn

import peftkern
from peftkern import _swapped

BASES = (None, *peftkern.qlora.formats)
ENDS = ("q_proj", "gate_proj", "down_proj")


def linear4bit(linear, quant_type="nf4", cls=bnb.nn.Linear4bit, **options):
    layer = cls(
        linear.in_features, linear.out_features, bias=linear.bias is not None, **options,
        **({"quant_type": quant_type} if cls is bnb.nn.Linear4bit else {}),
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def linear8bit(linear):
    layer = bnb.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None,
        has_fp16_weights=False,
    )  # fmt: skip
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def quantised(model, quant_type="nf4", **options):
    """Rows of whole blocks of 64, since bitsandbytes reads others wrongly on AVX-512 CPUs."""
    for block in model.layers:
        for end in ENDS:
            if quant_type == "int8":
                setattr(block, end, linear8bit(getattr(block, end)))
            else:
                setattr(block, end, linear4bit(getattr(block, end), quant_type, **options))
    setattr(model, f"is_loaded_in_{8 if quant_type == 'int8' else 4}bit", True)  # by transformers
    return model


def adapted(base="nf4", seed=0, dtype=torch.float32, quantising=None, **options):
    """In training mode, in which bitsandbytes leaves its weights as they are."""
    model = toy(seed=seed, width=64).to(dtype)
    if base is not None:
        quantised(model, quant_type=base, **(quantising or {}))
    config = peft.LoraConfig(
        r=4, lora_alpha=6, **{"target_modules": ["q_proj", "down_proj"]} | options
    )
    return disturb(peft.get_peft_model(model, config)).train()


def layer(model, name="layers.0.q_proj"):
    return model.get_submodule(f"base_model.model.{name}")


def swapped(model):
    prefix = "base_model.model."
    return [
        n.removeprefix(prefix) for n, m in model.named_modules() if isinstance(m, _swapped.Swapped)
    ]


def reasons(report):
    return {s.name.removeprefix("base_model.model."): s.reason for s in report.skipped}


def dense(layer):
    """Its base weight, as everyone decodes it."""
    weight = _swapped.weight_of(layer.base_layer)
    return weight.detach() if torch.is_tensor(weight) else weight.dequantize(torch.float32)


def truth(x, weight, bias, *terms):
    """What a LoRA layer computes; terms are A, B and scale of each adapter."""
    y = nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    for a, b, scale in zip(terms[::3], terms[1::3], terms[2::3], strict=True):
        y = y + scale * (x @ a.to(x.dtype).t() @ b.to(x.dtype).t())
    return y


def dora_truth(x, weight, bias, a, b, scale, magnitude):
    """What a LoRA layer with DoRA computes, with W + c B A in full."""
    weight, a, b, magnitude = (t.to(x.dtype) for t in (weight, a, b, magnitude))
    norm = torch.linalg.vector_norm(weight + scale * (b @ a), dim=1)
    y = magnitude / norm * truth(x, weight, None, a, b, scale)
    return y if bias is None else y + bias.to(x.dtype)


def magnitude(layer, name="default"):
    return layer.lora_magnitude_vector[name].weight


def parts(layer, names=None):
    """Base weight and bias, then A, B and scale of each adapter."""
    bias = layer.base_layer.bias
    found = [dense(layer), None if bias is None else bias.detach()]
    for name in layer.active_adapters if names is None else names:
        found += [layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()]
        found += [layer.scaling[name]]
    return found


def runs_ours(layer):
    return peftkern.explain(layer).splitlines()[1].startswith("runs      peftkern.qlora")


def with_second_adapter(model, **options):
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"], **options)
    model.add_adapter("second", config)
    for name, parameter in model.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
