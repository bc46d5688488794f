"""What papers and their programs say of themselves, held against ours.

Row by row of the literature that peftkern covers: parameter counts as published, and functions as
published, or the reason where ours is another. Weights are random, of the published shapes.
"""

import pytest
import torch
import transformers
from prefixed import ast, drawn, llama, made, vit
from torch import nn
from torch.nn import functional

import peftkern
from peftkern import BottleneckConfig, MamConfig, PrefixConfig
from peftkern.bottleneck import BottleneckAdapter, ConformerAdapter
from peftkern.bottleneck.prefix import Prefix


def disturb(model, seed=2):
    """As after training: no adapter is zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peftkern.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def layers(model, kind):
    return {name: m for name, m in model.named_modules() if isinstance(m, kind)}


# Row 3: Cappellazzo et al., Parameter-Efficient Transfer Learning of Audio Spectrogram
# Transformers (2023).


def test_row_3_the_conformer_adapter_has_252288_parameters_0_29_percent_of_ast():
    """At rate 96 with a kernel of 31: 21,024 in each of 12 layers."""
    model = transformers.ASTModel(transformers.ASTConfig())
    backbone = sum(p.numel() for p in model.parameters())
    config = BottleneckConfig(rate=96, kind="conformer", kernel=31, place="ffn", mode="parallel")
    peftkern.adapt(model, config)
    count = sum(p.numel() for p in peftkern.trainable_parameters(model))
    assert count == 12 * 21_024 == 252_288
    assert round(100 * count / backbone, 2) == 0.29


class Conformer(nn.Module):
    """The program's adapter as it computes; `prenorm` as it was meant."""

    def __init__(self, width, r, kernel, prenorm):
        super().__init__()
        self.norm = nn.LayerNorm(width) if prenorm else nn.Identity()
        self.first = nn.Conv1d(width, 2 * r, 1)
        self.depthwise = nn.Conv1d(r, r, kernel, padding=kernel // 2, groups=r)
        self.batch_norm = nn.BatchNorm1d(r)
        self.last = nn.Conv1d(r, width, 1)

    def forward(self, x):
        hidden = functional.glu(self.first(self.norm(x).transpose(1, 2)), 1)
        hidden = functional.silu(self.batch_norm(self.depthwise(hidden)))
        return self.last(hidden).transpose(1, 2)

    def take(self, adapter):
        pairs = [
            (self.first.weight, adapter.down[..., None]), (self.first.bias, adapter.bias_down),
            (self.depthwise.weight, adapter.taps), (self.depthwise.bias, adapter.bias_taps),
            (self.last.weight, adapter.up[..., None]), (self.last.bias, adapter.bias_up),
        ]  # fmt: skip
        with torch.no_grad():
            for ours, theirs in pairs:
                ours.copy_(theirs)
        self.batch_norm.load_state_dict(adapter.batch_norm.state_dict())
        if adapter.norm is not None:
            self.norm.load_state_dict(adapter.norm.state_dict())


@pytest.mark.parametrize("prenorm", [False, True])
def test_row_3_the_conformer_adapter_is_its_plain_twin_in_training_and_after(prenorm):
    model, inputs = made(ast)
    config = BottleneckConfig(r=4, kind="conformer", kernel=5, prenorm=prenorm)
    disturb(peftkern.adapt(model, config))
    adapter = next(iter(layers(model, ConformerAdapter).values()))
    twin = Conformer(32, 4, 5, prenorm)
    x, y = drawn(3, 11, 32), drawn(3, 11, 32, seed=2)
    for training in (True, True, False):  # twice: the running statistics move alike
        twin.take(adapter)
        twin.train(training), adapter.train(training)
        torch.testing.assert_close(adapter.add(x, y), y + twin(x), atol=1e-5, rtol=1e-5)
        state, theirs = adapter.batch_norm.state_dict(), twin.batch_norm.state_dict()
        for name in state:
            torch.testing.assert_close(state[name], theirs[name])


def test_row_3_a_rate_above_the_width_leaves_no_channel():
    with pytest.raises(ValueError, match="rate"):
        peftkern.adapt(made(ast)[0], BottleneckConfig(rate=96, kind="conformer"))


# Row 8: He et al., Towards a Unified View of Parameter-Efficient Transfer Learning (2022). That a
# prefix is a gated adapter, tests/test_prefix.py shows.


def test_row_8_mam_is_the_union_of_its_two_configs_in_any_order():
    options = dict(r=4, activation="relu", mode="parallel", place="ffn", scale=4.0)
    prefix, adapter = PrefixConfig(3), BottleneckConfig(**options)
    models = [
        peftkern.adapt(made(llama)[0], configs)
        for configs in (MamConfig(3, 4), (prefix, adapter), (adapter, prefix))
    ]
    disturb(models[0])
    for model in models[1:]:  # the order decides only what is drawn first
        model.load_state_dict(models[0].state_dict())
    plain, inputs = made(llama)
    logits = [model(**inputs).logits for model in models]
    for model in models:
        assert len(layers(model, Prefix)) == len(layers(model, BottleneckAdapter)) == 2
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], plain(**inputs).logits, atol=1e-3)


