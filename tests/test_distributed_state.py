"""Can torch.distributed.checkpoint get and set all of a model, scales of a quantised base too?"""

import distributed
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import BASES, adapted, another, in_processes
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)

import peftkern

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo")

STARTS = {"plain": {}, "DoRA": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


@pytest.mark.parametrize("base", [None, *peftkern.qlora.formats])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("nested", [False, True])
def test_a_model_in_one_process(base, start, nested):
    config = peftkern.LoraConfig(r=3, base=base, nested=nested, **STARTS[start])
    model, other = adapted(config=config), another(config)
    state = get_model_state_dict(model)
    assert same(state, model.state_dict())
    assert not same(state, other.state_dict())
    set_model_state_dict(other, state)
    assert same(other.state_dict(), model.state_dict())
    tokens = distributed.batches()[0, 0]
    assert torch.equal(other(tokens), model(tokens))


def test_a_merged_model_is_a_plain_one():
    model = peftkern.merge(adapted().eval(), dtype=torch.float32)
    assert same(get_model_state_dict(model), model.state_dict())


def test_optimisers_go_along():
    model = adapted()
    optimizer = torch.optim.AdamW(peftkern.trainable_parameters(model))
    model(distributed.batches()[0, 0]).sum().backward()
    optimizer.step()
    state, moments = get_state_dict(model, optimizer)
    assert same(state, model.state_dict())
    assert "layers.0.q_proj.lora_A" in moments["state"]
    trained = StateDictOptions(ignore_frozen_params=True)
    assert "layers.0.q_proj.weight" not in get_model_state_dict(model, options=trained)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    return folder, in_processes(2, distributed.state_by_torch, folder / "run", folder)


@pytest.mark.parametrize("way", BASES)
def test_shards_and_whole_states_are_got_and_set_in_processes(way, sharded):
    _, of_processes = sharded
    alone = adapted(config=BASES[way]).state_dict()
    for states in of_processes:
        assert all(same(state, alone) for state in states[way])


@pytest.mark.parametrize("way", BASES)
def test_what_two_processes_have_saved_so_one_loads(way, sharded):
    """On the same base: a checkpoint has room for tensors of the length that it knows, and the text
    beside a 4-bit weight is longer or shorter by the digits of its nested offset.
    """
    folder, _ = sharded
    model = adapted(seed=5, config=BASES[way])
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / way)
    set_model_state_dict(model, state)
    assert same(model.state_dict(), adapted(config=BASES[way]).state_dict())
