"""The functions of flash-attn 2.8, argument for argument, on fastattn's ops.

Layouts are flash-attn's and fastattn's alike: [B, S, H, D], packed [T, H, D], `causal` aligned at the end,
queries that see nothing give 0. Differences from flash-attn, here and in docs/integrations.md: float32 and
any head dim are taken too; lse is -inf, not inf, where nothing is seen; dropout comes from torch's CPU
generator; results are the same bits every time, so `deterministic` asks for what is always so.
"""

from typing import Any, cast

import torch
from torch import Tensor

from fastattn import dropout
from fastattn.ops.attention import attention
from fastattn.ops.attention_decode import attention_decode
from fastattn.ops.attention_varlen import attention_varlen

# What a function returns: out, or with return_attn_probs out, lse and S_dmask.
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn.flash_attn_func: `fastattn.attention` by flash-attn's signature.

    Shapes:
        q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] -> out [B, Sq, H, Dv], lse [B, H, Sq].
    Args:
        deterministic: always so, whatever is given.
        return_attn_probs: return (out, lse, S_dmask). S_dmask, for tests, is computed in plain PyTorch: with
            dropout [B, H, Sq, Sk], the weights before dropout, negative where they were dropped; without
            dropout empty, as flash-attn's.
        The others are those of `fastattn.attention`.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if not return_attn_probs:
        return cast(Tensor, attention(q, k, v, dropout_p=dropout_p, **options))
    seed = dropout.draw_seed() if dropout_p > 0.0 else None
    out, lse = attention(q, k, v, dropout_p=dropout_p, seed=seed, return_lse=True, **options)
    if seed is None:
        return out, lse, q.new_empty(0)
    return out, lse, _signed_weights(q, k, seed, dropout_p, 0, **options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q [B, Sq, H, D] and kv [B, Sk, 2, Hk, D]."""
    k, v = _unpack("kv", kv, ("B", "Sk", "2", "Hk", "D"))
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv [B, S, 3, H, D]."""
    q, k, v = _unpack("qkv", qkv, ("B", "S", "3", "H", "D"))
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """flash_attn.flash_attn_varlen_func: `fastattn.attention_varlen` by flash-attn's signature.

    Shapes:
        q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> out [Tq, H, Dv], lse [H, Tq].
        With a block_table: k [N, page_size, Hk, D], v [N, page_size, Hk, Dv].
    Args:
        deterministic: always so, whatever is given.
        return_attn_probs: as in `flash_attn_func`, S_dmask [B, H, max_seqlen_q, max_seqlen_k].
        block_table: int32 [B, max_pages]; keys p * page_size and on of sequence b are in page
            block_table[b, p]. They are gathered first: a copy of all keys and values that are used.
        The others are those of `fastattn.attention_varlen`.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    """
    if block_table is not None:
        k, v = _gather(k, v, cu_seqlens_k, block_table)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    packed = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    if not return_attn_probs:
        return cast(Tensor, attention_varlen(q, k, v, *packed, dropout_p=dropout_p, **options))
    seed = dropout.draw_seed() if dropout_p > 0.0 else None
    out, lse = attention_varlen(q, k, v, *packed, dropout_p=dropout_p, seed=seed, return_lse=True, **options)
    if seed is None:
        return out, lse, q.new_empty(0)
    return out, lse, _signed_weights_varlen(q, k, *packed, seed, dropout_p, options)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q [Tq, H, D] and kv [Tk, 2, Hk, D]."""
    k, v = _unpack("kv", kv, ("Tk", "2", "Hk", "D"))
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv [T, 3, H, D]."""
    q, k, v = _unpack("qkv", qkv, ("T", "3", "H", "D"))
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """flash_attn.flash_attn_with_kvcache: `fastattn.attention_decode` by flash-attn's signature.

    k and v are written to the cache, in place, behind its cache_seqlens keys. As in flash-attn there is no
    gradient, and none is asked for: the result does not require one.

    Shapes:
        q [B, Sq, H, D], k_cache [Bc, Smax, Hk, D], v_cache [Bc, Smax, Hk, Dv], k [B, Sn, Hk, D],
        v [B, Sn, Hk, Dv] -> out [B, Sq, H, Dv], lse [B, H, Sq]. With a block_table the caches are pages
        [N, page_size, Hk, D], of any page_size.
    Args:
        rotary_cos: [positions, R / 2], `cos` of `fastattn.attention_decode`; rotary_sin is its `sin`.
        rotary_interleaved: pairs are neighbours; that is the default here, and not there.
        return_softmax_lse: return (out, lse).
        The others are those of `fastattn.attention_decode`.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    """
    return attention_decode(
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cos=rotary_cos,
        sin=rotary_sin,
        interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    return {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": tuple(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _unpack(name: str, x: Tensor, layout: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Views of what was packed along the third dimension from the end."""
    if x.ndim != len(layout) or str(x.shape[-3]) != layout[-3]:
        raise ValueError(f"{name} must have shape [{', '.join(layout)}], got {list(x.shape)}")
    return x.unbind(-3)


def _gather(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of all sequences, from pages to packed rows."""
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "k and v must have 4 dimensions [N, page_size, Hk, D] with a block_table, got shapes "
            f"{list(k.shape)} and {list(v.shape)}"
        )
    lengths, page_size = cu_seqlens_k.diff(), k.shape[1]
    longest = int(lengths.max()) if len(lengths) else 0
    if len(block_table) != len(lengths) or longest > block_table.shape[-1] * page_size:
        raise ValueError(
            f"block_table must have shape [B, max_pages] with B = {len(lengths)} and pages of {page_size} "
            f"keys for {longest}, got {list(block_table.shape)}"
        )
    sequence = torch.arange(len(lengths), device=k.device).repeat_interleave(lengths)
    token = torch.arange(len(sequence), device=k.device) - cu_seqlens_k[sequence]
    pages = block_table[sequence, token // page_size].long()
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < len(k):
        raise ValueError(
            f"block_table must hold pages in 0 ... {len(k) - 1}, got {int(pages.min())} to {int(pages.max())}"
        )
    return k[pages, token % page_size], v[pages, token % page_size]


@torch.no_grad()
def _signed_weights(
    q: Tensor, k: Tensor, seed: Tensor, dropout_p: float, first_plane: int, **options: Any
) -> Tensor:
    """[B, H, Sq, Sk]: the weights, negative where they are dropped. Values of 1, 0, ... 0 show them."""
    (batch, seqlen_q, nheads, _), (_, seqlen_k, nheads_k, _) = q.shape, k.shape
    ones = torch.eye(seqlen_k, dtype=q.dtype, device=q.device)[:, None].expand(-1, nheads_k, -1)
    weights = attention(q, k, ones.expand(batch, *ones.shape), backend="reference", **options)
    keep = dropout.keep_mask(
        seed.to(q.device), dropout_p, batch * nheads, seqlen_q, seqlen_k, first_plane
    ).view(batch, nheads, seqlen_q, seqlen_k)
    weights = cast(Tensor, weights).transpose(1, 2)
    return torch.where(keep, weights, -weights)


def _signed_weights_varlen(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seed: Tensor,
    dropout_p: float,
    options: dict[str, Any],
) -> Tensor:
    """The same of packed sequences, [B, H, max_seqlen_q, max_seqlen_k] with 0 where there is nothing."""
    nheads, batch = q.shape[1], len(cu_seqlens_q) - 1
    found = q.new_zeros(batch, nheads, max_seqlen_q, max_seqlen_k)
    slopes = options["alibi_slopes"]
    for b in range(batch):
        alone = q[None, cu_seqlens_q[b] : cu_seqlens_q[b + 1]], k[None, cu_seqlens_k[b] : cu_seqlens_k[b + 1]]
        if slopes is not None and slopes.ndim == 2:
            options = {**options, "alibi_slopes": slopes[b]}
        weights = _signed_weights(*alone, seed, dropout_p, b * nheads, **options)
        found[b, :, : weights.shape[2], : weights.shape[3]] = weights[0]
    return found
