"""Attention over a key-value cache, which it may extend: the contract, its reference and its op."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.ops import _cache
from fastattn.ops import attention as dense
from fastattn.ops._checks import autocast, check_alibi, check_numbers, check_sinks


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    q: Tensor  # [B, Sq, H, D]
    k_cache: Tensor  # [Bc, Smax, Hk, D], or pages [N, page_size, Hk, D]; written to where k is given
    v_cache: Tensor  # [Bc, Smax, Hk, Dv], or pages [N, page_size, Hk, Dv]
    k: Tensor | None  # [B, Sn, Hk, D], in q's type
    v: Tensor | None  # [B, Sn, Hk, Dv], given with k
    cache_seqlens: Tensor  # int32 [B], contiguous: keys before the append
    block_table: Tensor | None  # int32 [B, max_pages]
    cache_batch_idx: Tensor | None  # int32 [B], contiguous; not with block_table
    cache_leftpad: Tensor | None  # int32 [B], contiguous; not with block_table
    cos: Tensor | None  # [positions, R / 2], in q's type or float32
    sin: Tensor | None  # like cos
    k_scale: Tensor | None  # float32 [Bc, Smax, Hk] or [N, page_size, Hk], any strides; with int8 caches
    v_scale: Tensor | None  # like k_scale
    alibi_slopes: Tensor | None  # float32 [B, H]
    sinks: Tensor | None  # [H], in q's type or float32
    softmax_scale: float
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded; causal is 0
    softcap: float  # 0: none
    interleaved: bool  # pairs of cos and sin are neighbours, not halves
    rotate_in_steps: bool  # query i stands at cache_seqlens + i, not at cache_seqlens
    num_splits: int  # 0: the backend chooses


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a few new queries over cached keys and values. Appends to the cache on the way.

    Sequence b first gets k[b] and v[b] written behind its cache_seqlens[b] keys, in place and for all
    sequences before any key is read; then its queries see cache_seqlens[b] + Sn keys. cache_seqlens stays.

    Shapes:
        q [B, Sq, H, D], k_cache [Bc, Smax, Hk, D], v_cache [Bc, Smax, Hk, Dv]
        -> out [B, Sq, H, Dv], lse [B, H, Sq]. Bc is B where no cache_batch_idx is given.
        With a block_table: pages k_cache [N, page_size, Hk, D], v_cache [N, page_size, Hk, Dv] of any size.
        H is a multiple of Hk; query head h reads KV head h // (H // Hk), which is never expanded.
        Any strides whose last is 1, in the scales any at all.
    Types:
        q is float32, bfloat16 or float16 (float64: reference only), out and k and v too. The cache is in
        any of them, or int8. Sums are in float32, lse is float32. Under autocast q, k and v are cast.
    Args:
        k: [B, Sn, Hk, D], keys to append.
        v: [B, Sn, Hk, Dv], values to append; both or none.
        cache_seqlens: an int or int32 [B], the keys in the cache, without k. Default: all that it has
            room for; with k it must be given.
        block_table: int32 [B, max_pages]; keys p * page_size and on of sequence b are in page
            block_table[b, p]. Entries behind the last key may be anything.
        cache_batch_idx: int32 [B], the row of the cache of each sequence; not with block_table.
        cache_leftpad: int32 [B], keys of the cache before this one are not seen; not with block_table.
        cos: [positions, R / 2], in float32 or q's type: rotary tables. New keys are turned by the angle of
            their place in the cache; query i by that of cache_seqlens[b] + i where causal or a window is
            set, else all by that of cache_seqlens[b]. In float32, then rounded to q's type; the cache is
            never turned. Dims from R <= D on pass through.
        sin: like cos; both or none.
        interleaved: a pair are dims (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...
        k_scale: float32 [Bc, Smax, Hk] or [N, page_size, Hk]: a key is its int8 times its scale. Written
            to when k is: max|k| / 127 of a token and head, its int8 the nearest of k / scale, ties to even.
        v_scale: the same for the values.
        causal: query i sees keys j <= i + Sk - Sq (aligned at the end), Sk = cache_seqlens[b] + Sn.
        window_size: (left, right) in tokens around i + Sk - Sq; -1 means unbounded.
        softmax_scale: multiplies q k^T; finite and at least 0. Default 1 / sqrt(D).
        softcap: bounds the scores to (-softcap, softcap); 0 means none.
        alibi_slopes: float32 [H] or [B, H].
        sinks: [H], one more score per head, which takes weight and gives no value.
        num_splits: into how many pieces the keys of a sequence are cut; 0: the backend chooses.
        return_lse: also return lse, the log of the sum of exp(score), sinks included.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
        A row that sees no key gives out = 0 and lse = -inf (the sink's score, where there are sinks).
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed. Nothing
            has been written then. What stands in index tensors is looked at on the CPU alone.
        NotImplementedError: no backend takes the call, with each one's reason; a gradient is asked for.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic); see `fastattn.explain`.
    Source:
        Dao 2023, flash_attn_with_kvcache; pages: Kwon et al. 2023, arXiv:2309.06180; rotary embedding:
        Su et al. 2021, arXiv:2104.09864.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    if torch._C._is_any_autocast_enabled():
        q = autocast(q)
        k, v = (x if x is None else autocast(x) for x in (k, v))
    call = check(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, block_table=block_table,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, cos=cos, sin=sin,
        interleaved=interleaved, k_scale=k_scale, v_scale=v_scale, causal=causal, window_size=window_size,
        softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        num_splits=num_splits,
    )  # fmt: skip
    if backend == dispatch.REFERENCE:
        out, lse = attention_decode_reference(call)
    elif _unreadable(call):
        out, lse = _OP(*call, backend)
    else:
        out, lse = _run(call, backend, return_lse)
    return (out, lse) if return_lse else out


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
) -> Call:
    """Raises on a bad argument of `attention_decode`, or returns the call in its normal form."""
    paged = block_table is not None
    _cache.check_cache(q, k_cache, v_cache, k_scale, v_scale, paged, cache_batch_idx is not None)
    batch, _, nheads, head_dim = q.shape
    if block_table is not None:
        if cache_batch_idx is not None or cache_leftpad is not None:
            name = "cache_leftpad" if cache_batch_idx is None else "cache_batch_idx"
            raise ValueError(f"{name} must be None where a block_table is given: it is for dense caches")
        _cache.check_index("block_table", block_table, q, rank=2)
    if cache_batch_idx is not None:
        cache_batch_idx = _cache.check_index("cache_batch_idx", cache_batch_idx, q)
    if cache_leftpad is not None:
        cache_leftpad = _cache.check_index("cache_leftpad", cache_leftpad, q)
    if (k is None) is not (v is None):
        raise ValueError(f"k and v must be given together, got only {'v' if k is None else 'k'}")
    if k is not None and v is not None:
        _cache.check_new(q, k, v, k_cache, v_cache, k_scale, v_scale)
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must be given with k and v: it says where they are written")
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, Tensor):
        cache_seqlens = _cache.check_index("cache_seqlens", cache_seqlens, q)
    elif isinstance(cache_seqlens, int | torch.SymInt) and not isinstance(cache_seqlens, bool):
        if not 0 <= cache_seqlens <= capacity:
            raise ValueError(f"cache_seqlens must be in 0 ... {capacity}, got {cache_seqlens}")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    else:
        raise TypeError(f"cache_seqlens must be an int or int32 [B], got {type(cache_seqlens).__name__}")
    if (cos is None) is not (sin is None):
        raise ValueError(f"cos and sin must be given together, got only {'sin' if cos is None else 'cos'}")
    if cos is not None and sin is not None:
        _cache.check_rotary(cos, sin, q)
    if alibi_slopes is not None:
        alibi_slopes = check_alibi(alibi_slopes, q, batch, nheads)
    if sinks is not None:
        check_sinks(sinks, q, nheads)
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"num_splits must be an int of at least 0 (0 = chosen for you), got {num_splits}")
    scale, left, right = check_numbers(head_dim, causal, window_size, softmax_scale, softcap)
    call = Call(
        q, k_cache, v_cache, k, v, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, cos, sin,
        k_scale, v_scale, alibi_slopes, sinks, scale, left, right, softcap,
        bool(interleaved), left >= 0 or right >= 0, num_splits,
    )  # fmt: skip
    _refuse_gradient(call)
    if _unreadable(call):
        _refuse_vmap(call)
    else:
        _cache.check_values(call)
    return call


def _refuse_gradient(call: Call) -> None:
    """Raises where somebody could expect a gradient of what this call does."""
    tensors = [x for x in call[:15] if x is not None]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if wanted or (
        dispatch.in_forward_mode()
        and any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    ):
        raise NotImplementedError(
            "fastattn.attention_decode has no gradient: call it under torch.no_grad() or "
            "torch.inference_mode(), or use fastattn.attention"
        )


def _refuse_vmap(call: Call) -> None:
    is_batched = torch._C._functorch.is_batchedtensor
    if not torch.compiler.is_compiling() and any(is_batched(x) for x in call[:15] if x is not None):
        raise NotImplementedError(
            "fastattn.attention_decode does not run under torch.func.vmap: its own B is the batch"
        )


def _unreadable(call: Call) -> bool:
    """Whether what stands in the tensors is hidden now: then the op looks at it when it runs."""
    return dispatch.must_trace() or any(type(x) is not Tensor for x in (call.q, *call[5:9]) if x is not None)


def attention_decode_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: appends, rotates, then `attention`, sequence by sequence."""
    _cache.check_values(call)  # `check` could not where somebody traces
    q = call.q
    batch, seqlen_q, nheads, _ = q.shape
    if call.k is not None:
        _cache.append(call)
    if call.cos is not None and call.sin is not None:
        steps = torch.arange(seqlen_q, device=q.device) * call.rotate_in_steps
        positions = call.cache_seqlens[:, None] + steps
        q = _cache.rotate(q, call.cos, call.sin, positions, call.interleaved)
    new = 0 if call.k is None else call.k.shape[1]
    leftpad = [0] * batch if call.cache_leftpad is None else call.cache_leftpad.tolist()
    out = q.new_empty((batch, seqlen_q, nheads, call.v_cache.shape[3]))
    lse = q.new_empty((batch, nheads, seqlen_q), dtype=torch.promote_types(q.dtype, torch.float32))
    for b, length in enumerate(call.cache_seqlens.tolist()):
        index = _cache.slots(call, b, min(leftpad[b], length + new), length + new)
        keys = _cache.read(call.k_cache, call.k_scale, index, q.dtype)
        values = _cache.read(call.v_cache, call.v_scale, index, q.dtype)
        alone = dense.Call(
            q[b : b + 1], keys[None], values[None], None, None,
            None if call.alibi_slopes is None else call.alibi_slopes[b : b + 1], call.sinks, None,
            call.softmax_scale, call.window_left, call.window_right, call.softcap, 0.0,
        )  # fmt: skip
        out[b : b + 1], lse[b : b + 1] = dense.attention_reference(alone)
    return out, lse


