"""flash-attn's way from padded batches to packed rows and back. Everything here is differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """The rows of input [N, ...] at indices [n] -> [n, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[first_axis_dim, ...] with values [n, ...] in the rows indices [n], and 0 in the others."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Takes the padding out of a batch.

    Shapes:
        hidden_states [B, S, ...], attention_mask and unused_mask [B, S], bool or int.
    Args:
        attention_mask: 1 where there is a token.
        unused_mask: 1 where there is a token that is kept in the rows but not counted as used.
    Returns:
        rows [T, ...]; indices [T], where they stood in the flattened batch; cu_seqlens int32 [B + 1];
        the longest sequence; int32 [B], the tokens of attention_mask in each sequence.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return rows, indices, _starts(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same where each row of the batch holds several sequences, one behind the other.

    Shapes:
        hidden_states [B, S, ...], attention_mask_in_length [B, S], integers.
    Args:
        attention_mask_in_length: the lengths of a row's sequences from the left, then 0: [2, 3, 0, 0, 0, 0]
            are 2 tokens, 3 tokens and 1 of padding.
    Returns:
        rows, indices, cu_seqlens and the longest sequence, as `unpad_input`.
    """
    lengths = attention_mask_in_length[attention_mask_in_length != 0].to(torch.int32)
    tokens = attention_mask_in_length.sum(dim=-1, keepdim=True)
    there = torch.arange(attention_mask_in_length.shape[1], device=tokens.device) < tokens
    indices = there.flatten().nonzero().flatten()
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, _starts(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts rows [T, ...] back to where they stood -> [batch, seqlen, ...], 0 in between."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def _starts(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if len(lengths) else 0
