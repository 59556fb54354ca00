"""One new query per sequence over a key-value cache: bound by reading the cache."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import attention_decode as op
from fastattn.testing.cases import attention
from fastattn.testing.cases.case import DTYPES, Call, Case, Curve, Part, Result
from fastattn.testing.cases.peers import DENSE, OURS, sdpa

OURS_BF16 = "fastattn bf16"


class Inputs(NamedTuple):
    """One copy of a case's tensors. A dense cache lies in memory as torch's users have it."""

    q: Tensor  # [B, 1, H, D]
    k_cache: Tensor  # [B, S, Hk, D] over [B, Hk, S, D], or pages [N, page_size, Hk, D] in no order
    v_cache: Tensor
    cache_seqlens: Tensor  # int32 [B]
    block_table: Tensor | None  # int32 [B, pages]
    k_scale: Tensor | None  # float32 [B, S, Hk], with int8
    v_scale: Tensor | None


@dataclass(frozen=True)
class DecodeCase(Case[Inputs]):
    """One step of generating text, after so many tokens."""

    op: ClassVar[str] = "attention_decode"

    batch: int
    nheads: int
    nheads_k: int
    context: int
    head_dim: int
    dtype: str = "fp32"  # of the cache; queries are bf16 where that is int8
    page_size: int = 0  # 0: dense
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        if self.page_size:
            return ("sdpa",)
        if self.dtype == "int8":
            return "sdpa", OURS_BF16
        return tuple(DENSE)

    @property
    def usual_peers(self) -> tuple[str, ...]:
        """int8 has its own worth beside bf16: both are shown."""
        return self.peers if self.dtype == "int8" else self.peers[:1]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the queries."""
        return DTYPES.get(self.dtype, torch.bfloat16)

    @property
    def name(self) -> str:
        """For example `decode 4,32/8,8192,128 paged 16`: [B, H/Hk, context, D]."""
        cache = f"paged {self.page_size}" if self.page_size else "dense"
        return f"decode {self.batch},{self.nheads}/{self.nheads_k},{self.context},{self.head_dim} {cache}"

    @property
    def flops(self) -> int:
        """4 D for each pair of query and key."""
        return 4 * self.batch * self.nheads * self.context * self.head_dim

    @property
    def bytes(self) -> int:
        """Of the cache, its scales and the queries and outputs."""
        rows = self.batch * self.context * self.nheads_k
        item = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1
        scales = 0 if self.dtype in DTYPES else 2 * 4 * rows
        ends = 2 * self.batch * self.nheads * self.head_dim * self.torch_dtype.itemsize
        return 2 * rows * self.head_dim * item + scales + ends

    @property
    def is_bandwidth_bound(self) -> bool:
        """See `Case`."""
        return True

    def make_inputs(self, seed: int = 0) -> Inputs:
        """Normal tensors; in int8, normal ones rounded with a scale per token and head."""
        generator = torch.Generator().manual_seed(seed)
        batch, heads, dim = self.batch, self.nheads_k, self.head_dim
        q = torch.randn(batch, 1, self.nheads, dim, generator=generator).to(self.torch_dtype)
        if self.page_size:
            pages = self.context // self.page_size
            table = torch.randperm(batch * pages, generator=generator).view(batch, pages).int()
            shape = (batch * pages, self.page_size, heads, dim)
        else:
            table, shape = None, (batch, heads, self.context, dim)
        k, v = (torch.randn(shape, generator=generator) for _ in range(2))
        k_scale = v_scale = None
        if self.dtype == "int8":
            (k, k_scale), (v, v_scale) = _quantised(k), _quantised(v)
            k_scale, v_scale = k_scale.transpose(1, 2), v_scale.transpose(1, 2)
        else:
            k, v = k.to(self.torch_dtype), v.to(self.torch_dtype)
        if not self.page_size:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        return Inputs(q, k, v, torch.full((batch,), self.context).int(), table, k_scale, v_scale)

    def reads(self, x: Inputs) -> tuple[Tensor, ...]:
        """The cache and its scales."""
        return tuple(t for t in (x.k_cache, x.v_cache, x.k_scale, x.v_scale) if t is not None)

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`. What int8 holds is handed to the peers in bf16, made before the clock starts."""
        if peer == OURS:
            run: Any = partial(_decode, **x._asdict())
            return Call(run, lambda out: (out,))
        if x.block_table is not None:
            return Call(partial(_gather, x.q, x.k_cache, x.v_cache, x.block_table.long()), _transposed)
        k, v = x.k_cache, x.v_cache
        if x.k_scale is not None and x.v_scale is not None:
            k, v = _dequantised(k, x.k_scale, self.torch_dtype), _dequantised(v, x.v_scale, self.torch_dtype)
        if peer == OURS_BF16:
            return Call(partial(_decode, x.q, k, v, x.cache_seqlens), lambda out: (out,))
        q, k, v = (t.transpose(1, 2) for t in (x.q, k, v))
        return Call(partial(DENSE[peer](q, k, v, None, False), q, k, v), _transposed)

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The first KV head of the first sequence and the last one of the last, with their query heads."""
        group = self.nheads // self.nheads_k
        for b, head in ((0, 0), (self.batch - 1, self.nheads_k - 1)):
            index = (slice(b, b + 1), slice(None), slice(head * group, (head + 1) * group))
            yield Part(partial(_reference, x, b, head, index), partial(_cut, index=index))


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **options: Any) -> Any:
    return op.attention_decode(q, k_cache, v_cache, cache_seqlens=cache_seqlens, **options)


def _gather(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor) -> Any:
    """What PyTorch makes of pages."""
    k, v = (
        cache.index_select(0, table.flatten()).view(q.shape[0], -1, *cache.shape[2:]).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    q = q.transpose(1, 2)
    return sdpa(q, k, v, None, False)(q, k, v)


def _reference(x: Inputs, b: int, head: int, index: Any, dtype: torch.dtype) -> Result:
    heads = slice(head, head + 1)
    k, v = (_dense(cache, x.block_table, b)[:, :, heads] for cache in (x.k_cache, x.v_cache))
    if x.k_scale is not None and x.v_scale is not None:
        k = _dequantised(k, x.k_scale[b : b + 1, :, heads], dtype)
        v = _dequantised(v, x.v_scale[b : b + 1, :, heads], dtype)
    return attention.reference(x.q[index], k, v, None, dtype, causal=False)


def _dense(cache: Tensor, block_table: Tensor | None, b: int) -> Tensor:
    """The cache of one sequence: [1, S, Hk, D]."""
    if block_table is None:
        return cache[b : b + 1]
    return cache[block_table[b].long()].flatten(0, 1)[None]


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(dim=-1) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def _dequantised(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In float64 where that is asked for, else in float32 and rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    return (x.to(wide) * scale[..., None].to(wide)).to(dtype)


def _transposed(out: Tensor) -> Result:
    return (out.transpose(1, 2),)


def _cut(result: Result, index: Any) -> Result:
    return (result[0][index],)


_ONE = DecodeCase(1, 32, 8, 8192, 128)
_SHAPES = [_ONE, replace(_ONE, batch=4), replace(_ONE, batch=64, context=256)]
DECODE = [
    replace(case, dtype=dtype, page_size=page_size)
    for case in _SHAPES
    for dtype, page_size in (("fp32", 0), ("bf16", 0), ("fp32", 16), ("bf16", 16), ("int8", 0))
]
DECODE_QUICK = [case for case in DECODE if case.batch == 1 and case.dtype != "fp32"]


def sweep(contexts: tuple[int, ...]) -> list[DecodeCase]:
    """Speed over context, a curve for each type."""
    figure = f"decode, batch 1, {_ONE.nheads}/{_ONE.nheads_k} heads, D {_ONE.head_dim}"
    return [
        replace(_ONE, context=context, dtype=dtype, curve=Curve(figure, "context", context))
        for context in contexts
        for dtype in ("fp32", "bf16")
    ]