def test_row_8_mam_trains_the_published_shares():
    """6.7 % of BART-large with 30 and 512; 0.5 % of RoBERTa-base with 16 and 16."""
    large = transformers.BartConfig()
    base = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
    )
    for build, config, percent in (
        (lambda: transformers.BartForConditionalGeneration(large), MamConfig(30, 512), 6.7),
        (lambda: transformers.RobertaModel(base), MamConfig(16, 16, 2.0), 0.5),
    ):
        with torch.device("meta"):
            model = build()
        whole = sum(p.numel() for p in model.parameters())
        peftkern.adapt(model, config)
        count = sum(p.numel() for p in peftkern.trainable_parameters(model))
        assert round(100 * count / whole, 1) == percent


# Row 13: Mehta et al., Exploring Adapter Design Tradeoffs for Low Resource Music Generation (2025).


class Published(nn.Module):
    """Their conv bottleneck, which begins with the weight of the last convolution at 0."""

    def __init__(self, channels, r, kernel):
        super().__init__()
        self.down = nn.Conv2d(channels, r, kernel, padding=kernel // 2)
        self.up = nn.Conv2d(r, channels, 1)
        self.norm = nn.LayerNorm(channels)
        nn.init.zeros_(self.up.weight)

    def branch(self, x):
        y = self.up(functional.gelu(self.down(x)))
        return self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Net(nn.Module):
    """A net whose middle may get adapters."""

    def __init__(self, channels=16):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.middle(self.stem(x))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


def convolutional(**options):
    fixed = dict(rate=8, kind="conv", activation="gelu", mode="sequential")
    return BottleneckConfig(**fixed, target_modules=["middle"], **options)


@pytest.mark.parametrize("kernel", [1, 3])
def test_row_13_ours_starts_as_the_identity_where_the_published_one_does_not(kernel):
    x = drawn(2, 3, 9, 8)
    model, plain = net(), net()
    peftkern.adapt(model, convolutional(kernel=kernel, norm="in"))
    assert torch.equal(model(x), plain(x))
    torch.manual_seed(0)
    theirs = Published(16, 2, kernel)
    start = theirs.branch(plain(x))
    # The reason: `up` gives its bias alone, everywhere the same, and the norm behind it makes that
    # a vector of size 1, however small it was.
    assert (start - start[:1, :, :1, :1]).abs().max() < 1e-6
    assert 0.98 < start.square().mean().sqrt() < 1.001
    nn.init.zeros_(theirs.up.bias)
    assert not theirs.branch(plain(x)).any()
    nn.init.constant_(theirs.up.bias[:1], 1e-2)
    assert theirs.branch(plain(x)).square().mean().sqrt() > 0.5


def test_row_13_the_adapter_of_waveforms_has_2080032_parameters():
    """The "2 M" of MusicGen: 32,000 samples to 32 and back."""
    model = nn.Sequential(nn.Linear(32_000, 32_000, bias=False, device="meta"))
    config = BottleneckConfig(
        r=32, activation="gelu", mode="sequential", dropout=0.1, target_modules=["0"]
    )
    peftkern.adapt(model, config)
    assert sum(p.numel() for p in peftkern.trainable_parameters(model)) == 2_080_032


@pytest.mark.parametrize("norm", [None, "in"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_row_13_a_conv_bottleneck_is_conv2d_in_either_memory_format(kernel, layout, norm):
    model = net().to(memory_format=layout)
    disturb(peftkern.adapt(model, convolutional(kernel=kernel, norm=norm)))
    (block,) = model.middle.adapter.blocks
    x = drawn(2, 3, 9, 8).contiguous(memory_format=layout)
    y = net()(x)
    seen = y
    if norm:
        weight, bias = block.norm.weight, block.norm.bias
        seen = functional.layer_norm(y.permute(0, 2, 3, 1), (16,), weight, bias).permute(0, 3, 1, 2)
    hidden = functional.conv2d(seen, block.down, block.bias_down, padding=kernel // 2)
    expected = y + functional.conv2d(
        functional.gelu(hidden), block.up[..., None, None], block.bias_up
    )
    result = model(x)
    torch.testing.assert_close(result, expected)
    assert result.is_contiguous(memory_format=layout)
    count = 16 * 2 * kernel**2 + 2 + 2 * 16 + 16 + (2 * 16 if norm else 0)
    assert sum(p.numel() for p in peftkern.trainable_parameters(model)) == count


def test_row_13_a_stack_of_n_is_n_calls():
    model, x = net(), drawn(2, 3, 9, 8)
    disturb(peftkern.adapt(model, convolutional(kernel=3, repeat=3)))
    y = net()(x)
    assert len(model.middle.adapter.blocks) == 3
    for block in model.middle.adapter.blocks:
        y = block(y, y, 1.0)
    torch.testing.assert_close(model(x), y)


# Row 17: Gao et al., A Unified Continual Learning Framework with General Parameter-Efficient Tuning
# (LAE, 2023): its adapter.


def test_row_17_the_adapter_of_lae_stands_beside_the_attention_of_the_first_five_blocks():
    """It reads what the attention reads, the norm of the stream, and its scale starts at 1."""
    model, inputs = made(vit, num_hidden_layers=7)
    config = BottleneckConfig(
        r=5, activation="gelu", mode="parallel", scale=1.0, train_scale=True,
        target_modules=r".*layers\.[0-4]\.attention",
    )  # fmt: skip
    read, given, plain = {}, {}, {}
    blocks = model.vit.layers
    for i, block in enumerate(blocks):
        block.layernorm_before.register_forward_hook(lambda m, a, y, i=i: read.update({i: y}))
        block.attention.register_forward_hook(lambda m, a, y, i=i: given.update({i: y[0]}))
        block.attention.o_proj.register_forward_hook(lambda m, a, y, i=i: plain.update({i: y}))
    peftkern.adapt(model, config)
    adapters = layers(model, BottleneckAdapter)
    assert list(adapters) == [f"vit.layers.{i}.attention.adapter" for i in range(5)]
    assert all(adapter.scale.item() == 1 for adapter in adapters.values())
    count = 2 * 32 * 5 + 5 + 32 + 1
    assert sum(p.numel() for p in peftkern.trainable_parameters(model)) == 5 * count
    disturb(model)(**inputs)
    for i, adapter in enumerate(adapters.values()):
        hidden = functional.gelu(functional.linear(read[i], adapter.down, adapter.bias_down))
        branch = adapter.scale * functional.linear(hidden, adapter.up, adapter.bias_up)
        torch.testing.assert_close(given[i], plain[i] + branch, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(given[i], plain[i], atol=1e-3)
    assert all(torch.equal(given[i], plain[i]) for i in (5, 6))


# Row 19: Liu et al., Polyhistor: Parameter-Efficient Multi-Task Adaptation for Dense Vision Tasks
# (2022): what its hypernetworks stand in for.


def test_row_19_dense_adapters_of_swin_t_have_1078272_weights_a_task():
    """One a block, at rate 4: widths 96, 192, 384 and 768 in 2, 2, 6 and 2 blocks."""
    with torch.device("meta"):
        model = transformers.SwinModel(transformers.SwinConfig())
    config = BottleneckConfig(rate=4, place="ffn")
    peftkern.adapt(model, config)
    adapters = layers(model, BottleneckAdapter).values()
    widths = [adapter.up.shape[0] for adapter in adapters]
    assert widths == [96] * 2 + [192] * 2 + [384] * 6 + [768] * 2
    assert sum(a.down.numel() + a.up.numel() for a in adapters) == 1_078_272
