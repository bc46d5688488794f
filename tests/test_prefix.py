"""A prefix in one attention: the equation that it stands for, under every mask."""

import copy
import pickle

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaAttention

from peftkern.bottleneck import attention
from peftkern.bottleneck.prefix import Heads, Prefix, Trunk

LOWEST = torch.finfo(torch.float64).min


def attentive(length, number=2, groups=2, width=8, implementation="sdpa"):
    """An attention of grouped queries in float64, for `attend` alone to be called with."""
    config = transformers.LlamaConfig(
        hidden_size=number * groups * width, num_attention_heads=number * groups,
        num_key_value_heads=number, attn_implementation=implementation,
    )  # fmt: skip
    module = LlamaAttention(config, 0).double()
    torch.manual_seed(3)
    attention.put(module, Prefix(Heads(number, width, width), length, module.q_proj.weight))
    return module.eval()


def drawn(module, batch, rows, columns):
    torch.manual_seed(4)
    number, width, _ = module.prefix.heads
    with torch.no_grad():
        for parameter in module.prefix.parameters():
            parameter.normal_()
    query = torch.randn(batch, number * module.num_key_value_groups, rows, width).double()
    key, value = torch.randn(2, batch, number, columns, width).double()
    return query, key, value


def gated(module, query, key, value, hidden):
    """(1 - l) of the attention as it was, and l of one over the prefix alone."""
    groups = module.num_key_value_groups
    keys, values = (part.repeat_interleave(groups, 0) for part in module.prefix.made())
    key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * module.scaling
    scores = scores if hidden is None else scores.masked_fill(hidden, LOWEST)
    before = query @ keys.transpose(1, 2) * module.scaling
    masses = [part.logsumexp(-1, keepdim=True) for part in (before, scores)]
    share = (masses[0] - torch.logaddexp(*masses)).exp()
    y = (1 - share) * (scores.softmax(-1) @ value) + share * (before.softmax(-1) @ values)
    return y.transpose(1, 2)


@given(
    length=st.integers(1, 5), rows=st.integers(1, 6), past=st.integers(0, 3),
    groups=st.integers(1, 3), mask=st.sampled_from(["none", "causal", "padded", "wide"]),
    implementation=st.sampled_from(["eager", "sdpa"]),
)  # fmt: skip
def test_a_prefix_is_an_adapter_gated_by_its_share_of_the_mass(
    length, rows, past, groups, mask, implementation
):
    module = attentive(length, groups=groups, implementation=implementation)
    module.is_causal = False
    tensors = drawn(module, 2, rows, rows + past)
    hidden = torch.zeros(2, 1, rows, rows + past, dtype=torch.bool)
    if mask in ("causal", "padded"):
        hidden |= torch.ones(rows, rows + past, dtype=torch.bool).triu(past + 1)
    if mask == "padded":
        hidden[0, :, :, : past + 1] = True  # its first row sees the prefix alone
    if mask == "wide":
        hidden = hidden[..., :1]
    given_mask = ~hidden if implementation == "sdpa" else hidden.double() * LOWEST
    given_mask = None if mask == "none" else given_mask
    y, _ = attention.attend(module, *tensors, given_mask, scaling=module.scaling)
    # transformers' eager attention takes its softmax in float32
    close = 1e-14 if implementation == "sdpa" else 1e-6
    torch.testing.assert_close(y, gated(module, *tensors, hidden), atol=close, rtol=0)


@given(rows=st.integers(1, 6), empty=st.integers(0, 3))
def test_where_sdpa_is_to_be_causal_by_itself_no_query_sees_ahead(rows, empty):
    """`empty` are the columns of a static cache that nothing stands in yet."""
    module = attentive(3)
    tensors = drawn(module, 2, rows, rows + empty)
    hidden = torch.ones(rows, rows + empty, dtype=torch.bool).triu(1)
    if rows == 1:  # one query is the last token, of a cache that is as long as it is full
        hidden[:] = False
    y, _ = attention.attend(module, *tensors, None, scaling=module.scaling)
    torch.testing.assert_close(y, gated(module, *tensors, hidden), atol=1e-14, rtol=0)
    y, _ = attention.attend(module, *tensors, None, scaling=module.scaling, is_causal=False)
    hidden[:] = False
    torch.testing.assert_close(y, gated(module, *tensors, hidden), atol=1e-14, rtol=0)


