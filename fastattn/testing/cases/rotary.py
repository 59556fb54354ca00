"""rotary on [B, S, H, D]: the queries or keys of one layer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import REFERENCE
from fastattn.ops import rotary as op
from fastattn.testing.cases.case import DTYPES, Call, Case, Curve, Part, Result
from fastattn.testing.cases.layer_norm import in_types
from fastattn.testing.cases.peers import OURS


class Inputs(NamedTuple):
    """One copy of a case's tensors."""

    x: Tensor  # [B, S, H, D]
    dout: Tensor  # [B, S, H, D]
    cos: Tensor  # float32 [S, D / 2]
    sin: Tensor


@dataclass(frozen=True)
class RotaryCase(Case[Inputs]):
    """One shape; whole heads are turned."""

    op: ClassVar[str] = "rotary"
    results: ClassVar[tuple[str, ...]] = ("out", "dx")

    batch: int
    seqlen: int
    nheads: int
    head_dim: int
    dtype: str = "fp32"
    interleaved: bool = False
    backward: bool = False
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return "torch", "compiled"

    @property
    def is_bandwidth_bound(self) -> bool:
        """See `Case`. A few tokens are bound by the call itself."""
        return self.batch * self.seqlen >= 64

    @property
    def name(self) -> str:
        """For example `rotary fwd 1,2048,32,128 halves`: [B, S, H, D]."""
        sizes = f"{self.batch},{self.seqlen},{self.nheads},{self.head_dim}"
        kind, order = "fwd+bwd" if self.backward else "fwd", "interleaved" if self.interleaved else "halves"
        return f"{self.op} {kind} {sizes} {order}"

    @property
    def values(self) -> int:
        """How many x has."""
        return self.batch * self.seqlen * self.nheads * self.head_dim

    @property
    def flops(self) -> int:
        """Two products and a sum for each value, once more backward."""
        return 3 * self.values * (2 if self.backward else 1)

    @property
    def bytes(self) -> int:
        """Of x and out; backward, of dout and dx too."""
        return 2 * self.values * DTYPES[self.dtype].itemsize * (2 if self.backward else 1)

    def make_inputs(self, seed: int = 0) -> Inputs:
        """Normal tensors, and the usual angles."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.seqlen, self.nheads, self.head_dim)
        x, dout = (torch.randn(shape, generator=generator).to(DTYPES[self.dtype]) for _ in range(2))
        speeds = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(self.seqlen)[:, None] * speeds
        return Inputs(x, dout, angles.cos(), angles.sin())

    def reads(self, x: Inputs) -> tuple[Tensor, ...]:
        """As many tensors as are read and written."""
        return x[:2] * (2 if self.backward else 1)

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`. The peers get their tables as they want them, made before the clock starts."""
        leaf = x.x.detach().requires_grad_(self.backward)
        run = partial(self._turn(peer, x), leaf)

        def step() -> Result:
            out = run()
            return (out, *torch.autograd.grad(out, leaf, x.dout))

        if self.backward:
            return Call(step, lambda results: tuple(t.detach() for t in results))
        return Call(run, lambda out: (out,))

    def _turn(self, peer: str, x: Inputs) -> Callable[[Tensor], Tensor]:
        if peer in (OURS, REFERENCE):
            run = op.rotary if peer == OURS else _defined
            return partial(run, cos=x.cos, sin=x.sin, interleaved=self.interleaved)
        if self.interleaved:
            plain = partial(_complex, angles=torch.complex(x.cos, x.sin)[:, None])
        else:
            cos, sin = (torch.cat([t, t], dim=-1)[:, None].to(x.x.dtype) for t in (x.cos, x.sin))
            plain = partial(_halves, cos=cos, sin=sin)
        return plain if peer == "torch" else torch.compile(plain, dynamic=False)

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The first and the last head."""
        for heads in (slice(0, 1), slice(-1, None)):
            cut = x._replace(x=x.x[:, :, heads], dout=x.dout[:, :, heads])
            yield Part(partial(self.reference, cut), partial(_cut, heads=heads))

    def reference(self, x: Inputs, dtype: torch.dtype) -> Result:
        """Ours by its definition, in the given type."""
        tables = (t.double() if dtype is torch.float64 else t for t in (x.cos, x.sin))
        call = self.bind(REFERENCE, Inputs(x.x.to(dtype), x.dout.to(dtype), *tables))
        return call.result(call.run())


def _cut(result: Result, heads: slice) -> Result:
    return tuple(t[:, :, heads] for t in result)


def _defined(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return op.rotary_reference(op.check(x, cos, sin, interleaved=interleaved))


def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers' models do it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _complex(x: Tensor, angles: Tensor) -> Tensor:
    """As the original code of Llama does it."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2).type_as(x)


_PROMPT = RotaryCase(1, 2048, 32, 128)
ROTARY: list[Any] = in_types(
    _PROMPT,
    replace(_PROMPT, backward=True),
    replace(_PROMPT, interleaved=True),
    RotaryCase(4, 1024, 12, 64, backward=True),
    RotaryCase(1, 1, 32, 128),
)
ROTARY_QUICK = ROTARY[:3]
