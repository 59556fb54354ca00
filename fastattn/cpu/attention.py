"""Launches the attention kernels of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import MAX_HEAD_DIM, TYPE_CODES, core, missing


def unsupported(call: Any) -> str | None:
    """Why these kernels refuse a call, or None."""
    if core is None:
        return missing
    q, v = call[0], call[2]
    if q.dtype not in TYPE_CODES:
        return f"has no kernel for {q.dtype}"
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] > MAX_HEAD_DIM:
        return f"head dims go to {MAX_HEAD_DIM}, got D {q.shape[3]} and Dv {v.shape[3]}"
    return None


def attention_fwd(
    call: Any, need_lse: bool = True, for_backward: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [B, Sq, H, Dv] in q's type and, where they are needed, lse and lse_rest [B, H, Sq]."""
    q = call[0]
    batch, seqlen_q, nheads, _ = q.shape
    out = q.new_empty(batch, seqlen_q, nheads, call[2].shape[3])
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32) if need_lse else None
    lse_rest = torch.empty_like(lse) if lse is not None and for_backward else None
    core.attention_fwd(call, out, lse, lse_rest, torch.get_num_threads())
    return out, lse, lse_rest


def attention_bwd(
    dout: Tensor,
    dlse: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    call: Any,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias and dsinks; the last two are empty where they are not asked for."""
    q, k, v, _, bias, _, sinks = call[:7]
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    dlse = dlse.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype) for x in (q, k, v))
    dq_sum = dq.zero_() if q.dtype is torch.float32 else torch.zeros(q.shape, dtype=torch.float32)
    delta = torch.empty_like(lse)
    dbias = torch.zeros(bias.shape, dtype=torch.float32) if need_dbias else torch.empty(0)
    dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=torch.float32)
    gradients = (dout, dlse, dq, dk, dv, dbias if need_dbias else None, dsinks, delta, dq_sum)
    core.attention_bwd(call, out, lse, lse_rest, gradients, torch.get_num_threads())
    if need_dbias:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias, torch.empty(0) if dsinks is None else dsinks.to(sinks.dtype)