def test_the_published_figures_come_out():
    module = attentive(1, number=1, groups=1, width=2)
    query = torch.tensor([1.0, 0.0]).double().view(1, 1, 1, 2)
    identity = torch.eye(2).double()[None, None]
    with torch.no_grad():
        module.prefix.keys.zero_()
        module.prefix.values.fill_(3)
    y, _ = attention.attend(module, query, identity, identity, None, scaling=1.0)
    expected = torch.tensor([1.21194156, 0.84776623], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), expected, atol=5e-9, rtol=0)


def test_a_position_bias_has_no_part_for_the_prefix():
    module = attentive(3)
    module.is_causal = False
    query, key, value = drawn(module, 2, 5, 5)
    bias = torch.randn(1, 4, 5, 5).double()
    y, _ = attention.attend(
        module, query, key, value, None, scaling=module.scaling, position_bias=bias
    )
    as_mask, _ = attention.attend(module, query, key, value, bias, scaling=module.scaling)
    assert torch.equal(y, as_mask)


def test_gradients_reach_keys_values_and_what_attends():
    module = attentive(2)
    tensors = [t.requires_grad_() for t in drawn(module, 1, 3, 3)]

    def attended(query, key, value, *_):
        return attention.attend(module, query, key, value, None, scaling=module.scaling)[0]

    assert torch.autograd.gradcheck(attended, (*tensors, *module.prefix.parameters()))


def test_a_prefix_with_a_trunk_is_saved_as_what_the_trunk_makes():
    like = torch.zeros(0, dtype=torch.float64)
    prefix = Prefix(Heads(2, 4, 6), 5, like, Trunk(5, 8, 7, like))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in prefix.parameters():
            parameter.normal_()
    trunk = prefix.trunk
    hidden = torch.tanh(trunk.embedding @ trunk.down.t() + trunk.bias)
    flat, parts = (hidden @ prefix.up.t() + prefix.bias).detach(), prefix.parts()
    for head in range(2):
        keys, values = flat[:, 4 * head : 4 * head + 4], flat[:, 8 + 6 * head : 14 + 6 * head]
        torch.testing.assert_close(parts["keys"][head], keys, atol=1e-14, rtol=0)
        torch.testing.assert_close(parts["values"][head], values, atol=1e-14, rtol=0)
    assert prefix.wanted() == {"keys": ([2, 5, 4], True), "values": ([2, 5, 6], True)}
    saved = Prefix(Heads(2, 4, 6), 5, like)
    with torch.no_grad():
        saved.fill(parts)
    assert all(map(torch.equal, saved.made(), prefix.made()))


def test_copies_and_pickles_keep_the_config_of_their_own_model():
    module = attentive(2)
    tensors = drawn(module, 1, 3, 3)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.config.own is not module.config.own and twin.config.kind is LlamaAttention
        results = [attention.attend(m, *tensors, None)[0] for m in (module, twin)]
        assert torch.equal(*results)


def test_a_config_reads_and_writes_that_of_the_model():
    module = attentive(2)
    config = module.config.own
    config.rope_theta, module.config.use_cache = 7.0, False
    assert module.config.rope_theta == 7.0 and config.use_cache is False
    assert module.config._attn_implementation == attention.NAME
    assert config._attn_implementation == "sdpa"
    with pytest.raises(AttributeError, match="nothing"):
        module.config.nothing  # noqa: B018


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_takes_other_masks_is_refused(implementation):
    module = attentive(2)
    module.config.own._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f"must be eager or sdpa .*got '{implementation}'"):
        attention.attend(module, *drawn(module, 1, 3, 3), None)


@pytest.mark.parametrize("name", ["cache", "indices"])
def test_pages_and_indices_of_keys_are_refused(name):
    module = attentive(2)
    with pytest.raises(ValueError, match=f"{name} must be None"):
        attention.attend(module, *drawn(module, 1, 3, 3), None, **{name: object()})
