"""Attention over packed sequences: the contract, its plain-PyTorch reference, its op and its gradient."""

from operator import sub
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.ops import attention as dense
from fastattn.ops._checks import (
    autocast,
    check_alibi,
    check_device,
    check_numbers,
    check_packed,
    check_seed,
    check_sinks,
    check_tensor,
)
from fastattn.ops._gradient import AttentionFunction, differentiable, first_derivative


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    q: Tensor  # [Tq, H, D]
    k: Tensor  # [Tk, Hk, D]
    v: Tensor  # [Tk, Hk, Dv]
    cu_seqlens_q: Tensor  # int32 [B + 1], contiguous: 0 first, Tq last
    cu_seqlens_k: Tensor  # int32 [B + 1], contiguous: 0 first, Tk last
    alibi_slopes: Tensor | None  # float32 [B, H]
    sinks: Tensor | None  # [H], in q's type or float32
    seed: Tensor | None  # int64 [], given when dropout_p > 0
    max_seqlen_q: int  # at least the longest sequence of queries
    max_seqlen_k: int
    softmax_scale: float
    window_left: int  # -1: unbounded
    window_right: int  # -1: unbounded; causal is 0
    softcap: float  # 0: none
    dropout_p: float


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of different lengths, packed one after the other without padding.

    Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b] to
    cu_seqlens_k[b + 1], and is computed as `attention` would alone. There is no mask and no bias, which
    have no packed form: use `attention`.

    Shapes:
        q [Tq, H, D], k [Tk, Hk, D], v [Tk, Hk, Dv] -> out [Tq, H, Dv], lse [H, Tq].
        H is a multiple of Hk; query head h reads KV head h // (H // Hk), which is never expanded.
        Any strides whose last is 1: slices of a packed qkv go in uncopied.
    Types:
        q, k, v share one of float32, bfloat16, float16 (float64: reference only). Sums are in float32,
        lse is float32. Under autocast q, k and v are cast to autocast's type.
    Args:
        cu_seqlens_q: int32 [B + 1], where each sequence starts, and the total: 0 first, never falling, Tq
            last. Sequences of length 0 are fine.
        cu_seqlens_k: the same for the keys, with Tk last.
        max_seqlen_q: at least the longest sequence of queries. Default: computed, for which other devices
            than the CPU must wait; under torch.compile, Tq.
        max_seqlen_k: the same for the keys.
        causal: query i of a sequence sees keys j <= i + Sk - Sq (aligned at the end).
        window_size: (left, right) in tokens around i + Sk - Sq; -1 means unbounded.
        softmax_scale: multiplies q k^T; finite and at least 0. Default 1 / sqrt(D).
        softcap: bounds the scores to (-softcap, softcap); 0 means none.
        alibi_slopes: float32 [H] or [B, H]; not differentiable.
        sinks: [H], one more score per head, which takes weight and gives no value; differentiable.
        dropout_p: share of the weights set to 0, in [0, 1); the others grow by 1 / (1 - dropout_p).
        seed: of the dropout, in [0, 2**63), an int or an int64 tensor of shape []; the same seed drops
            what it drops in `attention` on the padded batch. Default: drawn from torch's CPU generator.
        return_lse: also return lse, the log of the sum of exp(score), sinks included; differentiable.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
        A row that sees no key gives out = 0 and lse = -inf (the sink's score, where there are sinks),
        and its gradients are 0.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed. What
            stands in cu_seqlens_q and cu_seqlens_k is looked at on the CPU alone.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic); see `fastattn.explain`.
    Source:
        Dao 2023, arXiv:2307.08691; the layout is that of its flash_attn_varlen_func.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    if torch._C._is_any_autocast_enabled():
        q, k, v = autocast(q), autocast(k), autocast(v)
    call = check(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size,
        softmax_scale, softcap, alibi_slopes, sinks, dropout_p, seed,
    )  # fmt: skip
    if backend == dispatch.REFERENCE:
        out, lse = attention_varlen_reference(call)
    elif _needs_gradient(call) or dispatch.in_forward_mode():
        out, lse, _ = differentiable(_AttentionVarlen, call, backend)
    elif dispatch.must_trace() or not type(q) is type(cu_seqlens_q) is type(cu_seqlens_k) is Tensor:
        out, lse, _ = _OP_FWD(*call, backend)
    else:
        module = dispatch.choose("attention_varlen", backend, q.device, call)
        out, lse, _ = module.attention_varlen_fwd(call, return_lse, False)
    return (out, lse) if return_lse else out


