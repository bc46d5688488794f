"""What the gates launch: each case calls the kernels' launchers as training calls them.

The operands have shapes and dtypes but no memory, so a launcher that read a number from the device
would fail here.
"""

from functools import partial

import torch

from peftkern.kernels import bottleneck, onebit, qlora, qlora_backward, sparse

SIZE, RANK, BLOCK_SIZE, EXPERTS = 4096, 16, 64, 8
FEW, MANY = 48, 4096  # rows: below every crossover of the table, and above


def tensor(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(format, experts=1, size=SIZE):
    """Tensors and layout: nested NF4, plain NF4, int8 or dense bfloat16."""
    lead, shape = [experts] * (experts > 1), (size, size)
    blocks = -(-experts * size**2 // BLOCK_SIZE)
    if format == "dense":
        return [tensor(*lead, *shape, dtype=torch.bfloat16)], [experts, *shape, 0, 0]
    if format == "int8":
        return [tensor(*lead, *shape, dtype=torch.int8), tensor(*lead, size)], [
            experts,
            *shape,
            0,
            8,
        ]
    nested = [tensor(-(-blocks // 256)), tensor(256), tensor()] if format == "nested" else []
    absmax = tensor(blocks, dtype=torch.uint8 if nested else torch.float32)
    packed = tensor(experts * size**2 // 2, 1, dtype=torch.uint8)
    return [packed, absmax, tensor(16), *nested], [experts, *shape, BLOCK_SIZE, 4]


def step(format, dtype=torch.bfloat16, rows=FEW, experts=1, mixed=False, size=SIZE, p=0.1):
    """Forward and backward of one linear: adapters in float32, dropout, everything trains."""
    lead = [experts] * (experts > 1)
    base, layout = weight(format, experts, size)
    shapes = ([size], [RANK, size], [size, RANK])
    bias, lora_a, lora_b = (tensor(*lead, *shape) for shape in shapes)
    groups = [
        tensor(experts + 1, dtype=torch.int64) if lead else None,
        tensor(rows, dtype=torch.int32) if mixed else None,
    ]
    rest = [base, layout, bias, lora_a, lora_b, 2.0, p, tensor(1, dtype=torch.int64), *groups]
    x = tensor(rows, size, dtype=dtype)
    y, down = qlora.linear(x, *rest)
    qlora.linear_bwd(y, x, down, *rest, [True, format == "dense", True, True, True])


def forward(rows):
    """Of a linear without an adapter, in bfloat16 on plain NF4: what the prediction counts on."""
    base, layout = weight("plain")
    x = tensor(rows, SIZE, dtype=torch.bfloat16)
    qlora.linear(x, base, layout, None, None, None, 1.0, 0.0, None, None, None)


def siblings():
    bases = [weight("nested") for _ in range(3)]
    tensors = [t for base, _ in bases for t in base]
    layouts = [n for base, layout in bases for n in (len(base), *layout)]
    lora = [[tensor(RANK, SIZE)] * 3, [tensor(SIZE, RANK)] * 3]
    seeds = [tensor(1, dtype=torch.int64)] * 3
    rest = [tensors, layouts, [None] * 3, *lora, [2.0] * 3, 0.1, seeds]
    x = tensor(FEW, SIZE, dtype=torch.bfloat16)
    found = qlora.siblings(x, *rest)
    qlora.siblings_bwd(found[:3], x, found[3:], *rest, [True, *[False, True, True] * 3])


def dense_experts():
    """The gradient of their weights."""
    grad, x = (tensor(MANY, SIZE, dtype=torch.bfloat16) for _ in range(2))
    (experts,), _ = weight("dense", EXPERTS)
    qlora_backward.grad_weight(grad, x, experts, tensor(EXPERTS + 1, dtype=torch.int64))


def dequantize(format):
    base, layout = weight(format)
    qlora.dequantize(base, layout, tensor(SIZE, SIZE, dtype=torch.bfloat16))


def adapter(
    rows, dtype=torch.bfloat16, size=SIZE, rank=64, norm=False, trains=True, onto_x=True, p=0.1
):
    """Forward and backward of a bottleneck with dropout; its parameters are float32."""
    x = tensor(rows, size, dtype=dtype)
    factors = [tensor(rank, size), tensor(size, rank), tensor(rank), tensor(size), tensor(1)]
    norms = [*[tensor(size) if norm else None] * 2, 1e-5 if norm else None]
    rest = [onto_x, *norms, p, tensor(1, dtype=torch.int64)]
    gelu = 2
    y, hidden = bottleneck.linear(x, *factors, 2.0, gelu, None, *rest)
    needs = [True, *[trains] * 5, *[trains and norm] * 2]
    bottleneck.linear_bwd(y, x, hidden, *factors, 2.0, gelu, *rest, needs)


def latents(bits):
    """Those of 12 adapters, and one that is summed up in parts."""
    weights = [tensor(32, 768), tensor(768, 32)] * 12 + [tensor(100, 768)]
    statistics = onebit.statistics(weights)
    onebit.quantize_bwd(onebit.quantize(weights, statistics, bits), weights, statistics, bits)


def codes(bits):
    weight, statistics = tensor(SIZE, SIZE), tensor(1, 2)
    packed = onebit.encode(weight, statistics, bits)
    onebit.pack(onebit.unpack(packed, bits, SIZE), bits)
    onebit.dequantize(packed, statistics, bits, SIZE, torch.bfloat16)


def packed(rows, bits=1, dtype=torch.bfloat16, size=SIZE):
    laid_out = onebit.lay_out(tensor(size, -(-size * bits // 8), dtype=torch.uint8), bits, size)
    x = tensor(rows, size, dtype=dtype)
    onebit.linear(x, laid_out, tensor(1, 2), bits, size, tensor(size))


def sparse_operand(kind, size=SIZE):
    """A pattern of half the entries that its kind is the smaller for."""
    words, quads = -(-size // 32), -(-size // 128)
    nnz = size**2 // (25 if kind == "csr" else 6)
    if kind == "csr":
        pattern = [tensor(size + 1, dtype=torch.int32), tensor(nnz, dtype=torch.uint16)]
    else:
        pattern = [tensor(size, n, dtype=torch.int32) for n in (words, quads)]
    return pattern, [int(kind == "bitmap"), size, size, nnz]


def sddmm(kind, rows, dtype=torch.bfloat16, size=SIZE):
    x, grad = (tensor(rows, size, dtype=dtype) for _ in range(2))
    pattern, layout = sparse_operand(kind, size)
    sparse.sddmm_(tensor(layout[3]), x, grad, pattern, layout, 1.0)


def convolved(kind, last=True, channels=320):
    """The gradient of a 3 x 3 convolution, of channels that lie last or first."""
    layout = torch.channels_last if last else torch.contiguous_format
    shape = (4, channels, 64, 64)
    x, grad = (tensor(*shape, dtype=torch.bfloat16).to(memory_format=layout) for _ in range(2))
    pattern, _ = sparse_operand(kind)
    shape = [int(kind == "bitmap"), channels, 9 * channels, 10**5]
    sparse.conv2d_sddmm(x, grad, pattern, shape, [3, 3, 1, 1, 1, 1, 1, 1, 1], 1.0)


def adamw(kind):
    """A step of a few tensors in bfloat16; without a kind, of values that go nowhere."""
    operands = [sparse_operand(kind or "csr", size) for size in (SIZE, SIZE // 4, 320)]
    packed = [[tensor(layout[3]) for _, layout in operands] for _ in range(4)]
    weights = [tensor(n, n, dtype=torch.bfloat16) for _, (_, n, _, _) in operands]
    patterns = [
        [t for each, _ in operands for t in each],
        [n for _, each in operands for n in each],
    ]
    sparse.adamw_(
        weights if kind else [], *packed, [], *(patterns if kind else ([], [])),
        7, 1e-3, 0.9, 0.999, 1e-8, 1e-2,
    )  # fmt: skip


def separate(kind):
    """The rest of what a sparse matrix takes part in, and a bitmap's columns."""
    (bits, _), (_, _, _, nnz) = sparse_operand("bitmap")
    sparse.tile_counts(bits)
    sparse.columns(bits, tensor(SIZE + 1, dtype=torch.int32), SIZE, nnz)
    operand = sparse_operand(kind)
    weight = tensor(SIZE, SIZE, dtype=torch.bfloat16)
    values = sparse.gather(weight, *operand)
    sparse.scatter_(weight, values, *operand)
    for rows in (1, MANY):
        x = tensor(rows, SIZE, dtype=torch.bfloat16)
        sparse.matmul_t(sparse.matmul(x, values, *operand, x, 1.0), values, *operand, x, 1.0)


# On every architecture, each kernel in the ways it mostly runs.
CASES = {
    "nested, few rows": lambda: step("nested"),
    "nested, many rows": lambda: step("nested", rows=MANY),
    **{f"plain, {rows} rows": partial(forward, rows) for rows in (32, 64, MANY)},
    "int8, few rows": lambda: step("int8"),
    "siblings": siblings,
    "dense experts": dense_experts,
    "dequantize nested": lambda: dequantize("nested"),
    "dequantize int8": lambda: dequantize("int8"),
    "bottleneck": lambda: adapter(4 * MANY),
    "bottleneck of a wide rank": lambda: adapter(MANY, rank=512, norm=True),
    "latents": lambda: latents(1),
    "codes": lambda: codes(1),
    "packed, few rows": lambda: packed(FEW),
    "packed, many rows": lambda: packed(MANY),
    "sampled by a bitmap": lambda: sddmm("bitmap", MANY),
    "sampled by csr": lambda: sddmm("csr", MANY),
    "sampled of a convolution": lambda: convolved("csr"),
    "packed AdamW": lambda: adamw("csr"),
    "sparse, a bitmap": lambda: separate("bitmap"),
    "sparse, csr": lambda: separate("csr"),
}
# The ways that are left, on one of them.
RARE = "sm90"
RARE_CASES = {
    "plain, float32": lambda: step("plain", torch.float32),
    "experts": lambda: step("dense", rows=MANY, experts=EXPERTS),
    "mixed adapters": lambda: step("nested", experts=EXPERTS, mixed=True),
    "uneven": lambda: step("nested", torch.float16, size=1001),
    "bottleneck, float32": lambda: adapter(4 * MANY, torch.float32),
    "bottleneck with a norm": lambda: adapter(4 * MANY, rank=128, norm=True, trains=False),
    "bottleneck, uneven": lambda: adapter(4 * MANY, torch.float16, 1001, rank=30, trains=False),
    "latents of 4 bits": lambda: latents(4),
    "codes of 4 bits": lambda: codes(4),
    "packed, 2 bits": lambda: packed(FEW, 2),
    "packed, 4 bits": lambda: packed(FEW, 4),
    "packed, float32": lambda: packed(FEW, dtype=torch.float32),
    "packed, uneven": lambda: packed(FEW, size=1001),
    "packed AdamW, a bitmap": lambda: adamw("bitmap"),
    "packed AdamW, no weights": lambda: adamw(None),
    "sampled, float32": lambda: sddmm("bitmap", MANY, torch.float32),
    "sampled, uneven": lambda: sddmm("csr", FEW, size=1001),
}


# Steps that are to share their compiled kernels: as many tiles of rows, and dropout.
SAME = {
    f"{rows} rows, p {p}": lambda rows=rows, p=p: (
        step("nested", rows=rows, p=p),
        adapter(rows, norm=True, p=p),
        adapter(4 * rows, p=p),
    )
    for rows, p in [(MANY, 0.1), (MANY - 1, 0.2), (MANY - 63, 0.1), (MANY, 2**-32), (MANY, 2**-28)]
}
