"""Attention on [B, S, H, D]: prefill, training and long-context decoding without a cache's trimmings."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import attention as op
from fastattn.testing.cases.case import DTYPES, Call, Case, Curve, Part, Result
from fastattn.testing.cases.peers import DENSE, OURS, Attend
from fastattn.testing.inputs import qkv


class Inputs(NamedTuple):
    """One copy of a case's tensors. [B, S, H, D], laid out in memory as torch's SDPA wants them."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None  # [1, 1, Sq, Sk]


@dataclass(frozen=True)
class AttentionCase(Case[Inputs]):
    """One shape. `causal` is aligned at the end; all of these have Sq = Sk or no causal."""

    op: ClassVar[str] = "attention"

    batch: int
    nheads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "fp32"
    nheads_k: int = 0  # 0: as many as nheads
    causal: bool = False
    masked: bool = False
    backward: bool = False
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def kv_heads(self) -> int:
        """Hk."""
        return self.nheads_k or self.nheads

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return tuple(DENSE)

    @property
    def is_bandwidth_bound(self) -> bool:
        """One new query over many keys: bound by reading K and V."""
        return self.seqlen_q == 1 < self.seqlen_k

    @property
    def name(self) -> str:
        """For example `fwd+bwd 1,16,4096,128 causal`: [B, H, S, D], KV heads after a slash."""
        heads = f"{self.nheads}/{self.kv_heads}" if self.nheads_k else f"{self.nheads}"
        kind = "decode" if self.is_bandwidth_bound else "fwd+bwd" if self.backward else "fwd"
        extra = "causal" if self.causal else "mask" if self.masked else "full"
        return f"{kind} {self.batch},{heads},{self.seqlen_k},{self.head_dim} {extra}"

    @property
    def flops(self) -> int:
        """4 D for each pair that causal leaves, 2.5 times that backward. A mask saves none."""
        pairs = visible_pairs(self.seqlen_q, self.seqlen_k, self.causal)
        forward = 4 * self.batch * self.nheads * pairs * self.head_dim
        return forward * 7 // 2 if self.backward else forward

    @property
    def bytes(self) -> int:
        """Of q, k, v and out; backward, of dout, dq, dk and dv too."""
        rows = 2 * self.nheads * self.seqlen_q + 2 * self.kv_heads * self.seqlen_k
        return self.batch * rows * self.head_dim * DTYPES[self.dtype].itemsize * (2 if self.backward else 1)

    def make_inputs(self, seed: int = 0) -> Inputs:
        """Normal tensors; a mask hides a fifth of the pairs, and never a whole row."""
        q, k, v = qkv(
            self.batch, self.nheads, self.kv_heads, self.seqlen_q, self.seqlen_k, self.head_dim,
            dtype=DTYPES[self.dtype], seed=seed, transposed=True,
        )  # fmt: skip
        mask = None
        if self.masked:
            generator = torch.Generator().manual_seed(seed)
            mask = torch.rand(1, 1, self.seqlen_q, self.seqlen_k, generator=generator) < 0.8
            mask[..., 0] = True
        return Inputs(q, k, v, torch.roll(q, 1, dims=1) if self.backward else q, mask)

    def reads(self, x: Inputs) -> tuple[Tensor, ...]:
        """The keys and values."""
        return x.k, x.v

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`."""
        ours = peer == OURS
        q, k, v, dout = (t.detach() if ours else t.detach().transpose(1, 2) for t in x[:4])
        q, k, v = leaves(q, k, v, self.backward)
        if ours:
            attend: Attend = partial(op.attention, causal=self.causal, mask=x.mask)
        else:
            attend = DENSE[peer](q, k, v, x.mask, self.causal)
        return call(attend, q, k, v, dout, self.backward, None if ours else _transpose)

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The first KV head of the first sequence and the last one of the last.

        With all query heads that read it, and of their rows the first or last 256 (all of them for
        gradients).
        """
        few = self.seqlen_q if self.backward else min(self.seqlen_q, 256)
        group = self.nheads // self.kv_heads
        for batch, head, rows in (
            (0, 0, slice(0, few)),
            (self.batch - 1, self.kv_heads - 1, slice(self.seqlen_q - few, self.seqlen_q)),
        ):
            # Rows before the last see no key beyond this one: the cut keeps causal's alignment.
            end = rows.stop + self.seqlen_k - self.seqlen_q if self.causal else self.seqlen_k
            q_index = (slice(batch, batch + 1), rows, slice(head * group, (head + 1) * group))
            k_index = (slice(batch, batch + 1), slice(0, end), slice(head, head + 1))
            mask = None if x.mask is None else x.mask[:, :, rows, :end]
            tensors = (x.q[q_index], x.k[k_index], x.v[k_index])
            dout = x.dout[q_index] if self.backward else None
            indices = (q_index, q_index, k_index, k_index)
            yield Part(
                partial(reference, *tensors, dout, causal=self.causal, mask=mask),
                partial(_cut, indices=indices),
            )


def visible_pairs(seqlen_q: int, seqlen_k: int, causal: bool) -> int:
    """How many scores one head of one sequence has."""
    if not causal:
        return seqlen_q * seqlen_k
    first = seqlen_k - seqlen_q + 1
    return sum(min(max(i + first, 0), seqlen_k) for i in range(seqlen_q))


def leaves(q: Tensor, k: Tensor, v: Tensor, backward: bool) -> list[Tensor]:
    """The tensors that gradients are asked for."""
    return [t.detach().requires_grad_(backward) for t in (q, k, v)]


def call(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    backward: bool,
    layout: Callable[[Tensor], Tensor] | None,
) -> Call:
    """out, or a step of training: out, dq, dk and dv. `layout` brings results into ours."""

    def step() -> Result:
        out = attend(q, k, v)
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    def result(raw: Tensor | Result) -> Result:
        tensors = [t.detach() for t in ((raw,) if isinstance(raw, Tensor) else raw)]
        return tuple(tensors if layout is None else map(layout, tensors))

    return Call(step if backward else partial(attend, q, k, v), result)


def _transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _cut(result: Result, indices: tuple[Any, ...]) -> Result:
    return tuple(tensor[index] for tensor, index in zip(result, indices, strict=False))


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor | None,
    dtype: torch.dtype,
    causal: bool,
    mask: Tensor | None = None,
) -> Result:
    """Plain PyTorch on [B, S, H, D] in the given type; the gradients too where dout is given."""
    q, k, v = (t.detach().to(dtype).requires_grad_(dout is not None) for t in (q, k, v))
    out, _ = op.attention_reference(op.check(q, k, v, causal=causal, mask=mask))
    if dout is None:
        return (out,)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype)))


def _in_types(*cases: AttentionCase) -> list[AttentionCase]:
    return [replace(case, dtype=dtype) for case in cases for dtype in ("fp32", "bf16")]


_GPT2 = AttentionCase(1, 12, 1024, 1024, 64, causal=True)
_GPT2_TRAINING = replace(_GPT2, backward=True)
_LONG = AttentionCase(1, 16, 4096, 4096, 128, causal=True)
_BATCHED = AttentionCase(4, 12, 512, 512, 64, causal=True)
_DECODE = AttentionCase(1, 12, 1, 4096, 64)
_DECODE_LONG = AttentionCase(1, 12, 1, 32768, 64)

ATTENTION = [
    *_in_types(replace(_GPT2, causal=False), _GPT2),
    replace(_GPT2, dtype="fp16"),
    *_in_types(_LONG, _BATCHED),
    replace(_BATCHED, dtype="fp16"),
    *_in_types(AttentionCase(1, 32, 2048, 2048, 128)),
    *_in_types(_GPT2_TRAINING, replace(_LONG, backward=True)),
    *_in_types(_DECODE, _DECODE_LONG),
]

# A third of the cases, one of each kind, none of which takes seconds.
ATTENTION_QUICK = [
    *_in_types(_GPT2),
    replace(_GPT2, dtype="fp16"),
    *_in_types(_GPT2_TRAINING, _DECODE),
]


def sweep(lengths: tuple[int, ...]) -> list[AttentionCase]:
    """Speed over sequence length, a curve for each head dim and type."""
    return [
        case
        for head_dim, length in product((64, 128), lengths)
        for case in _in_types(
            AttentionCase(
                1, 8, length, length, head_dim, causal=True,
                curve=Curve(f"attention, forward, causal, 8 heads, D {head_dim}", "sequence length", length),
            )
        )
    ]  # fmt: skip


def _grid() -> Iterator[AttentionCase]:
    """Where a user may stand: nothing here should lose."""
    lengths, head_dims = (1, 16, 128, 512, 2048), (32, 64, 80, 128)
    for batch, nheads, seqlen, head_dim in product((1, 8), (1, 12, 32), lengths, head_dims):
        full = AttentionCase(batch, nheads, seqlen, seqlen, head_dim)
        yield from _in_types(full, replace(full, causal=True), replace(full, masked=True))
        if nheads % 4 == 0:
            yield from _in_types(replace(full, nheads_k=nheads // 4))


GRID = list(_grid())

# A third of those that take well under a second. A fixed draw, since every third would always meet
# the same kinds.
_SMALL = [case for case in GRID if case.flops < 5e9]
GRID_QUICK = random.Random(0).sample(_SMALL, len(_SMALL) // 3)
