"""attn_implementation="fastattn" for transformers: an attention function, and the mask function it needs.

The mask function makes the mask, once for all layers; the attention function of each layer obeys:

    None                 all keys; causal, aligned at the end, where the layer says it is causal
    int32 [B, 1, 1, 5]   bounds, rows of (first key, one past the last, place of query 0, left, right)
    bool                 True = attend
    float                added to the scores

Bounds stand for padding, for a cache that is longer than what was written to it and for a sliding
window (left, right), where transformers would build a [B, 1, Sq, Sk]. They become slices of K and V,
a window, and at most a mask [B, 1, 1, Sk].
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastattn.integrations.sdpa import unit_stride
from fastattn.ops.attention import attention

NAME = "fastattn"

# Calls by id(layer): counting must cost next to nothing. A count is only ever read as a difference
# while the layer lives, so that an id used again does no harm.
calls: Counter[int] = Counter()

# Models that join their own mask to the one they are given: they need it written out.
_WRITTEN_OUT = ("blt", "deepseek_v4", "doge", "qwen4_exp")

# transformers reads meaning into these parts of a name: it would load a kernel or check the model.
_TAKEN = ("flash", "sdpa", "flex_attention", "eager", "paged", "/", "|")


def register(name: str = NAME) -> None:
    """Makes attn_implementation=name known to transformers. Doing it again changes nothing.

    It can then be given to `from_pretrained`, `from_config` and `model.set_attn_implementation`; no
    model is touched by this call.

    Raises:
        ValueError: the name is another's, or holds a part that transformers reads meaning into.
    """
    if not name or any(part in name for part in _TAKEN):
        raise ValueError(f"name must not be empty or contain any of {_TAKEN}, got {name!r}")
    known = AttentionInterface._global_mapping.get(name, fastattn_attention)
    if known is not fastattn_attention:
        raise ValueError(f"name={name!r} is registered already, for {known!r}")
    AttentionInterface.register(name, fastattn_attention)
    AttentionMaskInterface.register(name, fastattn_mask)


def _collector() -> Any:
    """Where transformers notes what the forward pass under way is asked to collect, by name."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return ContextVar("collected", default=None)
    return _active_collector


_collected = _collector()


