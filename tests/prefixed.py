"""Small models of transformers, in the shapes of attention that prefixes meet."""

import torch
import transformers as T

COMMON = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LANGUAGE = dict(vocab_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HALVES = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=1,
)  # fmt: skip


def tokens(seed=1, shape=(2, 7)):
    return torch.randint(3, 48, shape, generator=torch.Generator().manual_seed(seed))


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama(**options):
    """Rotated keys, grouped queries."""
    config = COMMON | LANGUAGE | dict(num_key_value_heads=2) | options
    return T.LlamaForCausalLM(T.LlamaConfig(**config)), dict(input_ids=tokens())


def mistral():
    """Like Llama, in a window."""
    config = T.MistralConfig(**COMMON, **LANGUAGE, num_key_value_heads=2, sliding_window=3)
    return T.MistralForCausalLM(config), dict(input_ids=tokens())


def deepseek():
    """Values of another width than keys, which come of a low rank."""
    config = T.DeepseekV3Config(
        **COMMON, **LANGUAGE, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=12, moe_intermediate_size=16,
    )  # fmt: skip
    return T.DeepseekV3ForCausalLM(config), dict(input_ids=tokens())


def gpt2(**options):
    """Queries, keys and values of one transposed weight; learned positions."""
    config = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=48, eos_token_id=2) | options
    return T.GPT2LMHeadModel(T.GPT2Config(**config)), dict(input_ids=tokens())


def neox():
    """One weight for all three, by heads."""
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**COMMON, **LANGUAGE)), dict(input_ids=tokens())


def bert():
    """Sees both ways; padding here."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    model = T.BertForSequenceClassification(T.BertConfig(**COMMON, **LANGUAGE))
    return model, dict(input_ids=tokens(), attention_mask=mask)


def vit(**options):
    config = T.ViTConfig(**COMMON | dict(image_size=32, patch_size=8) | options)
    return T.ViTForImageClassification(config), dict(pixel_values=drawn(2, 3, 32, 32))


def ast(**options):
    config = T.ASTConfig(**COMMON | dict(max_length=64, num_mel_bins=32) | options)
    return T.ASTForAudioClassification(config), dict(input_values=drawn(2, 64, 32))


def wav2vec2():
    config = T.Wav2Vec2Config(
        **COMMON, vocab_size=48, conv_dim=(16, 16), conv_stride=(5, 5), conv_kernel=(5, 5),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return T.Wav2Vec2ForSequenceClassification(config), dict(input_values=drawn(2, 400))


def bart():
    """Encoder, decoder and attention across."""
    model = T.BartForConditionalGeneration(T.BartConfig(**HALVES, vocab_size=48))
    return model, dict(input_ids=tokens(), decoder_input_ids=tokens(2))


def whisper():
    config = T.WhisperConfig(
        **HALVES, **LANGUAGE, num_mel_bins=8, max_source_positions=20, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = T.WhisperForConditionalGeneration(config)
    return model, dict(input_features=drawn(2, 8, 40), decoder_input_ids=tokens())


def t5():
    """A bias of positions beside the mask, and no scale."""
    config = T.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=48)
    return T.T5ForConditionalGeneration(config), dict(
        input_ids=tokens(), decoder_input_ids=tokens(2)
    )


EVERY = [llama, mistral, deepseek, gpt2, neox, bert, vit, ast, wav2vec2, bart, whisper, t5]


def made(make, **options):
    """The model in eval mode, the same at every call, and what to call it with."""
    torch.manual_seed(0)
    model, inputs = make(**options)
    return model.eval(), inputs