def _needs_gradient(call: Call) -> bool:
    return torch.is_grad_enabled() and (
        call.q.requires_grad
        or call.k.requires_grad
        or call.v.requires_grad
        or (call.sinks is not None and call.sinks.requires_grad)
    )


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Call:
    """Raises on a bad argument of `attention_varlen`, or returns the call in its normal form."""
    total_q, nheads, total_k = check_packed(q, k, v)
    _check_starts("cu_seqlens_q", cu_seqlens_q, q)
    _check_starts("cu_seqlens_k", cu_seqlens_k, q)
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != batch:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must share the length B + 1, "
            f"got {batch + 1} and {cu_seqlens_k.shape[0]}"
        )
    if dispatch.must_trace() or not type(cu_seqlens_q) is type(cu_seqlens_k) is Tensor:
        # Nobody can read the lengths now; the op looks at them when it runs.
        max_seqlen_q = total_q if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = total_k if max_seqlen_k is None else max_seqlen_k
    else:
        max_seqlen_q = _check_lengths("q", cu_seqlens_q, total_q, max_seqlen_q)
        max_seqlen_k = _check_lengths("k", cu_seqlens_k, total_k, max_seqlen_k)
    if alibi_slopes is not None:
        alibi_slopes = check_alibi(alibi_slopes, q, batch, nheads)
    if sinks is not None:
        check_sinks(sinks, q, nheads)
    scale, left, right = check_numbers(q.shape[2], causal, window_size, softmax_scale, softcap, dropout_p)
    checked_seed = check_seed(seed) if dropout_p > 0.0 or seed is not None else None
    return Call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, checked_seed,
        max_seqlen_q, max_seqlen_k, scale, left, right, softcap, dropout_p,
    )  # fmt: skip


def _check_starts(name: str, starts: Tensor, q: Tensor) -> None:
    check_tensor(name, starts)
    if starts.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {starts.dtype}")
    check_device(name, starts, q)
    if starts.ndim != 1 or starts.shape[0] < 1:
        raise ValueError(f"{name} must have shape [B + 1], got {list(starts.shape)}")
    if not starts.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(starts.stride())}")


def _check_lengths(side: str, starts: Tensor, total: int, max_seqlen: int | None) -> int:
    """Looks at what cu_seqlens_<side> holds, on the CPU. Returns the longest length, or a bound of it."""
    if max_seqlen is not None and not isinstance(max_seqlen, int):
        raise TypeError(f"max_seqlen_{side} must be an int, got {type(max_seqlen).__name__}")
    if starts.device.type != "cpu":
        if max_seqlen is not None or starts.device.type == "meta":
            return total if max_seqlen is None else max_seqlen
        return int(starts.diff().max()) if starts.shape[0] > 1 else 0
    at = starts.tolist()
    if at[0] != 0 or at[-1] != total or at != sorted(at):
        raise _lengths_error(f"cu_seqlens_{side}", at, f"T{side} = {total}, the number of rows of {side}")
    longest = max(map(sub, at[1:], at), default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen_{side} must be at least {longest}, the longest sequence of {side}, got {max_seqlen}"
        )
    return longest


