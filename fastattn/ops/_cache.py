"""The key-value cache of attention_decode: what holds it together, and plain PyTorch to read and write it.

A dense cache is [Bc, Smax, Hk, D]; pages are [N, page_size, Hk, D], which a block table [B, max_pages]
strings together. Either may be int8, with one scale for each token and head.
"""

from typing import Any

import torch
from torch import Tensor

from fastattn.ops._checks import TYPES, check_device, check_last_stride, check_tensor

_CACHE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
_WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")


def check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    paged: bool,
    selected: bool,
) -> None:
    """Types and shapes of q and the cache; `selected`: cache_batch_idx says which rows are used.

    Good input passes one condition; the rest finds out what is wrong.
    """
    is_tensor = isinstance(q, Tensor) and isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor)
    if not (is_tensor and q.ndim == k_cache.ndim == v_cache.ndim == 4):
        raise _cache_error(q, k_cache, v_cache, paged)
    batch, _, nheads, head_dim = q.shape
    rows, size, nheads_k, head_dim_k = k_cache.shape
    rows_v, size_v, nheads_v, head_dim_v = v_cache.shape
    if not (
        head_dim == head_dim_k > 0
        and head_dim_v > 0
        and rows == rows_v
        and size == size_v
        and nheads_k == nheads_v
        and (nheads == nheads_k or (nheads_k and nheads % nheads_k == 0))
        and (size > 0 if paged else selected or rows == batch)
        and q.dtype in TYPES
        and k_cache.dtype is v_cache.dtype
        and (k_cache.dtype in _CACHE_TYPES or k_cache.dtype is q.dtype is torch.float64)
        and q.device == k_cache.device == v_cache.device
        and (q.stride()[3] == 1 or head_dim == 1)
        and (k_cache.stride()[3] == 1 or head_dim == 1)
        and (v_cache.stride()[3] == 1 or head_dim_v == 1)
    ):
        raise _cache_error(q, k_cache, v_cache, paged)
    is_int8 = k_cache.dtype is torch.int8
    if is_int8 or k_scale is not None or v_scale is not None:
        _check_scales(k_cache, k_scale, v_scale)


def _cache_error(q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: bool) -> Exception:
    layout = "[N, page_size, Hk, {}]" if paged else "[Bc, Smax, Hk, {}]"
    layouts = ("[B, Sq, H, D]", layout.format("D"), layout.format("Dv"))
    for name, x, wanted in zip(("q", "k_cache", "v_cache"), (q, k_cache, v_cache), layouts, strict=True):
        check_tensor(name, x)
        if x.ndim != 4:
            return ValueError(f"{name} must have 4 dimensions {wanted}, got shape {list(x.shape)}")
        check_device(name, x, q)
        check_last_stride(name, x)
    if q.dtype not in TYPES:
        return TypeError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if k_cache.dtype is not v_cache.dtype:
        return TypeError(f"k_cache and v_cache must share one type, got {k_cache.dtype} and {v_cache.dtype}")
    if k_cache.dtype not in _CACHE_TYPES and not k_cache.dtype is q.dtype is torch.float64:
        return TypeError(f"k_cache must be float32, bfloat16, float16 or int8, got {k_cache.dtype}")
    if k_cache.shape[:3] != v_cache.shape[:3]:
        return ValueError(
            f"k_cache and v_cache must share {layout[:-5]}], "
            f"got {list(k_cache.shape[:3])} and {list(v_cache.shape[:3])}"
        )
    batch, _, nheads, head_dim = q.shape
    rows, size, nheads_k, head_dim_k = k_cache.shape
    if head_dim != head_dim_k:
        return ValueError(f"q and k_cache must share the head dim D, got {head_dim} and {head_dim_k}")
    if not (head_dim and v_cache.shape[3]):
        return ValueError(f"head dims must be at least 1, got D {head_dim} and Dv {v_cache.shape[3]}")
    if nheads != nheads_k and (not nheads_k or nheads % nheads_k):
        return ValueError(f"H must be a multiple of Hk, got H {nheads} (q) and Hk {nheads_k} (k_cache)")
    if paged and not size:
        return ValueError("page_size, the second size of k_cache, must be at least 1, got 0")
    return ValueError(
        f"k_cache must have one row for each of the B = {batch} sequences of q, got {rows}; "
        "cache_batch_idx may select rows, block_table pages"
    )


