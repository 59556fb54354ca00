"""Launches the attention kernels of csrc/cpu on a KV cache."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import MAX_HEAD_DIM, TYPE_CODES, core, missing


def unsupported(call: Any) -> str | None:
    """Why these kernels refuse a call, or None."""
    if core is None:
        return missing
    q, k_cache, v_cache = call[:3]
    if q.dtype not in TYPE_CODES:
        return f"has no kernel for {q.dtype}"
    if k_cache.dtype not in TYPE_CODES and k_cache.dtype is not torch.int8:
        return f"has no kernel for a cache in {k_cache.dtype}"
    if q.shape[3] > MAX_HEAD_DIM or v_cache.shape[3] > MAX_HEAD_DIM:
        return f"head dims go to {MAX_HEAD_DIM}, got D {q.shape[3]} and Dv {v_cache.shape[3]}"
    return None


def attention_decode(call: Any, need_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Writes the new keys and values into the cache; out [B, Sq, H, Dv] and lse [B, H, Sq]."""
    q = call[0]
    batch, seqlen_q, nheads, _ = q.shape
    out = torch.empty(batch, seqlen_q, nheads, call[2].shape[3], dtype=q.dtype)
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32) if need_lse else None
    core.attention_decode(call, out, lse, torch.get_num_threads())
    return out, lse