_LIB = torch.library.Library("fastattn", "FRAGMENT")
_LIB.define(
    "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, Tensor? block_table, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
    "Tensor? cos, Tensor? sin, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? alibi_slopes, "
    "Tensor? sinks, float softmax_scale, int window_left, int window_right, float softcap, "
    "bool interleaved, bool rotate_in_steps, int num_splits, str backend) -> (Tensor out, Tensor lse)"
)


def _run(call: Call, backend: str, need_lse: bool) -> tuple[Tensor, Tensor]:
    module = dispatch.choose("attention_decode", backend, call.q.device, call)
    if call.k is not None:
        # Kernels write behind autograd's back.
        written = (call.k_cache, call.v_cache, call.k_scale, call.v_scale)
        torch.autograd.graph.increment_version([x for x in written if x is not None])
    return module.attention_decode(call, need_lse)  # type: ignore[no-any-return]


def _op(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args[:-1])
    _cache.check_values(call)
    return _run(call, args[-1], True)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call(*args[:-1])
    batch, seqlen_q, nheads, _ = call.q.shape
    out = call.q.new_empty((batch, seqlen_q, nheads, call.v_cache.shape[3]))
    return out, call.q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32)


_LIB.impl("attention_decode", _op, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_decode", _fake, lib=_LIB)
_OP = torch.ops.fastattn.attention_decode.default
