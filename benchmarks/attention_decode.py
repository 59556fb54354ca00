"""Decoding from a cache for pytest-benchmark: `pytest benchmarks/attention_decode.py`.

The best known alternative on a CPU is SDPA on each sequence's part of a dense cache, after an append in
place; from pages it must gather first.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn import attention_decode
from fastattn.testing.check import refusal
from fastattn.testing.check_decode import check_decode, decode_inputs

# Keys of each sequence, and queries: a chat alone, a served batch, one that verifies drafted tokens.
CASES = {
    "one": ([4000], 1),
    "batch": ([100, 900, 2500, 64, 1700, 333, 2000, 1200], 1),
    "verify": ([1500, 3000], 5),
}
CACHES: dict[str, dict[str, Any]] = {
    "dense": {},
    "paged": {"page_size": 16},
    "int8": {"page_size": 16, "cache_dtype": torch.int8},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> list[Tensor]:
    """One sequence after the other; without causal, so that no mask is in the way."""
    outs = []
    for b, length in enumerate(cache_seqlens.tolist()):
        keys = []
        for cache, scale, new in ((k_cache, k_scale, k[b]), (v_cache, v_scale, v[b])):
            if block_table is None:
                cache[b, length : length + len(new)] = new
                keys.append(cache[b, : length + len(new)])
                continue
            pages = block_table[b, : -(-length // cache.shape[1])]
            x = cache[pages].flatten(0, 1)[:length]
            if scale is not None:
                x = (x * scale[pages].flatten(0, 1)[:length, :, None]).to(q.dtype)
            keys.append(torch.cat([x, new]))
        heads_first = (x.transpose(0, 1)[None] for x in (q[b], *keys))
        outs.append(scaled_dot_product_attention(*heads_first, enable_gqa=True))
    return outs


@lru_cache(maxsize=1)
def checked(case: str, cache: str, dtype: str) -> dict[str, Any]:
    """The arguments of a case, on which ours keeps the error rule."""
    seqlens, seqlen_q = CASES[case]
    call = decode_inputs(seqlens, 32, 8, seqlen_q, 128, new=seqlen_q, dtype=DTYPES[dtype], **CACHES[cache])
    if reason := refusal("cpu", op=attention_decode, **call):
        pytest.skip(reason)
    check_decode(**call, backend="cpu")
    return call


@pytest.mark.parametrize("peer", ["fastattn", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", CASES)
def test_attention_decode(benchmark: Any, case: str, cache: str, dtype: str, peer: str) -> None:
    peers: dict[str, Callable[..., Any]] = {"fastattn": attention_decode, "sdpa": sdpa}
    benchmark(partial(peers[peer], **checked(case, cache, dtype)))