def _check_scales(k_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) is not (k_cache.dtype is torch.int8):
            given = "None" if scale is None else "a tensor"
            raise ValueError(
                f"{name} must be given with an int8 cache, and only then: "
                f"got {given} with a cache in {k_cache.dtype}"
            )
        if scale is None:
            continue
        check_tensor(name, scale)
        if scale.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, got {scale.dtype}")
        check_device(name, scale, k_cache)
        if scale.shape != k_cache.shape[:3]:
            raise ValueError(
                f"{name} must have the first three sizes of the cache, {list(k_cache.shape[:3])}, "
                f"got shape {list(scale.shape)}"
            )


def check_new(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *scales: Tensor | None
) -> None:
    """What is to be appended, and whether the cache can take it."""
    batch, nheads_k = q.shape[0], k_cache.shape[2]
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check_tensor(name, x)
        if x.dtype is not q.dtype:
            raise TypeError(f"{name} must be in q's type {q.dtype}, got {x.dtype}")
        check_device(name, x, q)
        if x.ndim != 4 or x.shape[0] != batch or x.shape[2] != nheads_k or x.shape[3] != cache.shape[3]:
            raise ValueError(
                f"{name} must have shape [B, Sn, Hk, {'D' if name == 'k' else 'Dv'}] = "
                f"[{batch}, Sn, {nheads_k}, {cache.shape[3]}], got {list(x.shape)}"
            )
        check_last_stride(name, x)
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k and v must share the length Sn, got {k.shape[1]} and {v.shape[1]}")
    for name, memory in zip(_WRITTEN, (k_cache, v_cache, *scales), strict=True):
        if memory is not None and 0 in memory.stride() and _is_expanded(memory):
            raise ValueError(
                f"{name} is written to, so it must not be expanded, got strides {list(memory.stride())}"
            )


