"""Keys and values of all layers of a model, which share their lengths and their pages."""

from typing import Any

import torch
from torch import Tensor

from fastattn.nn import KVCache


class ModelCache:
    """One `KVCache` a layer. Its memory is taken once.

    A model reserves room for its new tokens, lets each layer extend its own cache, and then advances the
    lengths, which all layers share.

    Args:
        num_layers: number of layers.
        batch_size: number of sequences, B.
        max_length: tokens that a sequence can hold.
        num_kv_heads: Hk.
        head_dim: D.
        options: of `KVCache`: dtype, device, page_size, num_pages (of each layer).
    Attributes:
        layers: the caches.
        lengths: int32 [B], tokens that each sequence has.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        **options: Any,
    ) -> None:
        sizes = (batch_size, max_length, num_kv_heads, head_dim)
        self.layers = [KVCache(*sizes, **options) for _ in range(num_layers)]
        self._first = self.layers[0]
        self.lengths = self._first.lengths
        self.batch_size, self.max_length = batch_size, max_length
        for layer in self.layers[1:]:
            layer.lengths = self.lengths
            layer.block_table = self._first.block_table

    def __getitem__(self, layer: int) -> KVCache:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"ModelCache({len(self)} x {self._first!r})"

    @property
    def nbytes(self) -> int:
        """Memory of all layers."""
        tensors = (x for layer in self.layers for x in (layer.k, layer.v, layer.k_scale, layer.v_scale))
        return sum(x.nbytes for x in tensors if x is not None)

    def reserve(self, new: int) -> None:
        """Room for new tokens of each sequence. Raises ValueError where there is none."""
        self._first.reserve(new)

    def advance(self, new: int) -> None:
        """Every layer has got them: the lengths grow."""
        self.lengths += new

    def truncate(self, lengths: int | Tensor) -> None:
        """Forgets all but the first tokens of each sequence; an int or [B]."""
        self._first.truncate(lengths)

    def reset(self) -> None:
        """Forgets everything, and keeps the memory."""
        self.truncate(0)

    def reorder(self, sequences: Tensor) -> None:
        """Sequence b becomes a copy of what sequences[b] was, as beam search wants it; dense caches."""
        if self._first.block_table is not None:
            raise ValueError("reorder needs a cache without pages")
        rows = torch.as_tensor(sequences)
        lengths = self.lengths.clone()
        for layer in self.layers:
            self.lengths.copy_(lengths)  # each reorders what all share
            layer.reorder(rows)
