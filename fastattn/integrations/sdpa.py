"""torch's scaled_dot_product_attention, as a function of the same signature and meaning."""

from typing import Any, cast

import torch
from torch import Tensor

from fastattn.ops.attention import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(query key^T * scale) value, with the signature and the meaning of torch's function.

    Shapes:
        query [..., H, Sq, D], key [..., Hk, Sk, D], value [..., Hk, Sk, Dv] -> [..., H, Sq, Dv].
        Leading dimensions broadcast, and there may be none: [Sq, D] is one head.
    Args:
        attn_mask: broadcasts to [..., H, Sq, Sk]. Bool: True = attend. Float, in query's type or
            float32: added to the scores; differentiable.
        dropout_p: share of the weights set to 0, in training or not, as in torch. Drawn from
            torch's CPU generator; the positions differ from torch's.
        is_causal: query i sees keys j <= i, aligned at the start also where Sq differs from Sk.
            (`fastattn.attention` aligns at the end.)
        scale: default 1 / sqrt(D).
        enable_gqa: H may be a multiple of Hk; the KV heads are not copied.
    Raises:
        ValueError, TypeError: an argument is wrong, or is_causal and attn_mask are both given.
        NotImplementedError: no backend takes the call; gives each one's reason.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal=True and attn_mask exclude each other; a mask can hold both")
    if not query.ndim == key.ndim == value.ndim == 4:
        return _any_rank(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    query, key, value = _same_batch_and_heads(query, key, value, enable_gqa)
    q, k, v, window = bshd(query, key, value, is_causal)
    additive = attn_mask is not None and attn_mask.dtype is not torch.bool
    out = attention(
        q,
        k,
        v,
        window_size=window,
        softmax_scale=scale,
        mask=None if additive else attn_mask,
        bias=attn_mask if additive else None,
        dropout_p=dropout_p,
    )
    return cast(Tensor, out).transpose(1, 2)


def bshd(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """torch's [B, H, S, D] as [B, S, H, D] with a unit last stride, and the window for is_causal.

    The keys from Sq on are seen by nobody, and are cut off. Then "j <= i" is the end-aligned
    diagonal j <= i + Sk - Sq with Sq - Sk more keys to its right.
    """
    q, k, v = (unit_stride(x.transpose(1, 2)) for x in (query, key, value))
    if not is_causal:
        return q, k, v, (-1, -1)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if seqlen_k > seqlen_q:
        return q, k[:, :seqlen_q], v[:, :seqlen_q], (-1, 0)
    return q, k, v, (-1, seqlen_q - seqlen_k)


def unit_stride(x: Tensor) -> Tensor:
    """x with a last stride of 1; copied only where that was not so."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _same_batch_and_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcasts batches and heads of size 1, as views.

    `attention` takes any H that is a multiple of Hk, but without enable_gqa torch takes only Hk = 1.
    """
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        (batch,) = torch.broadcast_shapes(*(x.shape[:1] for x in (query, key, value)))
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    nheads, nheads_k, nheads_v = query.shape[1], key.shape[1], value.shape[1]
    if nheads == nheads_k == nheads_v:
        return query, key, value
    if enable_gqa:
        if nheads_k == 0 or nheads % nheads_k != 0:
            raise ValueError(f"query's heads must be a multiple of key's, got {nheads} and {nheads_k}")
        return query, key, value
    sizes = {nheads, nheads_k, nheads_v} - {1}
    if len(sizes) != 1:
        raise ValueError(
            f"query, key and value have {nheads}, {nheads_k} and {nheads_v} heads; "
            "enable_gqa=True lets query have a multiple of key's"
        )
    (nheads,) = sizes
    if nheads_k != nheads_v:
        key, value = (x.expand(-1, nheads, -1, -1) for x in (key, value))
    return query.expand(-1, nheads, -1, -1), key, value


def _any_rank(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any) -> Tensor:
    """Folds all leading dimensions into one batch, or makes the missing ones."""
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise ValueError("query, key and value must have at least 2 dimensions [S, D]")
    rank = max(query.ndim, key.ndim, value.ndim)
    query, key, value = (x[(None,) * (max(rank, 4) - x.ndim)] for x in (query, key, value))
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))

    def fold(x: Tensor) -> Tensor:
        return x.expand(*batch, *x.shape[-3:]).flatten(0, -4)

    if attn_mask is not None and attn_mask.ndim > 3:
        attn_mask = fold(attn_mask)
    out = scaled_dot_product_attention(fold(query), fold(key), fold(value), attn_mask, *options)
    return out.reshape((*batch, *out.shape[1:])[-rank:])
