"""Attention over a sequence that the ranks of a group share: keys and values go round, queries stay."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn import dispatch
from fastattn.distributed import parts
from fastattn.distributed.ranks import Passing, Ranks, check_agreement, ranks_of
from fastattn.merge import merge_attention_states
from fastattn.ops._checks import TYPES, autocast
from fastattn.ops.attention import Call, attention_reference, check


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what ranks say to each other is not traced
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    order: str = "zigzag",
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    check_ranks: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over the whole sequence, of which each rank of a group holds, and gets, its part.

    All ranks call it together, forward and backward. Keys and values go round the ring while the part that
    came before is worked on; no rank ever holds all of them, nor any scores.

    Shapes:
        q [B, S / W, H, D], k [B, S / W, Hk, D], v [B, S / W, Hk, Dv] -> out [B, S / W, H, Dv],
        lse [B, H, S / W], for W ranks: parts as `shard_sequence` makes them. Without causal, window_size
        and alibi_slopes positions do not matter: then q may have a length of its own.
    Types:
        As in `attention`. What comes from the ranks is added up in float32.
    Args:
        group: the ranks that share the sequence. Default: all.
        order: "zigzag" or "contiguous": how the sequence was cut, see `shard_sequence`.
        causal, window_size, softmax_scale, softcap, alibi_slopes, return_lse: as in `attention`, over the
            whole sequence.
        sinks: as in `attention`, the same on all ranks; its gradient is of this rank's queries alone, like
            those of all parameters.
        check_ranks: compare sizes, types and options among the ranks first, so that a difference is an
            error and no endless wait. One all_gather of a few numbers, for which a GPU's queue runs empty.
        backend: as in `attention`.
    Errors:
        Against the reference in float64 on one process, as `attention`.
    Raises:
        ValueError, TypeError: an argument is wrong, on this rank or (where check_ranks) on another one.
        RuntimeError: torch.distributed is not initialized.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Source:
        Liu et al. 2023, arXiv:2310.01889; the order: Brandon et al. 2023, arXiv:2311.09431.
    """
    ranks = ranks_of(group)
    if backend is None:
        backend = dispatch.DEFAULT
    call, error = None, None
    try:
        parts.check_order(order)
        checked = check(
            autocast(q), autocast(k), autocast(v), causal, window_size, softmax_scale, softcap, alibi_slopes,
            sinks=sinks,
        )  # fmt: skip
        _check_lengths(checked, order)
        if backend != dispatch.REFERENCE:
            dispatch.choose("attention", backend, checked.q.device, checked)
        call = checked
    except (TypeError, ValueError, NotImplementedError) as refusal:
        error = refusal
    if check_ranks:
        device = q.device if isinstance(q, Tensor) else torch.device("cpu")
        check_agreement(ranks, _facts(call, order), device, error)
    elif error is not None:
        raise error
    assert call is not None
    out, lse = _RingAttention.apply(*_tensors(call), call[8:], _Ring(ranks, order), backend)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def _check_lengths(call: Call, order: str) -> None:
    view = _view(call)
    if not view.positions_matter:
        return
    length, length_k = view.seqlen_q, view.seqlen_k
    if length != length_k:
        raise ValueError(
            "q and k must have the same length where causal, window_size or alibi_slopes is given, "
            f"got {length} and {length_k}"
        )
    if order == "zigzag" and length % 2:
        raise ValueError(f"q's length must be even in zigzag order (two chunks a rank), got {length}")


