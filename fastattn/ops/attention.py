"""softmax(q k^T) v: the contract of attention, its plain-PyTorch reference, its op and its gradient."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch, dropout
from fastattn.ops._checks import (
    autocast,
    check_alibi,
    check_numbers,
    check_qkv,
    check_scores,
    check_seed,
    check_sinks,
    check_tensor,
    check_type,
)
from fastattn.ops._gradient import AttentionFunction, differentiable, first_derivative


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    q: Tensor  # [B, Sq, H, D]
    k: Tensor  # [B, Sk, Hk, D]
    v: Tensor  # [B, Sk, Hk, Dv]
    mask: Tensor | None  # bool, broadcasts to [B, H, Sq, Sk], rank 4; True = attend
    bias: Tensor | None  # like mask, in q's type or float32
    alibi_slopes: Tensor | None  # float32 [B, H]
    sinks: Tensor | None  # [H], in q's type or float32
    seed: Tensor | None  # int64 [], given when dropout_p > 0
    softmax_scale: float
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded; causal is 0
    softcap: float  # 0: none
    dropout_p: float


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * softmax_scale) v, without storing the scores.

    With s = q k^T * softmax_scale, the score of query i and key j is
    `softcap * tanh(s / softcap) - slope * |i + Sk - Sq - j| + bias`, each part only where it is given.

    Shapes:
        q [B, Sq, H, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv] -> out [B, Sq, H, Dv], lse [B, H, Sq].
        H is a multiple of Hk; query head h reads KV head h // (H // Hk), which is never expanded.
        Any strides whose last is 1: a [B, H, S, D] tensor goes in as `x.transpose(1, 2)`, uncopied.
    Types:
        q, k, v share one of float32, bfloat16, float16 (float64: reference only). Sums are in float32,
        lse is float32. Under autocast q, k and v are cast to autocast's type.
    Args:
        causal: query i sees keys j <= i + Sk - Sq (aligned at the end).
        window_size: (left, right) in tokens around i + Sk - Sq; -1 means unbounded.
        softmax_scale: multiplies q k^T; finite and at least 0. Default 1 / sqrt(D).
        softcap: bounds the scores to (-softcap, softcap); 0 means none.
        alibi_slopes: float32 [H] or [B, H]; not differentiable.
        mask: bool, broadcasts to [B, H, Sq, Sk]; True = attend.
        bias: added to the scores; broadcasts to [B, H, Sq, Sk]; in q's type or float32; differentiable.
        sinks: [H], one more score per head, which takes weight and gives no value; differentiable.
        dropout_p: share of the weights set to 0, in [0, 1); the others grow by 1 / (1 - dropout_p).
        seed: of the dropout, in [0, 2**63), an int or an int64 tensor of shape []; the same seed drops
            the same positions on every backend. Default: drawn from torch's CPU generator.
        return_lse: also return lse, the log of the sum of exp(score), sinks included; differentiable.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
        A row that sees no key gives out = 0 and lse = -inf (the sink's score, where there are sinks),
        and its gradients are 0.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic); see `fastattn.explain`.
    Source:
        Dao 2023, arXiv:2307.08691; online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q), autocast(k), autocast(v)
    call = check(
        q, k, v, causal, window_size, softmax_scale, softcap, alibi_slopes, mask, bias, sinks,
        dropout_p, seed,
    )  # fmt: skip
    if backend == dispatch.REFERENCE:
        out, lse = attention_reference(call)
    elif _needs_gradient(call) or dispatch.in_forward_mode():
        out, lse, _ = differentiable(_Attention, call, backend)
    elif dispatch.must_trace() or type(q) is not Tensor:
        out, lse, _ = _OP_FWD(*call, backend)
    else:
        module = dispatch.choose("attention", backend, q.device, call)
        out, lse, _ = module.attention_fwd(call, return_lse, False)
    return (out, lse) if return_lse else out


def _needs_gradient(call: Call) -> bool:
    return torch.is_grad_enabled() and (
        call.q.requires_grad
        or call.k.requires_grad
        or call.v.requires_grad
        or (call.bias is not None and call.bias.requires_grad)
        or (call.sinks is not None and call.sinks.requires_grad)
    )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Call:
    """Raises on a bad argument of `attention`, or returns the call in its normal form."""
    shape = check_qkv(q, k, v)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask must be bool (True = attend), got {mask.dtype}; bias adds to scores")
        mask = check_scores("mask", mask, q, shape)
    if bias is not None:
        check_type("bias", bias, q)
        bias = check_scores("bias", bias, q, shape)
    if alibi_slopes is not None:
        alibi_slopes = check_alibi(alibi_slopes, q, shape[0], shape[1])
    if sinks is not None:
        check_sinks(sinks, q, shape[1])
    scale, left, right = check_numbers(q.shape[3], causal, window_size, softmax_scale, softcap, dropout_p)
    checked_seed = check_seed(seed) if dropout_p > 0.0 or seed is not None else None
    return Call(
        q, k, v, mask, bias, alibi_slopes, sinks, checked_seed,
        scale, left, right, softcap, dropout_p,
    )  # fmt: skip


def attention_reference(call: Call, first_plane: int = 0) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch and the inputs' own type; differentiable. O(Sq * Sk) memory.

    Args:
        first_plane: of the dropout: the one of the first sequence's first head.
    """
    weights, lse = weights_reference(call)
    batch, nheads, seqlen_q, seqlen_k = weights.shape
    if call.dropout_p > 0.0:
        assert call.seed is not None
        keep = dropout.keep_mask(
            call.seed.to(weights.device), call.dropout_p, batch * nheads, seqlen_q, seqlen_k, first_plane
        ).view(batch, nheads, seqlen_q, seqlen_k)
        weights = weights * keep / (1.0 - call.dropout_p)
    v = _for_all_heads(call.v, nheads)
    return (weights @ v).transpose(1, 2).contiguous(), lse


