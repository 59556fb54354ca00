"""Packed sequences for pytest-benchmark: `pytest benchmarks/attention_varlen.py`.

The best known alternatives on a CPU are to pad the batch, and to loop over its sequences.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from fastattn import attention_varlen
from fastattn.testing.check import check_varlen, refusal
from fastattn.testing.inputs import packed_qkv

# Lengths of real batches: chat turns, documents packed for training, a step of an engine that mixes
# prefill and decode.
CASES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "chat": ((37, 410, 120, 15, 260, 88, 512, 5),) * 2,
    "documents": ((700, 1300, 96, 1000, 1000),) * 2,
    "mixed": ((1,) * 15 + (512,), (900, 130, 2048, 64, 777) * 3 + (512,)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def padded(q: Tensor, k: Tensor, v: Tensor, seqlens_q: Sequence[int], seqlens_k: Sequence[int]) -> Tensor:
    """SDPA on the padded batch, with a mask: [B, H, longest, D]."""
    lengths = (list(seqlens_q), list(seqlens_k), list(seqlens_k))
    dense = (
        pad_sequence(list(x.split(n)), batch_first=True).transpose(1, 2)
        for x, n in zip((q, k, v), lengths, strict=True)
    )
    rows, columns = torch.arange(max(seqlens_q)), torch.arange(max(seqlens_k))
    ends, offsets = torch.tensor(seqlens_k), torch.tensor(seqlens_k) - torch.tensor(seqlens_q)
    mask = (columns < ends[:, None, None]) & (columns <= rows[:, None] + offsets[:, None, None])
    return scaled_dot_product_attention(*dense, attn_mask=mask[:, None], enable_gqa=True)


def looped(
    q: Tensor, k: Tensor, v: Tensor, seqlens_q: Sequence[int], seqlens_k: Sequence[int]
) -> list[Tensor]:
    """SDPA on one sequence after the other, with a mask only where causal is not upper-left."""
    outs = []
    lengths = (list(seqlens_q), list(seqlens_k), list(seqlens_k))
    for parts in zip(*(x.split(n) for x, n in zip((q, k, v), lengths, strict=True)), strict=True):
        square = parts[0].shape[0] == parts[1].shape[0]
        heads_first = (x.transpose(0, 1)[None] for x in parts)
        outs.append(scaled_dot_product_attention(*heads_first, is_causal=square, enable_gqa=True))
    return outs


@lru_cache(maxsize=1)
def checked(case: str, dtype: str) -> tuple[Tensor, ...]:
    """The inputs of a case, on which ours keeps the error rule."""
    tensors = packed_qkv(*CASES[case], 16, 4, 64, dtype=DTYPES[dtype])
    if reason := refusal("cpu", *tensors, op=attention_varlen, causal=True):
        pytest.skip(reason)
    check_varlen(*tensors, backend="cpu", gradients=False, causal=True)
    return tensors


@pytest.mark.parametrize("peer", ["fastattn", "padded", "looped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention_varlen(benchmark: Any, case: str, dtype: str, peer: str) -> None:
    tensors = checked(case, dtype)
    peers: dict[str, Callable[[], Any]] = {
        "fastattn": partial(attention_varlen, *tensors, causal=True),
        "padded": partial(padded, *tensors[:3], *CASES[case]),
        "looped": partial(looped, *tensors[:3], *CASES[case]),
    }
    benchmark(peers[peer])