def _is_expanded(x: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def check_rotary(cos: Tensor, sin: Tensor, q: Tensor) -> None:
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(name, x)
        if x.dtype is not q.dtype and x.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32 or in q's type {q.dtype}, got {x.dtype}")
        check_device(name, x, q)
        if x.ndim != 2 or not 0 < 2 * x.shape[1] <= q.shape[3]:
            raise ValueError(
                f"{name} must have shape [positions, R / 2] with R in 2 ... D = {q.shape[3]}, "
                f"got {list(x.shape)}"
            )
        check_last_stride(name, x)
    if cos.shape != sin.shape or cos.dtype is not sin.dtype:
        raise ValueError(
            "cos and sin must share shape and type, "
            f"got {list(cos.shape)} {cos.dtype} and {list(sin.shape)} {sin.dtype}"
        )


def check_index(name: str, x: Tensor, q: Tensor, rank: int = 1) -> Tensor:
    """An int32 tensor with one row for each sequence, contiguous where it is [B]."""
    check_tensor(name, x)
    if x.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    check_device(name, x, q)
    batch = q.shape[0]
    if x.ndim != rank or x.shape[0] != batch:
        layout = f"[B] = [{batch}]" if rank == 1 else f"[B, max_pages] = [{batch}, max_pages]"
        raise ValueError(f"{name} must have shape {layout}, got {list(x.shape)}")
    if rank == 1:
        return x.contiguous()
    check_last_stride(name, x)
    return x


def check_values(call: Any) -> None:
    """Looks at what the index tensors hold, where that needs no waiting: on the CPU."""
    if call.cache_seqlens.device.type != "cpu" or not call.q.shape[0]:
        return
    lengths: list[int] = call.cache_seqlens.tolist()
    new = 0 if call.k is None else call.k.shape[1]
    paged = call.block_table is not None
    pages = call.block_table.shape[1] if paged else 1
    capacity = pages * call.k_cache.shape[1]
    longest = max(lengths)
    if min(lengths) < 0 or longest + new > capacity:
        b, length = next((b, n) for b, n in enumerate(lengths) if n < 0 or n + new > capacity)
        room = f"max_pages * page_size = {pages} * {call.k_cache.shape[1]}" if paged else f"Smax = {capacity}"
        appended = f" - {new} appended" if new else ""
        raise ValueError(f"cache_seqlens must be in 0 ... {room}{appended}, got {length} (sequence {b})")
    if call.cos is not None:
        queries = call.q.shape[1] if call.rotate_in_steps else min(call.q.shape[1], 1)
        positions = longest + max(new, queries)
        if positions > call.cos.shape[0]:
            raise ValueError(f"cos and sin must hold {positions} positions or more, got {call.cos.shape[0]}")
    if call.cache_leftpad is not None and min(call.cache_leftpad.tolist()) < 0:
        raise ValueError(f"cache_leftpad must be at least 0, got {call.cache_leftpad.tolist()}")
    if call.cache_batch_idx is not None:
        _check_rows(call.cache_batch_idx.tolist(), call.k_cache.shape[0], new)
    if paged:
        _check_pages(call, lengths, new)


def _check_rows(rows: list[int], count: int, new: int) -> None:
    if min(rows) < 0 or max(rows) >= count:
        wrong = next(row for row in rows if not 0 <= row < count)
        raise ValueError(f"cache_batch_idx must be in 0 ... {count - 1}, the rows of k_cache, got {wrong}")
    if new and len(set(rows)) < len(rows):
        row = next(row for row in rows if rows.count(row) > 1)
        raise ValueError(f"cache_batch_idx must not let two sequences append to one row, got {row} twice")


def _check_pages(call: Any, lengths: list[int], new: int) -> None:
    table, (count, page_size) = call.block_table, call.k_cache.shape[:2]
    used = -(-(max(lengths) + new) // page_size)
    if not used:
        return
    low, high = torch.aminmax(table[:, :used])
    if int(low) < 0 or int(high) >= count:
        # Perhaps only entries that shorter sequences do not use.
        for b, length in enumerate(lengths):
            for at, page in enumerate(table[b, : -(-(length + new) // page_size)].tolist()):
                if not 0 <= page < count:
                    raise ValueError(
                        f"block_table must hold pages in 0 ... {count - 1}, got {page} at [{b}, {at}]"
                    )
    if not new:
        return
    width = table.shape[1]
    written_at = [
        b * width + at
        for b, length in enumerate(lengths)
        for at in range(length // page_size, (length + new - 1) // page_size + 1)
    ]
    if len(written_at) == 1:
        return
    written = table.take(torch.tensor(written_at)).tolist()
    if len(set(written)) < len(written):
        page = next(page for page in written if written.count(page) > 1)
        raise ValueError(f"block_table must not let two sequences append to one page, got page {page} twice")


def slots(call: Any, b: int, first: int, last: int) -> tuple[Any, Any]:
    """Where the cache holds tokens first to last of sequence b: an index of its first two dimensions."""
    if call.block_table is None:
        return (b if call.cache_batch_idx is None else int(call.cache_batch_idx[b])), slice(first, last)
    tokens = torch.arange(first, last, device=call.block_table.device)
    page_size = call.k_cache.shape[1]
    return call.block_table[b, tokens // page_size].long(), tokens % page_size


def append(call: Any) -> None:
    """Writes k and v, rotated where there are tables, behind what the cache holds."""
    k, new = call.k, call.k.shape[1]
    if call.cos is not None:
        positions = call.cache_seqlens[:, None] + torch.arange(new, device=k.device)
        k = rotate(k, call.cos, call.sin, positions, call.interleaved)
    for b, length in enumerate(call.cache_seqlens.tolist()):
        index = slots(call, b, length, length + new)
        if call.k_scale is None:
            call.k_cache[index] = k[b].to(call.k_cache.dtype)
            call.v_cache[index] = call.v[b].to(call.v_cache.dtype)
        else:
            call.k_cache[index], call.k_scale[index] = quantize(k[b])
            call.v_cache[index], call.v_scale[index] = quantize(call.v[b])


def read(cache: Tensor, scale: Tensor | None, index: tuple[Any, Any], dtype: torch.dtype) -> Tensor:
    """What the cache holds at `slots`, [S, Hk, D], in a type."""
    x = cache[index]
    if scale is None:
        return x.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) * scale[index][..., None].to(wide)).to(dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8, and its float32 scale [...]: the largest of |x|, over 127."""
    x = x.float()
    scale = x.abs().amax(dim=-1) / 127
    steps = torch.where(scale[..., None] > 0, x / scale[..., None], 0.0)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] turned by the angles of positions [B, S]: in pairs of neighbours, or of halves."""
    wide = x if x.dtype is torch.float64 else x.float()
    c, s = (table[positions.long()][:, :, None].to(wide.dtype) for table in (cos, sin))
    half = cos.shape[1]
    turned, rest = wide.split([2 * half, wide.shape[3] - 2 * half], dim=-1)
    if interleaved:
        x0, x1 = turned.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack([x0 * c - x1 * s, x1 * c + x0 * s], dim=-1).flatten(-2)
    else:
        x0, x1 = turned.chunk(2, dim=-1)
        turned = torch.cat([x0 * c - x1 * s, x1 * c + x0 * s], dim=-1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)
