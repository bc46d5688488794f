"""Small transformers of every kind that has sublayers, and where those are."""

from collections import namedtuple

import torch
import transformers
from models import disturb
from torch import nn

import peftkern
from peftkern import BottleneckConfig

CONFIG = BottleneckConfig(r=4, place="both", norm="in", train_scale=True)

SMALL = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2)
TOKENS = dict(vocab_size=20, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SPEECH = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
IMAGE = dict(image_size=8, patch_size=4)
BART = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_start_token_id=1,
)  # fmt: skip

# Of each: model, config, what it is called with, and each block's two places; of one that spans
# several modules first the one that reads.
BERT = [
    ("encoder.layer.0.attention.self", "encoder.layer.0.attention.output.dropout"),
    ("encoder.layer.0.intermediate", "encoder.layer.0.output.dropout"),
]
VIT = ["layers.0.attention", "layers.0.mlp"]
WHISPER = [
    f"{half}.layers.0.{part}" for half in ("encoder", "decoder") for part in ("self_attn", "fc2")
]
KINDS = {
    "vit": ("ViT", SMALL | IMAGE, "image", VIT),
    "ast": ("AST", SMALL | dict(max_length=32, num_mel_bins=16), "spectrogram", VIT),
    "clip": (
        "CLIPVision", SMALL | IMAGE, "image",
        ["encoder.layers.0.self_attn", "encoder.layers.0.mlp"],
    ),
    "bert": ("Bert", SMALL | TOKENS, "tokens", BERT),
    "roberta": ("Roberta", SMALL | TOKENS, "tokens", BERT),
    "distilbert": (
        "DistilBert", dict(dim=16, hidden_dim=24, n_heads=2, vocab_size=20), "tokens",
        ["transformer.layer.0.attention", "transformer.layer.0.ffn"],
    ),
    "gpt2": ("GPT2", dict(n_embd=16, n_head=2) | TOKENS, "tokens", ["h.0.attn", "h.0.mlp"]),
    "llama": ("Llama", SMALL | TOKENS, "tokens", ["layers.0.self_attn", "layers.0.mlp"]),
    "mixtral": (
        "Mixtral", SMALL | TOKENS | dict(num_local_experts=2, num_key_value_heads=2), "tokens",
        ["layers.0.self_attn", "layers.0.mlp"],
    ),
    "bloom": (
        "Bloom", dict(hidden_size=16, n_head=2) | TOKENS, "tokens",
        [("h.0.self_attention", "h.0.self_attention.dense"), ("h.0.mlp", "h.0.mlp.dense_4h_to_h")],
    ),
    "opt": (
        "OPT",
        TOKENS | dict(hidden_size=16, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16),
        "tokens", ["decoder.layers.0.self_attn", ("decoder.layers.0.fc1", "decoder.layers.0.fc2")],
    ),
    "whisper": (
        "Whisper", BART | TOKENS | dict(max_source_positions=20), "speech",
        [n if n.endswith("attn") else (n.replace("fc2", "fc1"), n) for n in WHISPER],
    ),
    "wav2vec2": (
        "Wav2Vec2", SMALL | SPEECH, "wave",
        ["encoder.layers.0.attention", "encoder.layers.0.feed_forward"],
    ),
    "t5": (
        "T5", dict(d_model=16, d_ff=24, num_heads=2, d_kv=8, vocab_size=20), "pair",
        [
            "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense",
            "decoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.2.DenseReluDense",
        ],
    ),
}  # fmt: skip
FAMILIES = list(KINDS)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # one has each its own name


def build(family, layers=1):
    """The model in eval mode, what calls it, and the names of what adapters add to."""
    name, options, inputs, places = KINDS[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    known = config().to_dict().keys() | config.attribute_map.keys()
    if "encoder_layers" not in options:
        field = next(f for f in LAYERS if f in known and f not in config.attribute_map)
        options = options | {field: layers}
    model = getattr(transformers, f"{name}Model")(config(**options)).eval()
    given = _inputs(inputs)

    def call(model):
        return model(**given).last_hidden_state

    return model, call, [place[1] if isinstance(place, tuple) else place for place in places]


def adapted(family="llama", config=CONFIG, **options):
    """As after training, and what calls it."""
    model, call, _ = build(family, **options)
    return disturb(peftkern.adapt(model, config)), call


def _inputs(kind):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 20, (2, 6), generator=generator)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "tokens": lambda: dict(input_ids=tokens),
        "pair": lambda: dict(input_ids=tokens, decoder_input_ids=tokens),
        "image": lambda: dict(pixel_values=noise(2, 3, 8, 8)),
        "spectrogram": lambda: dict(input_values=noise(2, 32, 16)),
        "wave": lambda: dict(input_values=noise(2, 800)),
        "speech": lambda: dict(input_features=noise(2, 80, 40), decoder_input_ids=tokens),
    }[kind]()


Seen = namedtuple("Seen", "x plain y")


def reads(model, name, call):
    """What the module that reads is given, what the adapted one would give alone, and gives."""
    (family,) = [f for f in KINDS if _places(f).keys() >= {name} and _is(model, f)]
    reader, module = model.get_submodule(_places(family)[name]), model.get_submodule(name)
    seen, add = {}, module.adapter.add

    def before(_, args, kwargs):
        seen["x"] = next(iter((*args, *(v for k, v in kwargs.items() if k == "hidden_states"))))

    def adding(x, y):
        seen["plain"], seen["y"] = y.clone(), add(x, y)
        return seen["y"]

    handle = reader.register_forward_pre_hook(before, with_kwargs=True)
    module.adapter.add = adding
    with torch.no_grad():
        call(model)
    handle.remove()
    del module.adapter.add
    return Seen(seen["x"], seen["plain"], seen["y"])


def _places(family):
    return {module: reader for reader, module in map(_pair, KINDS[family][3])}


def _pair(place):
    return place if isinstance(place, tuple) else (place, place)


def _is(model, family):
    return type(model).__name__ == f"{KINDS[family][0]}Model"


def quantise(model):
    """Every linear but heads in NF4 of bitsandbytes, as transformers does it on loading."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                options = dict(compute_dtype=torch.float32, quant_type="nf4")
                has_bias = child.bias is not None
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, has_bias, **options)
                weight = child.weight.detach().clone()
                new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                new.bias = child.bias
                setattr(parent, name, new.to("cpu"))


class Plain(nn.Module):
    """No transformer: names that no table has."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(8, 8), nn.ReLU()
        self.second, self.norm = nn.Linear(8, 5), nn.LayerNorm(5)
        self.rest = nn.ModuleList([nn.Linear(5, 2)])

    def forward(self, x):
        return self.rest[0](self.norm(self.second(self.act(self.first(x)))))
