"""Launches the attention kernels of csrc/cpu on packed sequences."""

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
    if q.shape[2] > MAX_HEAD_DIM or v.shape[2] > MAX_HEAD_DIM:
        return f"head dims go to {MAX_HEAD_DIM}, got D {q.shape[2]} and Dv {v.shape[2]}"
    return None


def attention_varlen_fwd(
    call: Any, need_lse: bool = True, for_backward: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [Tq, H, Dv] in q's type and, where they are needed, lse and lse_rest [H, Tq]."""
    q = call[0]
    total_q, nheads, _ = q.shape
    out = torch.empty(total_q, nheads, call[2].shape[2], dtype=q.dtype)
    lse = torch.empty(nheads, total_q, dtype=torch.float32) if need_lse else None
    lse_rest = torch.empty_like(lse) if lse is not None and for_backward else None
    core.attention_varlen_fwd(call, out, lse, lse_rest, torch.get_num_threads())
    return out, lse, lse_rest


def attention_varlen_bwd(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, lse_rest: Tensor, call: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dsinks, which is empty where there are no sinks."""
    q, k, v = call[:3]
    sinks = call[6]
    dout = dout if dout.stride(2) == 1 else dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype) for x in (q, k, v))
    dq_sum = dq.zero_() if q.dtype is torch.float32 else torch.zeros(q.shape, dtype=torch.float32)
    dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=torch.float32)
    gradients = (dout, dlse.contiguous(), dq, dk, dv, None, dsinks, torch.empty_like(lse), dq_sum)
    core.attention_varlen_bwd(call, out, lse, lse_rest, gradients, torch.get_num_threads())
    return dq, dk, dv, torch.empty(0) if dsinks is None else dsinks.to(sinks.dtype)
