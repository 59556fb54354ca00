"""Attention in plain PyTorch, for those who want to see the weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch


def attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out [B, Sq, H, Dv], weights [B, H, Sq, Sk]), the arguments as in `fastattn.attention`.

    Dropout is torch's, and is seen in the weights. O(Sq Sk) memory.
    """
    groups = q.shape[2] // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = (q * q.shape[3] ** -0.5).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = q @ k.contiguous().mT
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        hidden = scores.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
        bias = hidden if bias is None else bias + hidden
    if bias is None:
        weights = _softmax(scores)
    else:
        # The softmax of a row of -inf is NaN, in its gradient too: give it a finite row, then 0.
        sees_nothing = (bias == -math.inf).all(dim=-1, keepdim=True)
        scores = scores + bias.masked_fill(sees_nothing, 0.0).to(scores.dtype)
        weights = _softmax(scores).masked_fill(sees_nothing, 0.0)
    weights = F.dropout(weights, dropout_p)
    return (weights @ v).transpose(1, 2), weights


def _softmax(scores: Tensor) -> Tensor:
    """In place where nobody else looks at the scores: fresh memory costs more than the softmax."""
    alone = scores.dtype is torch.float32 and not (scores.requires_grad or dispatch.must_trace())
    return torch.softmax(scores, dim=-1, out=scores if alone else None)
