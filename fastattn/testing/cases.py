"""The attention cases that are timed, who is timed on them, and the check that comes before."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastattn.ops import attention as op
from fastattn.testing import compare
from fastattn.testing.inputs import qkv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Result = tuple[Tensor, ...]  # out, then dq, dk, dv where the case has a backward


@dataclass(frozen=True)
class Case:
    """One shape to time. `causal` is aligned at the end; all of these have Sq = Sk or no causal."""

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

    @property
    def kv_heads(self) -> int:
        """Hk."""
        return self.nheads_k or self.nheads

    @property
    def is_decode(self) -> bool:
        """One new query over a long cache: bound by reading K and V."""
        return self.seqlen_q == 1 < self.seqlen_k

    @property
    def name(self) -> str:
        """For example `fwd+bwd 1,16,4096,128 causal`: [B, H, S, D], kv heads after a slash."""
        heads = f"{self.nheads}/{self.kv_heads}" if self.nheads_k else f"{self.nheads}"
        kind = "decode" if self.is_decode else "fwd+bwd" if self.backward else "fwd"
        extra = "causal" if self.causal else "mask" if self.masked else "full"
        return f"{kind} {self.batch},{heads},{self.seqlen_k},{self.head_dim} {extra}"

    @property
    def flops(self) -> int:
        """4 D for each pair that causal leaves, 2.5 times that backward. A mask saves none."""
        pairs = self.seqlen_q * self.seqlen_k
        if self.causal:
            pairs = sum(
                min(max(i + 1 + self.seqlen_k - self.seqlen_q, 0), self.seqlen_k)
                for i in range(self.seqlen_q)
            )
        forward = 4 * self.batch * self.nheads * pairs * self.head_dim
        return forward * 7 // 2 if self.backward else forward

    @property
    def bytes(self) -> int:
        """Of q, k, v and out, each once."""
        rows = 2 * self.nheads * self.seqlen_q + 2 * self.kv_heads * self.seqlen_k
        return self.batch * rows * self.head_dim * DTYPES[self.dtype].itemsize


def _in_types(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in ("fp32", "bf16")]


_GPT2 = Case(1, 12, 1024, 1024, 64, causal=True)
_GPT2_TRAINING = replace(_GPT2, backward=True)
_LONG = Case(1, 16, 4096, 4096, 128, causal=True)
_BATCHED = Case(4, 12, 512, 512, 64, causal=True)
_DECODE = Case(1, 12, 1, 4096, 64)
_DECODE_LONG = Case(1, 12, 1, 32768, 64)

ATTENTION = [
    *_in_types(replace(_GPT2, causal=False), _GPT2),
    replace(_GPT2, dtype="fp16"),
    *_in_types(_LONG, _BATCHED),
    replace(_BATCHED, dtype="fp16"),
    *_in_types(Case(1, 32, 2048, 2048, 128)),
    *_in_types(_GPT2_TRAINING, replace(_LONG, backward=True)),
    *_in_types(_DECODE, _DECODE_LONG),
]

# A third of the cases, one of each kind, none of which takes seconds.
ATTENTION_QUICK = [
    *_in_types(_GPT2),
    replace(_GPT2, dtype="fp16"),
    *_in_types(_GPT2_TRAINING, _DECODE),
]


def _grid() -> Iterator[Case]:
    """Where a user may stand: nothing here should lose."""
    lengths, head_dims = (1, 16, 128, 512, 2048), (32, 64, 80, 128)
    for batch, nheads, seqlen, head_dim in product((1, 8), (1, 12, 32), lengths, head_dims):
        full = Case(batch, nheads, seqlen, seqlen, head_dim)
        yield from _in_types(full, replace(full, causal=True), replace(full, masked=True))
        if nheads % 4 == 0:
            yield from _in_types(replace(full, nheads_k=nheads // 4))


GRID = list(_grid())

# A third of those that take well under a second. A fixed draw, since every third would always meet
# the same kinds.
_SMALL = [case for case in GRID if case.flops < 5e9]
GRID_QUICK = random.Random(0).sample(_SMALL, len(_SMALL) // 3)


class Inputs(NamedTuple):
    """One copy of a case's tensors. [B, S, H, D], laid out in memory as torch's SDPA wants them."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None  # [1, 1, Sq, Sk]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Normal tensors; a mask hides a fifth of the pairs, and never a whole row."""
    q, k, v = qkv(
        case.batch, case.nheads, case.kv_heads, case.seqlen_q, case.seqlen_k, case.head_dim,
        dtype=DTYPES[case.dtype], seed=seed, transposed=True,
    )  # fmt: skip
    mask = None
    if case.masked:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(1, 1, case.seqlen_q, case.seqlen_k, generator=generator) < 0.8
        mask[..., 0] = True
    return Inputs(q, k, v, torch.roll(q, 1, dims=1) if case.backward else q, mask)


def make_copies(case: Case) -> list[Inputs]:
    """One copy of the inputs; for decode as many as keep each one out of the caches.

    A model reads every layer's cache between two visits to the same one, so a user's is cold.
    """
    count = 1
    if case.is_decode:
        count = min(max(2, math.ceil(3 * _last_level_cache() / case.bytes)), 64)
    return [make_inputs(case, seed) for seed in range(count)]