def _facts(call: Call | None, order: str) -> dict[str, float]:
    """What all ranks must agree on; zeros where this rank's arguments are wrong."""
    types = ", ".join(f"{at}: {dtype}" for at, dtype in enumerate(TYPES))
    names = (
        "B", "Sk, the length of k", "H", "Hk", "D", "Dv", f"q's type ({types})", "window_left",
        "window_right (causal: 0)", "softmax_scale", "softcap", f"order (an index of {parts.ORDERS})",
        "whether there are sinks", "whether there are alibi_slopes", "whether a gradient is needed",
    )  # fmt: skip
    if call is None:
        return dict.fromkeys(names, 0.0)
    batch, length, nheads_k, head_dim = call.k.shape
    requires_grad = any(x is not None and x.requires_grad for x in _tensors(call))
    values = (
        batch, length, call.q.shape[2], nheads_k, head_dim, call.v.shape[3], TYPES.index(call.q.dtype),
        call.window_left, call.window_right, call.softmax_scale, call.softcap, parts.ORDERS.index(order),
        call.sinks is not None, call.alibi_slopes is not None, requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return dict(zip(names, map(float, values), strict=True))


class _Ring(NamedTuple):
    """How the visitors come to this rank."""

    ranks: Ranks
    order: str

    def steps(self, call: Call) -> int:
        return parts.steps(self.order, self.ranks.size, _view(call))

    def parts(self, call: Call, step: int) -> tuple[parts.Part, ...]:
        _, rank, size = self.ranks
        return parts.parts(self.order, rank, (rank - step) % size, size, _view(call))


def _view(call: Call) -> parts.View:
    lengths = call.q.shape[1], call.k.shape[1]
    return parts.View(*lengths, call.window_left, call.window_right, call.alibi_slopes is not None)


def _tensors(call: Call) -> tuple[Tensor | None, ...]:
    return call.q, call.k, call.v, call.sinks, call.alibi_slopes


def _call_of(tensors: Sequence[Any], numbers: tuple[Any, ...]) -> Call:
    q, k, v, sinks, alibi_slopes = tensors
    return Call(q, k, v, None, None, alibi_slopes, sinks, None, *numbers)


def _of_part(call: Call, part: parts.Part, k: Tensor, v: Tensor) -> Call:
    """The op's call for this part; sinks are counted once, with a query's own position.

    The op's ALiBi knows no shift. But within a part that is not one's own all keys stand on one side, so
    |i - j + shift| is a term of the query, which `_alibi_of_queries` brings in, and one of the key, a bias.
    """
    slopes, bias = _slopes(call, part), None
    if slopes is not None:
        keys = part.keys.stop - part.keys.start
        bias = slopes.unsqueeze(-1) * torch.arange(1 - keys, 1, device=k.device)  # [B, H, 1, keys]
    return call._replace(
        bias=bias,
        alibi_slopes=call.alibi_slopes if part.own else None,
        q=call.q[:, part.queries],
        k=k[:, part.keys],
        v=v[:, part.keys],
        sinks=call.sinks if part.own else None,
        window_left=part.window_left,
        window_right=part.window_right,
    )


def _alibi_of_queries(call: Call, part: parts.Part) -> Tensor | float:
    """What every score of a query is below what the op makes of it: float64 [B, H, queries]."""
    slopes = _slopes(call, part)
    if slopes is None:
        return 0.0
    queries, keys = part.queries.stop - part.queries.start, part.keys.stop - part.keys.start
    distance = torch.arange(queries, dtype=torch.float64, device=slopes.device) + (part.shift - keys + 1)
    return torch.mul(slopes, distance)


def _slopes(call: Call, part: parts.Part) -> Tensor | None:
    """[B, H, 1], below 0 where the keys stand behind the queries. The op takes care of one's own part."""
    if call.alibi_slopes is None or part.own:
        return None
    return call.alibi_slopes.unsqueeze(-1) * (1.0 if part.shift > 0 else -1.0)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Both as one message."""
    return torch.cat([k.flatten(), v.flatten()])


def _unpacked(message: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    k, v = message.split([call.k.numel(), call.v.numel()])
    return k.view(call.k.shape), v.view(call.v.shape)


class _RingAttention(torch.autograd.Function):
    """Inputs: the tensors of a call, the numbers that it ends with, the ring and the backend."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, numbers, ring, backend = args
        call = _call_of(tensors, numbers)
        wide = torch.promote_types(call.q.dtype, torch.float32)
        batch, seqlen_q, nheads, _ = call.q.shape
        out = call.q.new_zeros((batch, seqlen_q, nheads, call.v.shape[3]), dtype=wide)
        lse = call.q.new_full((batch, nheads, seqlen_q), -math.inf, dtype=torch.float64)
        message, steps = _packed(call.k, call.v), ring.steps(call)
        for step in range(steps):
            passing = Passing(message, ring.ranks) if step + 1 < steps else None
            k, v = _unpacked(message, call)
            for part in ring.parts(call, step):
                rows = part.queries
                part_out, part_lse = _part_fwd(_of_part(call, part, k, v), backend)
                part_lse -= _alibi_of_queries(call, part)
                out[:, rows], lse[..., rows] = merge_attention_states(
                    out[:, rows], lse[..., rows], part_out, part_lse
                )
            if passing is not None:
                message = passing.wait()
        out, rounded = out.to(call.q.dtype), lse.to(wide)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.numbers, ctx.ring, ctx.backend = numbers, ring, backend
        return out, rounded

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise NotImplementedError("fastattn.distributed.ring_attention has no second derivative")
        *tensors, out, lse = ctx.saved_tensors
        call, ring = _call_of(tensors, ctx.numbers), ctx.ring
        wide = torch.promote_types(call.q.dtype, torch.float32)
        dq = torch.zeros(call.q.shape, dtype=wide, device=dout.device)
        dsinks = None if call.sinks is None else torch.zeros_like(call.sinks, dtype=wide)
        message, steps = _packed(call.k, call.v), ring.steps(call)
        on_the_way = None  # gradients of the next visitor's k and v, as far as its hosts have added to them
        for step in range(steps):
            passing = Passing(message, ring.ranks) if step + 1 < steps else None
            k, v = _unpacked(message, call)
            gradients = torch.zeros_like(message, dtype=wide)
            dk, dv = _unpacked(gradients, call)
            for part in ring.parts(call, step):
                rows, keys = part.queries, part.keys
                saved = (dout[:, rows], dlse[..., rows], out[:, rows])
                part_lse = lse[..., rows] + _alibi_of_queries(call, part)
                found = _part_bwd(saved, part_lse, _of_part(call, part, k, v), ctx.backend)
                for total, x in zip((dq[:, rows], dk[:, keys], dv[:, keys]), found[:3], strict=True):
                    total += x
                if part.own and dsinks is not None:
                    dsinks += found[3]
            if on_the_way is not None:
                gradients += on_the_way.wait()
            # The visitor goes on; in the end what it has gathered goes home.
            on_the_way = Passing(gradients, ring.ranks, 1 if step + 1 < steps else -step)
            if passing is not None:
                message = passing.wait()
        assert on_the_way is not None
        dk, dv = (x.to(call.q.dtype) for x in _unpacked(on_the_way.wait(), call))
        if dsinks is not None and call.sinks is not None:
            dsinks = dsinks.to(call.sinks.dtype)
        return dq.to(call.q.dtype), dk, dv, dsinks, *[None] * 4


def _part_fwd(call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """out, and lse before it was rounded, in float64."""
    if backend == dispatch.REFERENCE:
        out, lse = attention_reference(call)
        return out, lse.double()
    out, lse, rest = torch.ops.fastattn.attention_fwd(*call, backend)
    return out, lse.double() + rest.double() * math.log(2.0)


def _part_bwd(rows: Sequence[Tensor], lse: Tensor, call: Call, backend: str) -> tuple[Tensor, ...]:
    """dq, dk, dv and dsinks of one part, whose weights are e^(score - lse), with lse over all keys.

    Args:
        rows: dout, dlse and out of its queries.
        lse: of its queries, in float64.
    """
    if backend == dispatch.REFERENCE:
        return _part_bwd_reference(rows, lse, call)
    rounded = lse.float()
    # In units of log2, as the op wants it: what rounding took.
    rest = ((lse - rounded) / math.log(2.0)).masked_fill(rounded == -math.inf, 0.0).float()
    dout, dlse, out = (x.contiguous() for x in rows)
    dq, dk, dv, _, dsinks = torch.ops.fastattn.attention_bwd(
        dout, dlse, out, rounded, rest, *call, False, backend
    )
    return dq, dk, dv, dsinks


def _part_bwd_reference(rows: Sequence[Tensor], lse: Tensor, call: Call) -> tuple[Tensor, ...]:
    """The same in plain PyTorch, through the part's own softmax and its share of the whole one.

    out is the sum of share * out of the parts, share = e^(lse of the part - lse), so that
    share * dout . (out of the part - out) comes in for the part's lse.
    """
    dout, dlse, out = rows
    leaves = [x.detach().requires_grad_() for x in (*call[:3], call.sinks) if x is not None]
    q, k, v, *sinks = leaves
    with torch.enable_grad():
        given = call._replace(q=q, k=k, v=v, sinks=sinks[0] if sinks else None)
        part_out, part_lse = attention_reference(given)
    share = torch.exp(part_lse.detach() - lse).masked_fill(lse == -math.inf, 0.0).to(part_lse.dtype)
    dshare = (dout * (part_out.detach() - out)).sum(dim=-1, dtype=share.dtype).transpose(1, 2) + dlse
    dpart_out = (dout * share.transpose(1, 2).unsqueeze(-1)).to(part_out.dtype)
    return torch.autograd.grad(
        (part_out, part_lse), leaves, (dpart_out, share * dshare), materialize_grads=True
    )
