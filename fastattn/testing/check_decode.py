"""One call of attention_decode held against the error rule: what it writes, leaves alone and returns."""

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import attention_decode, dispatch
from fastattn.ops import _cache
from fastattn.ops.attention_decode import Call, check
from fastattn.testing.check import PACKED_OPTION_SETS, packed_option_set
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import qkv

DECODE_OPTION_SETS = tuple(name for name in PACKED_OPTION_SETS if name != "dropout")
_WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")


def decode_option_set(name: str, q: Tensor) -> dict[str, Any]:
    """The keyword arguments of one option set that fit q [B, Sq, H, D]."""
    options = packed_option_set(name, q, q.shape[0])
    return {key: x for key, x in options.items() if key not in ("dropout_p", "seed")}


def decode_inputs(
    seqlens: list[int],
    nheads: int,
    nheads_k: int,
    seqlen_q: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    new: int | None = None,
    page_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    rotary_dim: int = 0,
    select: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of attention_decode, with NaN wherever no key or value stands.

    Args:
        seqlens: keys in the cache, for each sequence.
        new: keys to append; None: no k and v are given.
        page_size: None: a dense cache. Else shuffled pages, some of them nobody's, and a block table
            whose unused entries are no page at all.
        cache_dtype: q's type where None.
        rotary_dim: 0: no rotary tables.
        select: a dense cache has more rows than there are sequences, and cache_batch_idx chooses.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(seqlens), max(seqlens, default=0)
    size = longest + (new or 0) + 3
    q, keys, values = qkv(
        batch, nheads, nheads_k, seqlen_q, size, head_dim, head_dim_v, dtype=dtype, seed=seed
    )
    given: dict[str, Any] = {"q": q, "cache_seqlens": torch.tensor(seqlens, dtype=torch.int32)}
    if new is not None:
        given["k"], given["v"] = (x[:, :new].flip(3) for x in (keys, values))
    for x in (keys, values):
        for b, length in enumerate(seqlens):
            x[b, length:] = math.nan
    tensors = {"k_cache": keys, "v_cache": values}
    if cache_dtype is torch.int8:
        (tensors["k_cache"], tensors["k_scale"]), (tensors["v_cache"], tensors["v_scale"]) = (
            _cache.quantize(x) for x in (keys, values)
        )
    elif cache_dtype is not None:
        tensors = {name: x.to(cache_dtype) for name, x in tensors.items()}

    if page_size is not None:
        counts = [-(-(length + (new or 0)) // page_size) for length in seqlens]
        order = torch.randperm(sum(counts) + 2, generator=generator)
        table = torch.full((batch, max(counts, default=0) + 1), -7, dtype=torch.int32)
        table[:, -1] = 10**6
        for b, count in enumerate(counts):
            table[b, :count] = order[sum(counts[:b]) :][:count]
        given["block_table"] = table
        tensors = {name: _paged(x, table, counts, page_size, len(order)) for name, x in tensors.items()}
    elif select:
        rows = torch.randperm(batch + 2, generator=generator)
        given["cache_batch_idx"] = rows[:batch].int()
        tensors = {name: torch.cat([x, x[:1].expand(2, *x.shape[1:])])[rows.argsort()] if batch else x
                   for name, x in tensors.items()}  # fmt: skip
    if rotary_dim:
        positions = torch.arange(longest + max(new or 0, seqlen_q, 1))
        frequencies = 100.0 ** -torch.linspace(0, 1, rotary_dim // 2 + 1)[:-1]
        angles = positions[:, None] * frequencies
        given["cos"], given["sin"] = angles.cos(), angles.sin()
    return given | tensors


def _paged(x: Tensor, table: Tensor, counts: list[int], page_size: int, pages: int) -> Tensor:
    """The same cache [B, S, ...], cut into pages that stand where the table says."""
    empty = x.new_full((pages, page_size, *x.shape[2:]), math.nan if x.is_floating_point() else 77)
    for b, count in enumerate(counts):
        for at in range(count):
            part = x[b, at * page_size : (at + 1) * page_size]
            empty[table[b, at], : part.shape[0]] = part
    return empty


def check_decode(*, backend: str, **given: Any) -> None:
    """Raises AssertionError where what is written, out or lse breaks the error rule.

    What is attended is judged by the keys that the call itself has written. `given` stays as it is.
    """
    ours, base = twins(given), twins(given)
    call = check(**base)
    out, lse = attention_decode(**ours, return_lse=True, backend=backend)
    attention_decode(**base, backend=dispatch.REFERENCE)
    if call.k is not None:
        _check_append(call, ours)
    base_out, base_lse = _attend(call, ours, call.q)
    true_out, true_lse = _attend(call, ours, call.q.double())
    assert_close(out, base_out, true_out, "out", call.q.dtype)
    assert_close(lse, base_lse, true_lse, "lse", call.q.dtype)
    if call.k is not None:
        for index in _written(call):
            for name in _WRITTEN:
                if ours.get(name) is not None:
                    ours[name][index] = base[name][index]
    for name, x in ours.items():
        if isinstance(x, Tensor):
            assert same_bytes(x, base[name]), f"{name} was changed where nothing is appended"


def twins(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in memory of their own, with all that lies between and around the elements."""
    memory: dict[int, torch.UntypedStorage] = {}

    def twin(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        copy = memory.setdefault(storage.data_ptr(), storage.clone())
        return x.new_empty(0).set_(copy, x.storage_offset(), x.shape, x.stride())

    return {name: twin(x) for name, x in given.items()}


def same_bytes(x: Tensor, y: Tensor) -> bool:
    """Whether the memory of two twins is the same, NaN and all that lies around them included."""
    mine, theirs = (torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()) for t in (x, y))
    return torch.equal(mine, theirs)


def _written(call: Call) -> list[tuple[Any, Any]]:
    assert call.k is not None
    new = call.k.shape[1]
    return [_cache.slots(call, b, n, n + new) for b, n in enumerate(call.cache_seqlens.tolist())]


def _check_append(call: Call, ours: dict[str, Any]) -> None:
    """Holds what was appended against `call`, whose cache the reference has written to."""
    assert call.k is not None and call.v is not None
    k = call.k.double()
    if call.cos is not None and call.sin is not None:
        positions = call.cache_seqlens[:, None] + torch.arange(k.shape[1])
        k = _cache.rotate(k, call.cos, call.sin, positions, call.interleaved)
    for b, index in enumerate(_written(call)):
        for name, true in (("k", k[b]), ("v", call.v[b].double())):
            cache, scale = getattr(call, f"{name}_cache"), getattr(call, f"{name}_scale")
            mine: Tensor = ours[f"{name}_cache"]
            my_scale: Any = ours.get(f"{name}_scale")
            if name == "v" or call.cos is None:
                assert torch.equal(mine[index], cache[index]), f"{name}_cache"
                assert scale is None or torch.equal(my_scale[index], scale[index]), f"{name}_scale"
            if scale is not None:
                assert_close(
                    my_scale[index], scale[index], true.abs().amax(-1) / 127, f"{name}_scale", call.q.dtype
                )
            found, base = (
                _cache.read(x, s, index, torch.float32) for x, s in ((mine, my_scale), (cache, scale))
            )
            assert_close(found, base, true, f"{name}_cache", call.q.dtype)


def _attend(call: Call, ours: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
    """The reference in q's type, over the cache as our own call has left it."""
    wide = q.dtype is torch.float64
    new = 0 if call.k is None else call.k.shape[1]
    if call.cos is not None and call.sin is not None:
        positions = call.cache_seqlens[:, None] + torch.arange(q.shape[1]) * call.rotate_in_steps
        q = _cache.rotate(q, call.cos, call.sin, positions, call.interleaved)
    caches = [
        ours[name].double() if wide and ours[name].is_floating_point() else ours[name]
        for name in _WRITTEN[:2]
    ]
    out, lse = attention_decode(
        q,
        *caches,
        cache_seqlens=call.cache_seqlens + new,
        block_table=call.block_table,
        cache_batch_idx=call.cache_batch_idx,
        cache_leftpad=call.cache_leftpad,
        k_scale=ours.get("k_scale"),
        v_scale=ours.get("v_scale"),
        window_size=(call.window_left, call.window_right),
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks.double() if wide and call.sinks is not None else call.sinks,
        return_lse=True,
        backend=dispatch.REFERENCE,
    )
    return out, lse