def _with_lengths(call: Call) -> Call:
    """The same call once its lengths have been looked at: `check` could not where somebody traces."""
    return call._replace(
        max_seqlen_q=_check_lengths("q", call.cu_seqlens_q, call.q.shape[0], call.max_seqlen_q),
        max_seqlen_k=_check_lengths("k", call.cu_seqlens_k, call.k.shape[0], call.max_seqlen_k),
    )


def _lengths_error(name: str, at: list[int], total: str) -> Exception:
    if at[0] != 0:
        return ValueError(f"{name} must begin with 0, got {at[0]}")
    for index in range(1, len(at)):
        if at[index] < at[index - 1]:
            return ValueError(f"{name} must never fall, got {at[index]} after {at[index - 1]} at [{index}]")
    return ValueError(f"{name} must end with {total}, got {at[-1]}")


def attention_varlen_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition: `attention`'s, one sequence after the other; differentiable."""
    call = _with_lengths(call)
    nheads = call.q.shape[1]
    outs, lses = [], []
    at_q, at_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for b in range(len(at_q) - 1):
        keys = slice(at_k[b], at_k[b + 1])
        alone = dense.Call(
            call.q[None, at_q[b] : at_q[b + 1]], call.k[None, keys], call.v[None, keys], None, None,
            None if call.alibi_slopes is None else call.alibi_slopes[b : b + 1], call.sinks, call.seed,
            call.softmax_scale, call.window_left, call.window_right, call.softcap, call.dropout_p,
        )  # fmt: skip
        out, lse = dense.attention_reference(alone, first_plane=b * nheads)
        outs.append(out[0])
        lses.append(lse[0])
    if not outs:
        lse = call.q.new_empty((nheads, 0), dtype=torch.promote_types(call.q.dtype, torch.float32))
        return call.q.new_empty((0, nheads, call.v.shape[2])), lse
    return torch.cat(outs), torch.cat(lses, dim=-1)


_CALL_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? seed, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
    "int window_left, int window_right, float softcap, float dropout_p"
)
_LIB = torch.library.Library("fastattn", "FRAGMENT")
_LIB.define(f"attention_varlen_fwd({_CALL_SCHEMA}, str backend) -> (Tensor out, Tensor lse, Tensor lse_rest)")
_LIB.define(
    "attention_varlen_bwd(Tensor dout, Tensor dlse, Tensor out, Tensor lse, Tensor lse_rest, "
    f"{_CALL_SCHEMA}, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _with_lengths(Call(*args[:-1]))
    module = dispatch.choose("attention_varlen", args[-1], call.q.device, call)
    return module.attention_varlen_fwd(call)  # type: ignore[no-any-return]


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    total_q, nheads, _ = call.q.shape
    out = call.q.new_empty((total_q, nheads, call.v.shape[2]))
    lse, lse_rest = (call.q.new_empty((nheads, total_q), dtype=torch.float32) for _ in range(2))
    return out, lse, lse_rest


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    call, backend = Call(*args[5:-1]), args[-1]
    module = dispatch.choose("attention_varlen", backend, call.q.device, call)
    return module.attention_varlen_bwd(*args[:5], call)  # type: ignore[no-any-return]


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    call = Call(*args[5:-1])
    nothing = call.q.new_empty((0,), dtype=torch.float32)
    dsinks = nothing if call.sinks is None else call.sinks.new_empty(call.sinks.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in call[:3])
    return dq, dk, dv, dsinks


_LIB.impl("attention_varlen_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("attention_varlen_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_varlen_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::attention_varlen_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.attention_varlen_fwd.default
_OP_BWD = torch.ops.fastattn.attention_varlen_bwd.default


class _AttentionVarlen(AttentionFunction):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _OP_FWD(*args)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, lse_rest = ctx.saved_tensors
        dq, dk, dv, dsinks = first_derivative(_OP_BWD, dout, dlse, out, lse, lse_rest, *tensors, *ctx.scalars)
        sinks = dsinks if ctx.needs_input_grad[6] else None
        return (dq, dk, dv, None, None, None, sinks, *[None] * 9)