def _last_level_cache() -> int:
    """Bytes of the largest cache that cpu 0 can see; 64 MiB where the system does not say."""
    sizes = [
        int(text.removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip()).removesuffix("K").isdecimal()
    ]
    return max(sizes, default=64 << 20)


def _fastattn(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = op.attention(q, k, v, causal=case.causal, mask=mask)
    assert isinstance(out, Tensor)
    return out


def _sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=case.causal, enable_gqa=case.nheads_k > 0
    )


def _math(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _sdpa(case, q, k, v, mask)


# All but the first want [B, H, S, D].
PEERS = {"fastattn": _fastattn, "sdpa": _sdpa, "math": _math}


def bind(peer: str, case: Case, x: Inputs) -> Callable[[], Tensor | Result]:
    """The call to time. Views and leaves are made here, outside of it."""
    run = PEERS[peer]
    q, k, v, dout = (t if peer == "fastattn" else t.transpose(1, 2) for t in x[:4])
    if not case.backward:
        return partial(run, case, q, k, v, x.mask)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))

    def step() -> Result:
        out = run(case, q, k, v, x.mask)
        return (out, *torch.autograd.grad(out, (q, k, v), dout))

    return step


def bind_read(core: ModuleType, x: Inputs) -> Callable[[], None]:
    """One pass over k and v: the roof of decode, on the same memory at the same moment."""
    threads = torch.get_num_threads()

    def read() -> None:
        for t in (x.k, x.v):
            core.read_pass(t.data_ptr(), t.numel() * t.element_size(), threads)

    return read


def check(case: Case, x: Inputs, peers: list[str]) -> dict[str, float]:
    """Holds the first peer to the error rule and measures the others beside it.

    Every peer runs the whole case, exactly as it is timed. Compared with the float64 reference is
    what that can afford: the first KV head of the first sequence and the last one of the last,
    with all query heads that read it, and of their rows the first or last 256 (all of them for
    gradients). Everything else must at least be finite.

    Returns:
        Per peer the largest absolute error, over out and the gradients.

    Raises:
        AssertionError: the first peer breaks the rule.
    """
    found = dict.fromkeys(peers, 0.0)
    results = {peer: _run(peer, case, x) for peer in peers}
    for name, tensor in zip(("out", "dq", "dk", "dv"), results[peers[0]], strict=False):
        if not tensor.isfinite().all():
            raise AssertionError(f"{name} has values that are not finite")
    few = case.seqlen_q if case.backward else min(case.seqlen_q, 256)
    for batch, head, rows in (
        (0, 0, slice(0, few)),
        (case.batch - 1, case.kv_heads - 1, slice(case.seqlen_q - few, case.seqlen_q)),
    ):
        part = _Part(case, batch, head, rows)
        truth, base = part.reference(x, torch.float64), part.reference(x, DTYPES[case.dtype])
        for peer in peers:
            for i, (t, b) in enumerate(zip(truth, base, strict=True)):
                got = part.of_result(results[peer], i)
                if peer == peers[0]:
                    compare.assert_close(got, b, t, ("out", "dq", "dk", "dv")[i])
                found[peer] = max(found[peer], compare.errors(got, b, t).ours)
    return found


def _run(peer: str, case: Case, x: Inputs) -> Result:
    """A peer's results, in fastattn's layout."""
    result = bind(peer, case, x)()
    tensors = (result,) if isinstance(result, Tensor) else result
    return tuple((t if peer == "fastattn" else t.transpose(1, 2)).detach() for t in tensors)


class _Part:
    """One KV head of one sequence, with its query heads and some of their rows."""

    def __init__(self, case: Case, batch: int, kv_head: int, rows: slice) -> None:
        group = case.nheads // case.kv_heads
        self.case = case
        self.rows = rows
        # Rows before the last see no key beyond this one, so that the cut keeps causal's alignment.
        self.end = rows.stop + case.seqlen_k - case.seqlen_q if case.causal else case.seqlen_k
        batches = slice(batch, batch + 1)
        self.q_index = (batches, rows, slice(kv_head * group, (kv_head + 1) * group))
        self.k_index = (batches, slice(0, self.end), slice(kv_head, kv_head + 1))

    def reference(self, x: Inputs, dtype: torch.dtype) -> Result:
        """Plain PyTorch on this part, in the given type."""
        q, k, v = (
            t[index].to(dtype).detach().requires_grad_(self.case.backward)
            for t, index in ((x.q, self.q_index), (x.k, self.k_index), (x.v, self.k_index))
        )
        mask = None if x.mask is None else x.mask[:, :, self.rows, : self.end]
        out, _ = op.attention_reference(op.check(q, k, v, causal=self.case.causal, mask=mask))
        if not self.case.backward:
            return (out,)
        gradients = torch.autograd.grad(out, (q, k, v), x.dout[self.q_index].to(dtype))
        return (out.detach(), *gradients)

    def of_result(self, result: Result, i: int) -> Tensor:
        """This part of out (0), dq (1), dk (2) or dv (3)."""
        return result[i][self.q_index if i < 2 else self.k_index]
