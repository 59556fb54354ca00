"""torch.nn's masks as those of `attention`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops._checks import check_tensor


def canonical_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    batched: bool,
    is_causal: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks as those of `attention`, rank 4: (bool with True = attend, what is added)."""
    batch, seqlen_q, nheads, _ = q.shape
    seqlen_k = k.shape[1]
    given: list[Tensor] = []
    if key_padding_mask is not None:
        _check("key_padding_mask", key_padding_mask, (batch, seqlen_k) if batched else (seqlen_k,))
        given.append(key_padding_mask.reshape(batch, 1, 1, seqlen_k))
    if attn_mask is not None:
        _check("attn_mask", attn_mask, (seqlen_q, seqlen_k), (batch * nheads, seqlen_q, seqlen_k))
        if not is_causal:
            sizes = (1, 1) if attn_mask.ndim == 2 else (batch, nheads)
            given.append(attn_mask.reshape(*sizes, seqlen_q, seqlen_k))
    ignored: Tensor | None = None
    bias: Tensor | None = None
    for x in given:
        if x.dtype is torch.bool:
            ignored = x if ignored is None else ignored | x
        else:
            x = x if x.dtype in (q.dtype, torch.float32) else x.to(q.dtype)
            bias = x if bias is None else bias + x
    return None if ignored is None else ~ignored, bias


def _check(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    check_tensor(name, mask)
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool (True = ignore) or floating (added), got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {list(mask.shape)}")


def with_window(mask: Tensor | None, q: Tensor, k: Tensor, left: int, right: int | None) -> Tensor | None:
    """mask and the window in one mask."""
    if left < 0 and right is None:
        return mask
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    distance = (
        torch.arange(seqlen_q, device=q.device)[:, None]
        + (seqlen_k - seqlen_q)
        - torch.arange(seqlen_k, device=q.device)
    )
    seen = distance >= (-seqlen_q if right is None else -right)
    if left >= 0:
        seen = seen & (distance <= left)
    return seen[None, None] if mask is None else mask & seen


def add_key(
    k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, new_k: Tensor, new_v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One more key and value at the end of every sequence, which every query sees."""
    k, v = (
        torch.cat((x, new.to(x.dtype).expand(x.shape[0], 1, *x.shape[2:])), dim=1)
        for x, new in ((k, new_k), (v, new_v))
    )
    mask = None if mask is None else F.pad(mask, (0, 1), value=True)
    return k, v, mask, None if bias is None else F.pad(bias, (0, 1))