def fastattn_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = False,
    indices: Any = None,
    block_indices: Any = None,
    sinks: Any = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, called by transformers.

    As under eager, the mask decides what is seen: sliding_window and position_ids, which come along,
    are in it already.

    Shapes:
        query [B, H, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv] -> ([B, Sq, H, Dv], None).
        attention_mask: see the head of this file. position_bias broadcasts to [B, H, Sq, Sk].
        s_aux [H]: sink logits.
    Raises:
        ValueError: what is asked for changes the result and is not supported; says what to do.
    """
    compiling = torch.compiler.is_compiling()
    collected = None if compiling else _collected.get()
    if collected or output_attentions:
        _refuse_weights(collected or (), output_attentions)
    if (
        indices is not None
        or block_indices is not None
        or sinks is not None
        or cache is not None
        or cu_seq_lens_q is not None
    ):
        picked = {"indices": indices, "block_indices": block_indices, "sinks": sinks}
        _refuse(attention_mask, picked, cache, cu_seq_lens_q)
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    mask, bias, window = None, position_bias, (-1, -1)
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if is_causal and seqlen_q > 1:
            window = (-1, 0)
    elif attention_mask.dtype is torch.bool:
        mask = attention_mask
    elif attention_mask.dtype.is_floating_point:
        bias = attention_mask if bias is None else bias + attention_mask
    elif compiling:
        mask = _written_out(_checked(attention_mask), seqlen_q, seqlen_k)
    else:
        plan = getattr(attention_mask, "_fastattn_plan", None)
        if plan is None or plan.seqlens != (seqlen_q, seqlen_k):
            # It came here as a copy, or for other lengths. The next layer finds the plan.
            plan = _plan(attention_mask, _checked(attention_mask).tolist(), seqlen_q, seqlen_k)
            attention_mask._fastattn_plan = plan  # type: ignore[attr-defined]
        mask, window = plan.mask, plan.window
        if plan.keys is not None:
            k, v = k[:, plan.keys], v[:, plan.keys]
            if bias is not None and bias.shape[-1] > 1:
                bias = bias[..., plan.keys]
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if bias is not None and bias.dtype is not q.dtype and bias.dtype is not torch.float32:
        bias = bias.to(q.dtype)
    out = attention(
        q,
        k,
        v,
        window_size=window,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        mask=mask,
        bias=bias,
        sinks=s_aux,
        dropout_p=dropout if dropout and module.training else 0.0,
    )
    if not compiling:
        calls[id(module)] += 1
    return cast(Tensor, out), None


def _refuse_weights(collected: Iterable[str], output_attentions: bool | None) -> None:
    if output_attentions or any("attentions" in name for name in collected):
        raise ValueError(
            "fastattn does not store the attention weights; output_attentions=True needs "
            'attn_implementation="eager"'
        )


def _refuse(mask: Tensor | None, picked: dict[str, Any], cache: Any, cu_seq_lens_q: Tensor | None) -> None:
    """Raises with the reason; returns where the arguments turn out to change nothing."""
    for name, given in picked.items():
        if given is not None:
            raise ValueError(
                f"fastattn does not support {name}, by which this model picks keys or weights as it "
                'runs; attn_implementation="eager" does'
            )
    if cache is not None:
        raise ValueError(
            "fastattn does not support the paged cache of continuous batching; "
            'attn_implementation="sdpa" does'
        )
    # Packed sequences are in the mask if transformers found them in position_ids, and only then.
    if cu_seq_lens_q is not None and mask is None and cu_seq_lens_q.numel() > 2:
        raise ValueError(
            "cu_seq_lens_q says that sequences are packed, but no mask separates them: pass "
            "position_ids that start again at each, attention_mask=None and use_cache=False"
        )


class Plan(NamedTuple):
    """What bounds mean for K and V of one length."""

    seqlens: tuple[int, int]  # (Sq, Sk) that it holds for
    keys: slice | None  # the keys that some query sees; None: all
    window: tuple[int, int]  # around the end-aligned diagonal of these keys
    mask: Tensor | None  # bool [B, 1, 1 or Sq, keys]


def _checked(bounds: Tensor) -> Tensor:
    if bounds.dtype is not torch.int32 or bounds.ndim != 4 or bounds.shape[1:] != (1, 1, 5):
        raise ValueError(
            f"attention_mask must be bool (True = attend) or float (added), got {bounds.dtype} "
            f"{list(bounds.shape)}"
        )
    return bounds[:, 0, 0]


def _plan(bounds: Tensor, rows: list[list[int]], seqlen_q: int, seqlen_k: int) -> Plan:
    """What `bounds`, whose values are `rows`, mean for this many queries and keys."""
    starts, ends, (query_0, *_), (left, *_), (right, *_) = zip(*rows, strict=True)
    first, end = min(starts), max(ends)
    window = (-1, -1)
    if left >= 0:
        first = max(first, query_0 - left)
    if seqlen_q == 1:
        # What a window says of one query, first and end say too.
        end = end if right < 0 else min(end, query_0 + right + 1)
    elif left >= 0 or right >= 0:
        # A window goes by the last key, which must be where the last query stands.
        window, last = (left, right), query_0 + seqlen_q
        if last > seqlen_k or (right > 0 and end > last):
            mask = _written_out(_checked(bounds), seqlen_q, seqlen_k)
            return Plan((seqlen_q, seqlen_k), None, (-1, -1), mask)
        end = last
    first = min(first, end)
    padding: Tensor | None = None
    if max(starts) > first or min(ends) < end:
        places = torch.arange(first, end, dtype=torch.int32, device=bounds.device)
        padding = (places >= bounds[..., 0:1]) & (places < bounds[..., 1:2])
    keys = None if (first, end) == (0, seqlen_k) else slice(first, end)
    return Plan((seqlen_q, seqlen_k), keys, window, padding)


def _written_out(bounds: Tensor, seqlen_q: int, seqlen_k: int) -> Tensor:
    """The bounds [B, 5] as a bool mask [B, 1, Sq, Sk], without reading a value on the host."""
    start, end, query_0, left, right = (x[:, None, None, None] for x in bounds.unbind(-1))
    key = torch.arange(seqlen_k, dtype=torch.int32, device=bounds.device)
    query = query_0 + torch.arange(seqlen_q, dtype=torch.int32, device=bounds.device)[:, None]
    return (
        (key >= start)
        & (key < end)
        & ((left < 0) | (key >= query - left))
        & ((right < 0) | (key <= query + right))
    )


def fastattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **rest: Any,
) -> Tensor | None:
    """The mask of a forward pass, called by transformers once for all layers of a kind.

    Args:
        q_length, kv_length, q_offset, kv_offset: the lengths of queries and keys, and the places of
            the first ones; q_offset is a tensor for a static cache.
        mask_function: says which key a query sees, padding aside.
        attention_mask: bool [B, tokens so far], True = a token and not padding.
        allow_is_causal_skip, allow_is_bidirectional_skip: False where the mask must be written out,
            but the first also while a static cache is decoded.
        use_vmap: mask_function has a part that the user or the model made.
    Returns:
        A mask as the head of this file lists them. It is None or has 4 dimensions: what has 2 would
        be read as padding by the next `create_causal_mask` that it passes through.
    """
    tracing = is_tracing(attention_mask) or (isinstance(q_offset, Tensor) and is_tracing(q_offset))
    window = None if use_vmap else _window(mask_function, tracing)
    if window is None or (config is not None and config.model_type.startswith(_WRITTEN_OUT)):
        free = False
    elif window[1] == 0:
        free = allow_is_causal_skip or (q_length == 1 and isinstance(q_offset, Tensor))
    else:
        free = allow_is_bidirectional_skip
    if free and window == (-1, -1):
        return _padding_only(attention_mask, kv_length, kv_offset, tracing)
    if free and window is not None:
        # Where queries and keys end together and the window reaches all of them, None says it all.
        exact = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
        exact = exact and (window[0] < 0 or window[0] >= kv_length - 1)
        exact = exact and (window[1] <= 0 or window[1] >= kv_length - 1)
        if exact and attention_mask is None:
            return None
        tokens = []
        if not tracing:
            tokens = _tokens(batch_size, kv_length, q_offset, kv_offset, attention_mask)
        if tokens:
            if exact and all(token[:2] == (0, kv_length) for token in tokens):
                return None
            rows = [
                [start, min(end, query_0 + q_length) if window[1] == 0 else end, query_0, *window]
                for start, end, query_0 in tokens
            ]
            bounds = torch.tensor(rows, dtype=torch.int32, device=device)[:, None, None]
            # Travels with the tensor, so that no layer has to read it from the device.
            bounds._fastattn_plan = _plan(bounds, rows, q_length, kv_length)  # type: ignore[attr-defined]
            return bounds
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=cast(int, q_offset),
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        config=config,
        **rest,
    )


def _window(mask_function: Callable[..., Any], tracing: bool) -> tuple[int, int] | None:
    """The window (left, right) around a query's own place, or None for a mask of another shape.

    transformers hands over functions; those for windows are told by the function that made them.
    """
    if mask_function is causal_mask_function:
        return -1, 0
    if mask_function is bidirectional_mask_function:
        return -1, -1
    if tracing:
        return None
    parts = _made_by("and_masks", mask_function).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is causal_mask_function:
        size = _made_by("sliding_window_overlay", parts[0]).get("sliding_window")
        return None if size is None else (size - 1, 0)
    if len(parts) == 2 and parts[1] is bidirectional_mask_function:
        size = _made_by("sliding_window_bidirectional_overlay", parts[0]).get("sliding_window")
        return None if size is None else (size, size)
    return None


def _made_by(maker: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that `function` closes over if this maker of transformers made it; else none."""
    made_here = function.__module__ == causal_mask_function.__module__
    if not (made_here and function.__qualname__.startswith(f"{maker}.<locals>.")):
        return {}
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _padding_only(
    attention_mask: Tensor | None, kv_length: int, kv_offset: int, tracing: bool
) -> Tensor | None:
    """Every query sees every token: None, or bool [B, 1, 1, Sk]."""
    if attention_mask is None:
        return None
    tokens = attention_mask[:, kv_offset : kv_offset + kv_length]
    if tokens.shape[1] < kv_length:
        tokens = torch.nn.functional.pad(tokens, (0, kv_length - tokens.shape[1]))
    if not tracing and bool(tokens.all()):
        return None
    return tokens[:, None, None]


def _tokens(
    batch_size: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
) -> list[tuple[int, int, int]]:
    """(first token, one past the last, place of query 0) of each sequence, counted from kv_offset.

    Empty where a sequence has holes. Reads the device once.
    """
    if attention_mask is None:
        return [(0, kv_length, int(q_offset) - kv_offset)] * batch_size
    tokens = attention_mask[:, kv_offset : kv_offset + kv_length].int()
    query_0 = torch.as_tensor(q_offset, device=tokens.device).expand(tokens.shape[0])
    first, behind_last = tokens.argmax(-1), tokens.flip(-1).argmax(-1)
    rows = []
    found = torch.stack([tokens.sum(-1), first, behind_last, query_0], -1)
    for count, start, behind, place in found.tolist():
        end = tokens.shape[1] - behind if count else start
        if end - start != count:
            return []
        rows.append((start, end, place - kv_offset))
    return rows
