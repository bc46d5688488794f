"""The decomposition of CorDA as one product, for the tests of it."""

from peftkern import LoraConfig
from peftkern.qlora import init


def moment(x):
    return x.t() @ x / len(x)


def decomposed(weight, moment, rank, scale=1.0, mode="ipm", metric="corda"):
    config = LoraConfig(r=rank, lora_alpha=rank * scale, init_lora_weights="corda")
    a, b = init.corda(weight, moment, config, mode, metric)
    return scale * (b @ a)
