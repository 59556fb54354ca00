"""Random inputs, made in one place so that tests and benchmarks cannot diverge."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def qkv(
    batch: int,
    nheads: int,
    nheads_k: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    requires_grad: bool = False,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q [B, Sq, H, D], k [B, Sk, Hk, D] and v [B, Sk, Hk, Dv].

    `transposed` lays them out as [B, H, S, D] in memory, the way torch's SDPA users have them.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(length: int, heads: int, dim: int) -> Tensor:
        shape = (batch, heads, length, dim) if transposed else (batch, length, heads, dim)
        x = torch.randn(shape, generator=generator, device=device).to(dtype)
        x = x.transpose(1, 2) if transposed else x
        return x.requires_grad_(requires_grad)

    return (
        normal(seqlen_q, nheads, head_dim),
        normal(seqlen_k, nheads_k, head_dim),
        normal(seqlen_k, nheads_k, head_dim if head_dim_v is None else head_dim_v),
    )


def packed_qkv(
    seqlens_q: Sequence[int],
    seqlens_k: Sequence[int],
    nheads: int,
    nheads_k: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normal q [Tq, H, D], k [Tk, Hk, D] and v [Tk, Hk, Dv], then cu_seqlens_q and cu_seqlens_k."""
    totals = sum(seqlens_q), sum(seqlens_k)
    q, k, v = qkv(1, nheads, nheads_k, *totals, head_dim, head_dim_v, dtype=dtype, seed=seed)
    q, k, v = (x[0].requires_grad_(requires_grad) for x in (q, k, v))
    return q, k, v, starts(seqlens_q), starts(seqlens_k)


def starts(seqlens: Sequence[int]) -> Tensor:
    """Where each of these sequences starts, and the total: int32 [B + 1]."""
    return torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
