"""What users would use otherwise, as `build`s of contenders on NF4 weights of block size 64.

A build takes `(weight)` or `(weight, lora_a, lora_b)`, the weight dense and already what NF4
decodes to, so that every peer computes from the same values. One that is not installed raises
ImportError, which becomes a row.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layers import BLOCK_SIZE

SCALE = 2.0

Call = Callable[[Tensor], Tensor]


def dense(
    weight: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None, dropout: float = 0.0
) -> Call:
    """Two library calls where there is no adapter to add; what a careful user writes by hand."""
    if lora_a is None or lora_b is None:
        return lambda x: nn.functional.linear(x, weight)

    def call(x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, dropout) if dropout else x
        return nn.functional.linear(x, weight) + SCALE * (dropped @ lora_a.t() @ lora_b.t())

    return call


def compiled(
    weight: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None, dropout: float = 0.0
) -> Call:
    torch._dynamo.reset()  # one contender's recompilations are not to count against the next
    return torch.compile(dense(weight, lora_a, lora_b, dropout), fullgraph=True)


def linear4bit(weight: Tensor, format: str = "nf4", nested: bool = False) -> nn.Module:
    """bitsandbytes' layer in training mode: in that mode it leaves its weight as it was packed."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype,
        compress_statistics=nested, quant_type=format,
    )  # fmt: skip
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type=format, blocksize=BLOCK_SIZE,
        compress_statistics=nested, module=layer,
    )  # fmt: skip
    return layer.to(weight.device).train()


def bitsandbytes_fresh(weight: Tensor, format: str = "nf4") -> Call:
    return linear4bit(weight, format)


def bitsandbytes_8bit(weight: Tensor, training: bool = False) -> Call:
    """LLM.int8() without outliers. In eval mode it rounds activations to 8 bits; in training mode,
    on a CPU, it dequantises the weight. That it casts to float16 it says at each call, which is
    not to be timed.
    """
    import bitsandbytes

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    layer = bitsandbytes.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False
    )
    layer.weight.data = weight
    return layer.to("cpu").train(training)


def bitsandbytes_repacked(weight: Tensor) -> Call:
    """In eval mode on a CPU with AVX512-BF16 the first call repacks the weight for good."""
    layer = linear4bit(weight).eval()
    with torch.no_grad():
        layer(torch.zeros(1, weight.shape[1]))
    refuse_unless_repacked(layer)
    return layer


def refuse_unless_repacked(layer: nn.Module) -> None:
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise ImportError("bitsandbytes repacks only on a CPU with AVX512-BF16")


def peft_layer(
    base: nn.Module, lora_a: Tensor, lora_b: Tensor, use_dora: bool = False, dropout: float = 0.0
) -> nn.Module:
    """peft's LoRA layer around `base`, as `get_peft_model` puts it in."""
    import peft

    config = peft.LoraConfig(
        r=lora_a.shape[0], lora_alpha=SCALE * lora_a.shape[0], target_modules=["linear"],
        use_dora=use_dora, lora_dropout=dropout,
    )  # fmt: skip
    model = nn.ModuleDict({"linear": base})
    model.is_loaded_in_4bit = hasattr(base, "quant_state")  # else peft wraps it as a plain linear
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a model that has no config of transformers'
        layer = peft.inject_adapter_in_model(config, model)["linear"].train(base.training)
    layer.lora_A["default"].weight.data = lora_a.clone()
    layer.lora_B["default"].weight.data = lora_b.clone()
    return layer


def peft_bitsandbytes(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, use_dora: bool = False, dropout: float = 0.0
) -> nn.Module:
    return peft_layer(linear4bit(weight), lora_a, lora_b, use_dora, dropout)


def peft_dense(weight: Tensor, lora_a: Tensor, lora_b: Tensor, use_dora: bool = False) -> nn.Module:
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    return peft_layer(base, lora_a, lora_b, use_dora)


def bitsandbytes_quantize() -> Callable[[Tensor], Any]:
    import bitsandbytes.functional as functional

    return partial(functional.quantize_4bit, blocksize=BLOCK_SIZE, quant_type="nf4")


def bitsandbytes_decoded(quantized: Any) -> tuple[Tensor]:
    import bitsandbytes.functional as functional

    return (functional.dequantize_4bit(*quantized),)


def bitsandbytes_dequantize(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Into a fresh buffer: on the CPU it takes no `out`."""
    import bitsandbytes.functional as functional

    _, state = bitsandbytes_quantize()(weight)

    def call(packed: Tensor, absmax: Tensor) -> Tensor:
        state.absmax = absmax
        return functional.dequantize_4bit(packed, state)

    return call


def onnxruntime_nbits(weight: Tensor) -> Call:
    """MatMulNBits with int8 activations (accuracy_level 4). Its grid is uniform: scale and zero
    point are those that cover each block's range, as close as the format comes to NF4's values.
    """
    rows, columns = weight.shape
    blocks = weight.view(rows, columns // BLOCK_SIZE, BLOCK_SIZE)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / scale).round()
    codes = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4  # this format puts the first in the low nibble
    zeros = zero.to(torch.uint8)
    if zeros.shape[1] % 2:
        zeros = nn.functional.pad(zeros, (0, 1))
    zeros = zeros[:, ::2] | zeros[:, 1::2] << 4
    attributes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK_SIZE, "accuracy_level": 4}
    weights = {"packed": packed, "scales": scale.flatten(), "zeros": zeros.flatten()}
    return _onnxruntime("MatMulNBits", weights, attributes)


def onnxruntime_bnb4(weight: Tensor) -> Call:
    """MatMulBnb4 on bitsandbytes' bytes: NF4 (quant_type 1), exact."""
    packed, state = bitsandbytes_quantize()(weight)
    rows, columns = weight.shape
    attributes = {"K": columns, "N": rows, "block_size": BLOCK_SIZE, "quant_type": 1}
    weights = {"packed": packed.flatten(), "absmax": state.absmax}
    return _onnxruntime("MatMulBnb4", weights, attributes)


def _onnxruntime(op: str, weights: dict[str, Tensor], attributes: dict[str, Any]) -> Call:
    import onnx
    import onnxruntime

    helper = onnx.helper
    node = helper.make_node(op, ["x", *weights], ["y"], domain="com.microsoft", **attributes)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", attributes["K"]])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", attributes["N"]])
    tensors = [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in weights.items()]
    graph = helper.make_graph([node], op, [x], [y], tensors)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin between calls would take the cores from whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