def weights_reference(call: Call, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weights [B, H, Sq, Sk] before any dropout, and lse [B, H, Sq].

    Args:
        positions: [Sq], where each query stands among the keys. Default: aligned at the end.
    """
    q = call.q.transpose(1, 2)
    batch, nheads, seqlen_q, _ = q.shape
    seqlen_k = call.k.shape[1]

    scores = (q @ _for_all_heads(call.k, nheads).transpose(-1, -2)) * call.softmax_scale
    if call.softcap > 0.0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if positions is None:
        positions = torch.arange(seqlen_q, device=q.device) + (seqlen_k - seqlen_q)
    distance = positions[:, None] - torch.arange(seqlen_k, device=q.device)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes[:, :, None, None].to(scores.dtype) * distance.abs()
    if call.bias is not None:
        scores = scores + call.bias.to(scores.dtype)
    if call.window_left >= 0:
        scores = scores.masked_fill(distance > call.window_left, -math.inf)
    if call.window_right >= 0:
        scores = scores.masked_fill(distance < -call.window_right, -math.inf)
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, -math.inf)

    sees_nothing = (scores == -math.inf).all(dim=-1, keepdim=True)
    if call.sinks is not None:
        sink = call.sinks.to(scores.dtype)[None, :, None, None].expand(batch, nheads, seqlen_q, 1)
        scores = torch.cat([scores, sink], dim=-1)
    else:
        # The softmax of a row of -inf is NaN, in its gradient too: give it a finite row, then 0.
        scores = scores.masked_fill(sees_nothing, 0.0)
    wide = scores if scores.dtype is torch.float64 else scores.float()
    lse = torch.logsumexp(wide, dim=-1) if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    weights = torch.softmax(scores, dim=-1)[..., :seqlen_k]
    if call.sinks is None:
        weights = weights.masked_fill(sees_nothing, 0.0)
        lse = lse.masked_fill(sees_nothing[..., 0], -math.inf)
    return weights, lse


def _for_all_heads(x: Tensor, nheads: int) -> Tensor:
    """k or v as [B, H, Sk, D], each KV head once for every query head that reads it."""
    x = x.transpose(1, 2)
    groups = nheads // max(x.shape[1], 1)
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


_CALL_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor? seed, float softmax_scale, int window_left, int window_right, float softcap, float dropout_p"
)
_LIB = torch.library.Library("fastattn", "FRAGMENT")
# lse_rest is what float32 takes from lse, in units of log2: backward recomputes the weights from their
# sum, since lse alone would put its rounding error on all of them.
_LIB.define(f"attention_fwd({_CALL_SCHEMA}, str backend) -> (Tensor out, Tensor lse, Tensor lse_rest)")
_LIB.define(
    f"attention_bwd(Tensor dout, Tensor dlse, Tensor out, Tensor lse, Tensor lse_rest, {_CALL_SCHEMA}, "
    "bool need_dbias, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    module = dispatch.choose("attention", args[-1], call.q.device, call)
    return module.attention_fwd(call)  # type: ignore[no-any-return]


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    batch, seqlen_q, nheads, _ = call.q.shape
    out = call.q.new_empty((batch, seqlen_q, nheads, call.v.shape[3]))
    lse, lse_rest = (call.q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32) for _ in range(2))
    return out, lse, lse_rest


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    call, need_dbias, backend = Call(*args[5:-2]), args[-2], args[-1]
    module = dispatch.choose("attention", backend, call.q.device, call)
    return module.attention_bwd(*args[:5], call, need_dbias)  # type: ignore[no-any-return]


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    call, need_dbias = Call(*args[5:-2]), args[-2]
    nothing = call.q.new_empty((0,), dtype=torch.float32)
    dbias = nothing if call.bias is None or not need_dbias else call.bias.new_empty(call.bias.shape)
    dsinks = nothing.clone() if call.sinks is None else call.sinks.new_empty(call.sinks.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in call[:3])
    return dq, dk, dv, dbias, dsinks


_LIB.impl("attention_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("attention_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::attention_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.attention_fwd.default
_OP_BWD = torch.ops.fastattn.attention_bwd.default


class _Attention(AttentionFunction):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _OP_FWD(*args)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, lse_rest = ctx.saved_tensors
        *scalars, backend = ctx.scalars
        need_dbias = ctx.needs_input_grad[4]
        dq, dk, dv, dbias, dsinks = first_derivative(
            _OP_BWD, dout, dlse, out, lse, lse_rest, *tensors, *scalars, need_dbias, backend
        )
        bias = dbias if need_dbias else None
        sinks = dsinks if ctx.needs_input_grad[6] else None
        return (dq, dk, dv, None, bias, None, sinks, *[None] * 7)
