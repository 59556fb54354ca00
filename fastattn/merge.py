"""Attention over two sets of keys, made of the attention over each: split keys, shared prefixes, rings."""

import math

import torch
from torch import Tensor

from fastattn.ops._checks import check_device, check_tensor


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """What `attention` returns for all keys, from what it returned for two parts of them.

    Both parts are of the same queries; their order does not matter. Differentiable. A sink belongs to one
    of the parts.

    Shapes:
        out [B, S, H, Dv] and lse [B, H, S] of each part -> out and lse; [T, H, Dv] and [H, T] as well,
        which is what `attention_varlen` returns.
    Types:
        out has the wider type of out_a and out_b, lse that of lse_a and lse_b; the arithmetic is done in
        these, and at least in float32.
    Args:
        lse_a, lse_b: natural logarithms. A query that saw no key of a part has -inf there, and the other
            part's result; one that saw none at all has out 0 and lse -inf.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
    """
    _check(out_a, lse_a, out_b, lse_b)
    out_type = torch.promote_types(out_a.dtype, out_b.dtype)
    lse_type = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    largest = torch.maximum(lse_a, lse_b).detach().to(lse_type)
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # two -inf differ by NaN
    share_a, share_b = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = share_a + share_b
    sees_nothing = total == 0.0
    total = total.masked_fill(sees_nothing, 1.0)
    lse = (largest + torch.log(total)).masked_fill(sees_nothing, -math.inf)
    shares = torch.stack([share_a, share_b]) / total
    shares = shares.to(torch.promote_types(out_type, torch.float32))
    share_a, share_b = shares.transpose(-1, -2).unsqueeze(-1)  # each [..., S, H, 1]
    return (out_a * share_a + out_b * share_b).to(out_type), lse


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, x in given.items():
        check_tensor(name, x)
        check_device(name, x, out_a)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be of a floating type, got {x.dtype}")
    if out_a.ndim not in (3, 4):
        raise ValueError(f"out_a must be [B, S, H, Dv] or [T, H, Dv], got shape {list(out_a.shape)}")
    if out_b.shape != out_a.shape:
        raise ValueError(f"out_b must have out_a's shape {list(out_a.shape)}, got {list(out_b.shape)}")
    *batch, length, nheads, _ = out_a.shape
    expected = [*batch, nheads, length]
    for name in ("lse_a", "lse_b"):
        if list(given[name].shape) != expected:
            raise ValueError(
                f"{name} must have shape {expected} beside an out {list(out_a.shape)}, "
                f"got {list(given[name].shape)}"
            )
