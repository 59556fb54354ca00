"""Launches the attention kernels of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import TYPE_CODES, core, missing
from fastattn.dropout import threshold

_MAX_HEAD_DIM = 512


def unsupported(call: Any) -> str | None:
    """Why these kernels refuse a call, or None."""
    if core is None:
        return missing
    q, v = call[0], call[2]
    if q.dtype not in TYPE_CODES:
        return f"has no kernel for {q.dtype}"
    if q.shape[3] > _MAX_HEAD_DIM or v.shape[3] > _MAX_HEAD_DIM:
        return f"head dims go to {_MAX_HEAD_DIM}, got D {q.shape[3]} and Dv {v.shape[3]}"
    return None


def attention_fwd(
    call: Any, need_lse: bool = True, for_backward: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [B, Sq, H, Dv] in q's type and, where they are needed, lse and lse_rest [B, H, Sq]."""
    q = call[0]
    batch, seqlen_q, nheads, _ = q.shape
    out = torch.empty(batch, seqlen_q, nheads, call[2].shape[3], dtype=q.dtype)
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32) if need_lse else None
    lse_rest = torch.empty_like(lse) if lse is not None and for_backward else None
    core.attention_fwd(*_arguments(call, out, lse, lse_rest), torch.get_num_threads())
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
    dsinks = torch.zeros(sinks.shape, dtype=torch.float32) if sinks is not None else torch.empty(0)
    gradients = (
        _strided(dout),
        dlse.data_ptr(),
        _strided(dq),
        _strided(dk),
        _strided(dv),
        _broadcast(dbias) if need_dbias else None,
        dsinks.data_ptr() if sinks is not None else None,
        delta.data_ptr(),
        _strided(dq_sum),
    )
    core.attention_bwd(*_arguments(call, out, lse, lse_rest), gradients, torch.get_num_threads())
    if need_dbias:
        dbias = dbias.to(bias.dtype)
    if sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def _arguments(call: Any, out: Tensor, lse: Tensor | None, lse_rest: Tensor | None) -> tuple[Any, ...]:
    """sizes, types, tensors and options, in the order of csrc/attention.cpp."""
    q, k, v, mask, bias, alibi_slopes, sinks, seed, scale, left, right, softcap, dropout_p = call
    batch, seqlen_q, nheads, head_dim = q.shape
    _, seqlen_k, nheads_k, head_dim_v = v.shape
    code = TYPE_CODES[q.dtype]
    return (
        (batch, nheads, nheads_k, seqlen_q, seqlen_k, head_dim, head_dim_v),
        (
            code,
            code if bias is None else TYPE_CODES[bias.dtype],
            code if sinks is None else TYPE_CODES[sinks.dtype],
        ),
        (
            (q.data_ptr(), q.stride()),
            (k.data_ptr(), k.stride()),
            (v.data_ptr(), v.stride()),
            (out.data_ptr(), out.stride()),
            None if mask is None else _broadcast(mask),
            None if bias is None else _broadcast(bias),
            None if alibi_slopes is None else _strided(alibi_slopes),
            None if sinks is None else _strided(sinks),
            None if lse is None else lse.data_ptr(),
            None if lse_rest is None else lse_rest.data_ptr(),
        ),
        (
            scale,
            left,
            right,
            softcap,
            threshold(dropout_p) if dropout_p else 0,
            1.0 / (1.0 - dropout_p),
            int(seed) if dropout_p else 0,
        ),
    )


def _strided(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()


def _broadcast(x: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """A tensor that broadcasts to the scores; the core gives dimensions of size 1 stride 0."""
    return x.data_ptr(), x.stride(), x.shape
