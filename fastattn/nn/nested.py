"""Nested tensors, jagged or strided, as packed rows: sequences one after the other, without padding."""

from typing import Any

import torch
from torch import Tensor


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all sequences [T, E], and where each sequence starts, int32 [B + 1]."""
    if x.layout is torch.jagged:
        jagged: Any = x
        return jagged.values(), jagged.offsets().int()
    rows = x.unbind()
    starts = torch.tensor([0, *(len(y) for y in rows)], device=x.device).cumsum(0)
    return torch.cat(rows), starts.int()


def unpack(rows: Tensor, starts: Tensor, like: Tensor) -> Tensor:
    """A nested tensor of rows, in the layout of `like`, whose sequences have the same lengths."""
    if like.layout is torch.jagged:
        jagged: Any = like
        return torch.nested.nested_tensor_from_jagged(rows, jagged.offsets())
    return torch.nested.as_nested_tensor(list(rows.split(starts.diff().tolist())))


def positions(starts: Tensor, longest: int) -> Tensor:
    """Of each row in its sequence, [1, T]; all sequences end at position longest - 1."""
    ends = starts[1:].repeat_interleave(starts.diff())
    return (torch.arange(len(ends), device=starts.device) - ends + longest)[None]
