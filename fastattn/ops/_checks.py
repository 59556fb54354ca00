"""Argument checks that ops share. Each names the argument, what was given and what is allowed."""

import math
import operator

import torch
from torch import Tensor

from fastattn import dropout

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_type(name: str, x: Tensor, q: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype is not q.dtype and x.dtype is not torch.float32:
        raise TypeError(f"{name} must be in q's type {q.dtype} or float32, got {x.dtype}")


def check_seed(seed: int | Tensor | None) -> Tensor:
    if seed is None:
        return dropout.draw_seed()
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.ndim != 0:
            raise TypeError(f"seed must be an int64 tensor of shape [], got {seed.dtype} {list(seed.shape)}")
        return seed
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor of shape [], got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    return torch.tensor(seed, dtype=torch.int64)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Returns (B, H, Sq, Sk). Good input passes one condition; the rest finds out what is wrong."""
    is_tensor = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if is_tensor and len(sizes := q.shape) == len(sizes_k := k.shape) == len(sizes_v := v.shape) == 4:
        batch, seqlen_q, nheads, head_dim = sizes
        batch_k, seqlen_k, nheads_k, head_dim_k = sizes_k
        batch_v, seqlen_v, nheads_v, head_dim_v = sizes_v
        if (
            batch == batch_k == batch_v
            and seqlen_k == seqlen_v
            and nheads_k == nheads_v
            and (nheads == nheads_k or (nheads_k and nheads % nheads_k == 0))
            and head_dim == head_dim_k > 0
            and head_dim_v > 0
            and (dtype := q.dtype) is k.dtype is v.dtype
            and dtype in TYPES
            and q.device == k.device == v.device
            and (q.stride()[3] == 1 or head_dim == 1)
            and (k.stride()[3] == 1 or head_dim == 1)
            and (v.stride()[3] == 1 or head_dim_v == 1)
        ):
            return batch, nheads, seqlen_q, seqlen_k
    raise _qkv_error(q, k, v)


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int]:
    """Returns (Tq, H, Tk) of packed sequences."""
    is_tensor = isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
    if is_tensor and q.ndim == k.ndim == v.ndim == 3:
        total_q, nheads, head_dim = q.shape
        total_k, nheads_k, head_dim_k = k.shape
        total_v, nheads_v, head_dim_v = v.shape
        if (
            total_k == total_v
            and nheads_k == nheads_v
            and (nheads == nheads_k or (nheads_k and nheads % nheads_k == 0))
            and head_dim == head_dim_k > 0
            and head_dim_v > 0
            and q.dtype is k.dtype is v.dtype
            and q.dtype in TYPES
            and q.device == k.device == v.device
            and (q.stride()[2] == 1 or head_dim == 1)
            and (k.stride()[2] == 1 or head_dim == 1)
            and (v.stride()[2] == 1 or head_dim_v == 1)
        ):
            return total_q, nheads, total_k
    raise _qkv_error(q, k, v, packed=True)


def _qkv_error(q: Tensor, k: Tensor, v: Tensor, packed: bool = False) -> Exception:
    rank, length = (3, "Tk") if packed else (4, "Sk")
    layouts = ("[Tq, H, D]", "[Tk, Hk, D]") if packed else ("[B, Sq, H, D]", "[B, Sk, Hk, D]")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.ndim != rank:
            layout = layouts[name != "q"]
            return ValueError(f"{name} must have {rank} dimensions {layout}, got shape {list(x.shape)}")
        if x.dtype is not q.dtype:
            return TypeError(f"q, k and v must share one type, got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            return ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
        check_last_stride(name, x)
    if q.dtype not in TYPES:
        return TypeError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    *batches, lengths, heads, dims = zip(q.shape, k.shape, v.shape, strict=True)
    if batches and len(set(batches[0])) > 1:
        return ValueError(f"q, k and v must share the batch size B, got {batches[0]}")
    if dims[0] != dims[1]:
        return ValueError(f"q and k must share the head dim D, got {dims[0]} and {dims[1]}")
    if 0 in dims:
        return ValueError(f"head dims must be at least 1, got D {dims[0]} and Dv {dims[2]}")
    if lengths[1] != lengths[2]:
        return ValueError(f"k and v must share the length {length}, got {lengths[1]} and {lengths[2]}")
    if heads[1] != heads[2]:
        return ValueError(f"k and v must share the number of heads Hk, got {heads[1]} and {heads[2]}")
    return ValueError(f"H must be a multiple of Hk, got H {heads[0]} (q) and Hk {heads[1]} (k, v)")


def check_last_stride(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"the last stride of {name} must be 1, got strides {list(x.stride())}; "
            f"{name}.contiguous() makes it so"
        )


def check_scores(name: str, x: Tensor, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A tensor that broadcasts to the scores, in rank 4."""
    check_device(name, x, q)
    batch, nheads, seqlen_q, seqlen_k = shape
    full = x if x.ndim >= 4 else x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))
    sizes = full.shape
    if (
        len(sizes) > 4
        or sizes[0] not in (1, batch)
        or sizes[1] not in (1, nheads)
        or sizes[2] not in (1, seqlen_q)
        or sizes[3] not in (1, seqlen_k)
    ):
        raise ValueError(
            f"{name} must broadcast to [B, H, Sq, Sk] = "
            f"[{batch}, {nheads}, {seqlen_q}, {seqlen_k}], got shape {list(x.shape)}"
        )
    if sizes[3] > 1 and full.stride()[3] != 1:
        # Only a key dimension that is not laid out row by row is copied; broadcasts never are, except
        # where each position has a gradient of its own.
        if not full.requires_grad:
            full = full[tuple(slice(1) if stride == 0 else slice(None) for stride in full.stride())]
        full = full.contiguous()
    return full


def check_alibi(slopes: Tensor, q: Tensor, batch: int, nheads: int) -> Tensor:
    """The slopes as [B, H], batch stride 0 where all sequences share them."""
    check_tensor("alibi_slopes", slopes)
    if slopes.dtype is not torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {slopes.dtype}")
    check_device("alibi_slopes", slopes, q)
    if tuple(slopes.shape) not in ((nheads,), (batch, nheads)):
        raise ValueError(
            f"alibi_slopes must have shape [H] = [{nheads}] or [B, H] = [{batch}, {nheads}], "
            f"got {list(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes must not require a gradient; a bias can be learned instead")
    return slopes.expand(batch, nheads)


def check_sinks(sinks: Tensor, q: Tensor, nheads: int) -> None:
    check_type("sinks", sinks, q)
    check_device("sinks", sinks, q)
    if tuple(sinks.shape) != (nheads,):
        raise ValueError(f"sinks must have shape [H] = [{nheads}], got {list(sinks.shape)}")


def check_numbers(
    head_dim: int,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float = 0.0,
) -> tuple[float, int, int]:
    """Returns (softmax_scale, window_left, window_right)."""
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(head_dim)
    elif not 0.0 <= softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be finite and at least 0, got {softmax_scale}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be finite and at least 0 (0 = none), got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if window_size == (-1, -1):
        return softmax_scale, -1, (0 if causal else -1)
    try:
        left, right = (operator.index(side) for side in window_size)
    except (TypeError, ValueError):
        left = right = -2
    if left < -1 or right < -1:
        raise ValueError(f"window_size must be two integers >= -1 (-1 = unbounded), got {window_size}")
    return softmax_scale, left, (0 if causal else right)


def autocast(x: Tensor) -> Tensor:
    """What torch's autocast does to the inputs of a matrix product: float64 and integers stay."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
