"""How much of the machine a step uses: the work of a token, and the most that could be done."""

import torch

from fastattn.cpu._core import core
from fastattn.models import ModelConfig

_SECONDS = 0.2  # of measuring


def flops_per_token(config: ModelConfig, context: int) -> float:
    """Of forward and backward.

    6 for each weight of a matrix that is multiplied with (an embedding is looked up), and 14 D for each
    pair of query and key that a causal layer has: 4 forward and 2.5 times that backward.
    """
    heads = config.num_heads * config.head_dim
    attention = config.embed_dim * (2 * heads + 2 * config.num_kv_heads * config.head_dim)
    feed_forward = (3 if config.gated else 2) * config.embed_dim * config.hidden_dim
    weights = config.num_layers * (attention + feed_forward) + config.vocab_size * config.embed_dim
    return 6.0 * weights + 14.0 * config.num_layers * heads * (context + 1) / 2


def peak_flops(dtype: str) -> float:
    """FLOP/s of fused multiply-adds on torch's threads; 0 without the core."""
    if core is None:
        return 0.0
    peaks = [
        core.fma_peak(bf16=bf16, threads=torch.get_num_threads(), seconds=_SECONDS)
        for bf16 in ((False, True) if dtype == "bf16" else (False,))
    ]
    return 1e9 * float(max(peaks))
