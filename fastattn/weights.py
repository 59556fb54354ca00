"""The attention weights of chosen heads and queries, for looking at: plain PyTorch, block by block."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ops.attention import Call, check, weights_reference

# Scores that are held at a time, beside the result; never less than one query's.
_BLOCK = 2**20


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    heads: int | slice | Sequence[int] | None = None,
    rows: int | slice | Sequence[int] | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The weights that `attention` gives to the keys, for some of its heads and queries.

    Only what is asked for is computed and stored. Every query's weights add up to 1: less what its sink
    takes, and 0 where it sees no key. No gradient is recorded, and there is no dropout.

    Shapes:
        q [B, Sq, H, D], k [B, Sk, Hk, D] -> [B, len(heads), len(rows), Sk]; the options as in `attention`.
    Types:
        q and k share one of float32, bfloat16, float16, float64. All arithmetic is in float32, and so is the
        result; for float64 both are in float64. Autocast changes nothing.
    Args:
        heads: which query heads, in the order of the result: a slice, or integers, which may be negative;
            an int is a list of one. Default: all.
        rows: which queries, in the same way. Default: all.
        causal, window_size, softmax_scale, softcap, alibi_slopes, mask, bias, sinks: as in `attention`;
            a query stands where it stands among all Sq, whichever of them are asked for.
    Errors:
        Against the reference in float64, at most twice PyTorch's in q's type (testing/compare.py).
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        IndexError: a head or a row is out of range.
    """
    call = check(q, k, k, causal, window_size, softmax_scale, softcap, alibi_slopes, mask, bias, sinks)
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k, nheads_k = k.shape[1:3]
    chosen_heads = _chosen("heads", heads, nheads)
    chosen_rows = torch.tensor(_chosen("rows", rows, seqlen_q), dtype=torch.int64, device=q.device)

    wide = torch.promote_types(q.dtype, torch.float32)
    found = q.new_empty((batch, len(chosen_heads), len(chosen_rows), seqlen_k), dtype=wide)
    step = max(_BLOCK // max(batch * seqlen_k, 1), 1)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for at, head in enumerate(chosen_heads):
            kv_head = head // (nheads // nheads_k)
            keys = k[:, :, kv_head : kv_head + 1].to(wide)  # [B, Sk, 1, D]
            for begin in range(0, len(chosen_rows), step):
                block = chosen_rows[begin : begin + step]
                weights, _ = weights_reference(
                    _part(call, keys, head, block), positions=block + (seqlen_k - seqlen_q)
                )
                found[:, at, begin : begin + step] = weights[:, 0]
    return found


def _part(call: Call, keys: Tensor, head: int, rows: Tensor) -> Call:
    """The call of one head and some queries alone, in the type of its keys."""
    q = call.q[:, :, head : head + 1].index_select(1, rows).to(keys.dtype)
    mask, bias = (x if x is None else _of_scores(x, head, rows) for x in (call.mask, call.bias))
    slopes = call.alibi_slopes
    return call._replace(
        q=q,
        k=keys,
        v=keys,
        mask=mask,
        bias=bias,
        alibi_slopes=None if slopes is None else slopes[:, head : head + 1],
        sinks=None if call.sinks is None else call.sinks[head : head + 1],
    )


def _of_scores(x: Tensor, head: int, rows: Tensor) -> Tensor:
    """The part of a mask or bias, which broadcasts to [B, H, Sq, Sk]."""
    x = x if x.shape[1] == 1 else x[:, head : head + 1]
    return x if x.shape[2] == 1 else x.index_select(2, rows)


def _chosen(name: str, given: int | slice | Sequence[int] | None, size: int) -> list[int]:
    """Which of so many are meant, none of them negative."""
    if given is None or isinstance(given, slice):
        return list(range(size)[given or slice(None)])
    try:
        asked = [operator.index(x) for x in (given if isinstance(given, Sequence) else [given])]
    except TypeError:
        raise TypeError(f"{name} must be an int, a slice or a sequence of ints, got {given!r}") from None
    for x in asked:
        if not -size <= x < size:
            raise IndexError(f"{name} must be in [{-size}, {size}), got {x}")
    return [x % size for x in asked]
