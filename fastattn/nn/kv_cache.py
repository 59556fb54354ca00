"""Keys and values that were computed once: the memory of generation."""

from typing import Any, cast

import torch
from torch import Tensor

from fastattn.ops.attention_decode import attention_decode

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class KVCache:
    """Keys and values of a batch of sequences of different lengths, for one layer.

    Its memory is taken once. Dense, each sequence has room for max_length tokens. In pages, sequences
    take them from a common pool as they grow, and it is the pool that can run out.

    Args:
        batch_size: number of sequences, B.
        max_length: tokens that a sequence can hold.
        num_kv_heads: Hk.
        head_dim: D.
        head_dim_v: Dv. Default: head_dim.
        dtype: float32, bfloat16, float16, or int8 with a scale for each token and head.
        page_size: tokens of a page. Default: no pages.
        num_pages: pages of the pool. Default: as many as hold max_length tokens of all sequences.
    Attributes:
        lengths: int32 [B], tokens that each sequence has.
        k: [B, max_length, Hk, D], or pages [N, page_size, Hk, D]; in memory a head's keys follow one another.
        v: the same for the values, with Dv.
        k_scale: float32 [B, max_length, Hk] or [N, page_size, Hk] with int8, else None. A key is its int8
            times its scale.
        v_scale: the same for the values.
        block_table: int32 [B, ceil(max_length / page_size)], the pages of each sequence; None without pages.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.

    Example:
        >>> cache = KVCache(2, 1024, num_kv_heads=8, head_dim=64)
        >>> cache.attend(q, k, v, causal=True)  # the prompts, padded on the right
        >>> cache.truncate(prompt_lengths)  # what stood behind the shorter ones was padding
        >>> cache.attend(q, k, v, causal=True)  # one token each, behind its own prompt
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        sizes = {"batch_size": batch_size, "max_length": max_length, "num_kv_heads": num_kv_heads,
                 "head_dim": head_dim, "head_dim_v": head_dim_v, "page_size": page_size,
                 "num_pages": num_pages}  # fmt: skip
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dtype not in _TYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or int8, got {dtype}")
        if page_size is None and num_pages is not None:
            raise ValueError(f"num_pages must be None without a page_size, got {num_pages}")
        self.batch_size = batch_size
        self.max_length = max_length
        self.page_size = page_size
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.block_table: Tensor | None = None
        shape = (batch_size, num_kv_heads, max_length)
        if page_size is not None:
            per_sequence = -(-max_length // page_size)
            num_pages = batch_size * per_sequence if num_pages is None else num_pages
            shape = (num_pages, num_kv_heads, page_size)
            self.block_table = torch.zeros(batch_size, per_sequence, dtype=torch.int32, device=device)
            self._pages: list[list[int]] = [[] for _ in range(batch_size)]
            self._free = list(range(num_pages))

        def room(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(sizes, dtype=dtype, device=device).transpose(1, 2)

        self.k = room(*shape, head_dim)
        self.v = room(*shape, head_dim if head_dim_v is None else head_dim_v)
        quantized = dtype is torch.int8
        self.k_scale = room(*shape, dtype=torch.float32) if quantized else None
        self.v_scale = room(*shape, dtype=torch.float32) if quantized else None

    def __repr__(self) -> str:
        paged = "" if self.page_size is None else f", {len(self._free)} of {len(self.k)} pages free"
        heads, head_dim = self.k.shape[2:]
        return (
            f"KVCache({self.batch_size} sequences of up to {self.max_length} tokens, {heads} heads of "
            f"{head_dim}, {self.k.dtype}, lengths {self.lengths.tolist()}{paged})"
        )

    def attend(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any) -> Tensor:
        """Appends k and v, then lets q attend to all that each sequence has: `attention_decode`.

        Shapes:
            q [B, Sq, H, D], k [B, Sn, Hk, D], v [B, Sn, Hk, Dv] -> [B, Sq, H, Dv].
        Args:
            options: of `attention_decode`: causal, window_size, softmax_scale, softcap, alibi_slopes,
                sinks, cos, sin, interleaved, num_splits, backend.
        Raises:
            ValueError, TypeError: an argument is wrong, or the cache is full; nothing was written then.
            NotImplementedError: no backend takes the call; a gradient is asked for.
        """
        new = 0 if k is None else k.shape[1]
        if new:
            self.reserve(new)
        out = self.extend(q, k, v, **options)
        if new:
            self.lengths += new
        return out

    def extend(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, **options: Any) -> Tensor:
        """`attend` for who keeps the lengths: room was reserved before, and `lengths` stays as it is.

        Layers of a model that share their lengths use it (`fastattn.models.ModelCache`).
        """
        out = attention_decode(
            q,
            self.k,
            self.v,
            k=k,
            v=v,
            cache_seqlens=self.lengths,
            block_table=self.block_table,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
            **options,
        )
        return cast(Tensor, out)

    def append(self, k: Tensor, v: Tensor, **options: Any) -> None:
        """Writes k and v behind what each sequence has; `attend` without queries."""
        self.attend(k[:, :0], k, v, **options)

    def read(self, sequence: int) -> tuple[Tensor, Tensor]:
        """k [S, Hk, D] and v [S, Hk, Dv] of one sequence, copied; in the cache's type, int8 as float32."""
        length = int(self.lengths[sequence])
        rows: Any = sequence, slice(length)
        if self.block_table is not None and self.page_size is not None:
            tokens = torch.arange(length, device=self.k.device)
            rows = self.block_table[sequence, tokens // self.page_size].long(), tokens % self.page_size
        k, v = self.k[rows].clone(), self.v[rows].clone()
        if self.k_scale is None or self.v_scale is None:
            return k, v
        return k * self.k_scale[rows][..., None], v * self.v_scale[rows][..., None]

    def truncate(self, lengths: int | Tensor) -> None:
        """Forgets all but the first tokens of each sequence.

        Args:
            lengths: an int or [B] of them, at least 0 and at most what each sequence has.
        """
        new = torch.as_tensor(lengths, device=self.lengths.device)
        if new.is_floating_point() or tuple(new.shape) not in ((), (self.batch_size,)):
            raise ValueError(
                f"lengths must be an int or have shape [B] = [{self.batch_size}], got {new.dtype} "
                f"{list(new.shape)}"
            )
        if bool((new < 0).any()) or bool((new > self.lengths).any()):
            raise ValueError(
                f"lengths must be in 0 ... {self.lengths.tolist()}, which is there, got {new.tolist()}"
            )
        self.lengths.copy_(new)
        if self.page_size is not None:
            for pages, length in zip(self._pages, self.lengths.tolist(), strict=True):
                kept = -(-length // self.page_size)
                self._free += pages[kept:]
                del pages[kept:]

    def reset(self) -> None:
        """Forgets everything, and keeps the memory."""
        self.truncate(0)

    def reorder(self, sequences: Tensor) -> None:
        """Sequence b becomes a copy of what sequences[b] was, as beam search wants it.

        Args:
            sequences: integers [B], in 0 ... B - 1.
        """
        rows: list[int] = torch.as_tensor(sequences).tolist()
        if len(rows) != self.batch_size or not all(0 <= row < self.batch_size for row in rows):
            raise ValueError(
                f"sequences must hold {self.batch_size} numbers in 0 ... {self.batch_size - 1}, got {rows}"
            )
        if self.page_size is not None:
            self._reorder_pages(rows, self.page_size)
        else:
            longest = int(self.lengths.max())
            for x in self._stored():
                x[:, :longest] = x[rows, :longest]
        self.lengths.copy_(self.lengths[rows])

    def _reorder_pages(self, rows: list[int], page_size: int) -> None:
        used = [self._pages[row][: -(-int(self.lengths[row]) // page_size)] for row in rows]
        source = [page for pages in used for page in pages]
        if len(source) > len(self.k):
            raise ValueError(f"the pool has {len(self.k)} pages, and sequences {rows} need {len(source)}")
        contents = [x[source] for x in self._stored()]
        for x, content in zip(self._stored(), contents, strict=True):
            x[: len(source)] = content
        pages = iter(range(len(source)))
        self._pages = [[next(pages) for _ in taken] for taken in used]
        self._free = list(range(len(source), len(self.k)))
        for sequence, taken in enumerate(self._pages):
            self._write_table(sequence, 0, taken)

    def _stored(self) -> list[Tensor]:
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def reserve(self, new: int) -> None:
        """Gives each sequence the pages for new tokens.

        Raises:
            ValueError: they have no place; nothing was changed then.
        """
        if self.page_size is None and (torch.compiler.is_compiling() or self.k.device.type != "cpu"):
            return  # the op looks at the lengths when it runs, where it can
        wanted = [length + new for length in self.lengths.tolist()]
        if max(wanted) > self.max_length:
            full = wanted.index(max(wanted))
            raise ValueError(
                f"the cache is full: max_length is {self.max_length}, sequence {full} has "
                f"{wanted[full] - new} tokens and was to get {new} more"
            )
        if self.page_size is None:
            return
        more = [
            -(-length // self.page_size) - len(pages)
            for length, pages in zip(wanted, self._pages, strict=True)
        ]
        if sum(x for x in more if x > 0) > len(self._free):
            raise ValueError(
                f"the cache is full: {len(self._free)} of {len(self.k)} pages are free, and {new} more "
                f"tokens for each sequence need {sum(x for x in more if x > 0)}"
            )
        for sequence, count in enumerate(more):
            if count > 0:
                taken = [self._free.pop() for _ in range(count)]
                self._write_table(sequence, len(self._pages[sequence]), taken)
                self._pages[sequence] += taken

    def _write_table(self, sequence: int, at: int, pages: list[int]) -> None:
        assert self.block_table is not None
        self.block_table[sequence, at : at + len(pages)] = torch.tensor(pages, dtype=torch.int32)
