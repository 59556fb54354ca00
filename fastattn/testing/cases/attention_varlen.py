"""Sequences of many lengths, packed without padding: a training batch, or prompts that came together."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn.ops import attention_varlen as op
from fastattn.testing.cases import attention
from fastattn.testing.cases.case import DTYPES, Call, Case, Curve, Part, Result
from fastattn.testing.cases.peers import OURS, Attend, sdpa
from fastattn.testing.inputs import packed_qkv


class Inputs(NamedTuple):
    """One copy of a case's packed tensors."""

    q: Tensor  # [T, H, D]
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor  # int32 [B + 1]


@dataclass(frozen=True)
class VarlenCase(Case[Inputs]):
    """Self-attention of packed sequences."""

    op: ClassVar[str] = "attention_varlen"

    lengths: tuple[int, ...]
    nheads: int
    head_dim: int
    dtype: str = "fp32"
    causal: bool = True
    backward: bool = False
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return "padded", "loop"

    @property
    def usual_peers(self) -> tuple[str, ...]:
        """Both: which of them is faster depends on the lengths."""
        return self.peers

    @property
    def name(self) -> str:
        """For example `fwd varlen 16x32-2048,12,64 causal`: [sequences x lengths, H, D]."""
        kind = "fwd+bwd" if self.backward else "fwd"
        lengths = f"{len(self.lengths)}x{min(self.lengths)}-{max(self.lengths)}"
        return f"{kind} varlen {lengths},{self.nheads},{self.head_dim} {'causal' if self.causal else 'full'}"

    @property
    def flops(self) -> int:
        """4 D for each pair that causal leaves, 2.5 times that backward."""
        pairs = sum(attention.visible_pairs(n, n, self.causal) for n in self.lengths)
        forward = 4 * self.nheads * pairs * self.head_dim
        return forward * 7 // 2 if self.backward else forward

    @property
    def bytes(self) -> int:
        """Of q, k, v and out; backward, of dout, dq, dk and dv too."""
        size = sum(self.lengths) * self.nheads * self.head_dim * DTYPES[self.dtype].itemsize
        return 4 * size * (2 if self.backward else 1)

    def make_inputs(self, seed: int = 0) -> Inputs:
        """Normal tensors."""
        q, k, v, cu_seqlens, _ = packed_qkv(
            self.lengths, self.lengths, self.nheads, self.nheads, self.head_dim,
            dtype=DTYPES[self.dtype], seed=seed,
        )  # fmt: skip
        return Inputs(q, k, v, torch.roll(q, 1, dims=1) if self.backward else q, cu_seqlens)

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`. What pads is not timed; who loops cuts and joins, as one who has it packed must."""
        padded = peer == "padded"
        q, k, v, dout = (self._pad(t) if padded else t for t in x[:4])
        q, k, v = attention.leaves(q, k, v, self.backward)
        attend: Attend = self._loop
        if padded:
            attend = sdpa(q, k, v, self._mask(), False)
        elif peer == OURS:
            attend = partial(
                op.attention_varlen, cu_seqlens_q=x.cu_seqlens, cu_seqlens_k=x.cu_seqlens, causal=self.causal
            )
        return attention.call(attend, q, k, v, dout, self.backward, self._pack if padded else None)

    def _loop(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cut = [t.transpose(0, 1)[None].split(self.lengths, dim=2) for t in (q, k, v)]
        outs = [
            scaled_dot_product_attention(qi, ki, vi, is_causal=self.causal)
            for qi, ki, vi in zip(*cut, strict=True)
        ]
        return torch.cat(outs, dim=2)[0].transpose(0, 1)

    def _pad(self, x: Tensor) -> Tensor:
        """[T, H, D] to [B, H, S, D]."""
        rows = torch.nn.utils.rnn.pad_sequence(list(x.split(self.lengths)), batch_first=True)
        return rows.transpose(1, 2).contiguous()

    def _pack(self, x: Tensor) -> Tensor:
        """[B, H, S, D] to [T, H, D]."""
        return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(self.lengths)])

    def _mask(self) -> Tensor:
        """[B, 1, S, S]: the keys of the sequence, up to the query where causal."""
        longest = max(self.lengths)
        keys = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        mask = keys[:, None, None, :].expand(-1, 1, longest, longest)
        return mask.tril() if self.causal else mask.contiguous()

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The first head of the first sequence, the last of the last, and one of the longest."""
        longest = self.lengths.index(max(self.lengths))
        last = len(self.lengths) - 1
        for sequence, head in ((0, 0), (longest, self.nheads // 2), (last, self.nheads - 1)):
            rows = slice(*x.cu_seqlens[sequence : sequence + 2].tolist())
            index = (rows, slice(head, head + 1))
            q, k, v, dout = (t[index][None] for t in x[:4])
            yield Part(
                partial(attention.reference, q, k, v, dout if self.backward else None, causal=self.causal),
                partial(_cut, index=index),
            )


def _cut(result: Result, index: tuple[slice, slice]) -> Result:
    return tuple(tensor[index][None] for tensor in result)


def _lengths(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Both ends, and between them what a fixed draw gives, in any order."""
    draw = random.Random(0)
    lengths = [shortest, longest, *(draw.randint(shortest, longest) for _ in range(count - 2))]
    draw.shuffle(lengths)
    return tuple(lengths)


_FORWARD = VarlenCase(_lengths(16, 32, 2048), 12, 64)
_TRAINING = replace(_FORWARD, backward=True)
VARLEN = [replace(case, dtype=dtype) for case in (_FORWARD, _TRAINING) for dtype in ("fp32", "bf16")]
VARLEN_QUICK = VARLEN[:2]
