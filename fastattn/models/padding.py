"""Batches that are padded to one length: where their tokens are, and the way to packed rows and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastattn.models.layers import Packed
from fastattn.ops._checks import check_tensor


class Padding(NamedTuple):
    """Which of [B, S] are tokens, and what they are one after the other."""

    mask: Tensor  # bool [B, S], True: a token
    rows: Tensor  # int64 [T], where they are in [B * S]
    packed: Packed  # whose positions count the padding too

    @classmethod
    def of(
        cls, ids: Tensor, mask: Tensor | None = None, lengths: Tensor | Sequence[int] | None = None
    ) -> "Padding | None":
        """From what the caller of a model says; None where there is no padding.

        Args:
            ids: [B, S].
            mask: [B, S], bool or integers; True or 1: a token.
            lengths: [B], tokens of each sequence; the padding is at the right.
        Raises:
            ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        """
        if mask is not None and lengths is not None:
            raise ValueError("mask and lengths must not both be given: they say the same")
        if lengths is not None:
            mask = _mask_of_lengths(ids, lengths)
        if mask is None or bool((mask := check_mask(mask, ids)).all()):
            return None
        counts = mask.sum(1, dtype=torch.int32)
        rows = mask.flatten().nonzero()[:, 0]
        starts = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        positions = (rows % mask.shape[1]).int()
        return cls(mask, rows, Packed(starts, int(counts.max()), positions[None]))

    @property
    def has_gaps(self) -> bool:
        """Whether there is padding between tokens of a sequence."""
        starts = F.pad(self.mask.int(), (1, 0)).diff(dim=1) > 0
        return bool((starts.sum(1) > 1).any())

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...], the tokens alone."""
        return x.flatten(0, 1)[self.rows][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, S, ...], zeros at padding."""
        batch, length = self.mask.shape
        out = x.new_zeros((batch * length, *x.shape[2:]))
        return out.index_copy(0, self.rows, x[0]).view(batch, length, *x.shape[2:])

    def align(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, longest, ...], each sequence from 0 on, zeros behind it."""
        lengths = self.packed.cu_seqlens.diff().tolist()
        return pad_sequence(x[0].split(lengths), batch_first=True)


def check_mask(mask: Tensor, ids: Tensor) -> Tensor:
    """The mask as bool. Raises where it is not one of ids, or leaves a sequence no token."""
    check_tensor("mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or integers (True or 1: a token), got {mask.dtype}")
    if mask.shape != ids.shape[:2]:
        raise ValueError(f"mask must have shape [B, S] = {list(ids.shape[:2])}, got {list(mask.shape)}")
    if mask.device != ids.device:
        raise ValueError(f"mask must be on the tokens' device {ids.device}, got {mask.device}")
    if mask.dtype is not torch.bool:
        low, high = (int(x) for x in mask.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"mask must be 1 at tokens and 0 at padding, got {low if low < 0 else high}")
        mask = mask.bool()
    if not bool((some := mask.any(1)).all()):
        empty = int(some.long().argmin())
        raise ValueError(f"mask must leave each sequence a token, got only padding in sequence {empty}")
    return mask


def _mask_of_lengths(ids: Tensor, lengths: Tensor | Sequence[int]) -> Tensor:
    given = torch.as_tensor(lengths, device=ids.device)
    batch, length = ids.shape
    if given.is_floating_point() or given.dtype is torch.bool or tuple(given.shape) != (batch,):
        raise ValueError(
            f"lengths must be integers of shape [B] = [{batch}], got {given.dtype} {list(given.shape)}"
        )
    low, high = (int(x) for x in given.aminmax())
    if low < 1 or high > length:
        raise ValueError(f"lengths must be in 1 ... {length}, got {low if low < 1 else high}")
    return torch.arange(length, device=ids.device) < given[:, None]
