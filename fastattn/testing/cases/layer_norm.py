"""layer_norm on [M, N], with the residual added before it: what stands between two blocks of a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dispatch import REFERENCE
from fastattn.ops import layer_norm as op
from fastattn.testing.cases.case import DTYPES, Call, Case, Curve, Part, Result
from fastattn.testing.cases.peers import OURS

Norm = Callable[..., tuple[Tensor, Tensor]]  # x, residual and the parameters to out and total


class Inputs(NamedTuple):
    """One copy of a case's tensors: [M, N], the parameters [N]."""

    x: Tensor
    residual: Tensor
    dout: Tensor
    dtotal: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LayerNormCase(Case[Inputs]):
    """One shape, with a residual."""

    op: ClassVar[str] = "layer_norm"
    results: ClassVar[tuple[str, ...]] = ("out", "total", "dx", "dweight", "dbias")
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

    rows: int
    columns: int
    dtype: str = "fp32"
    backward: bool = False
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return "torch", "compiled"

    @property
    def is_bandwidth_bound(self) -> bool:
        """See `Case`. A few rows are bound by the call itself."""
        return self.rows >= 64

    @property
    def name(self) -> str:
        """For example `layer_norm fwd+bwd 4096x2048`: rows and columns."""
        return f"{self.op} {'fwd+bwd' if self.backward else 'fwd'} {self.rows}x{self.columns}"

    @property
    def flops(self) -> int:
        """About 8 for each value, twice that backward."""
        return self.rows * self.columns * (24 if self.backward else 8)

    @property
    def bytes(self) -> int:
        """Of x, residual, out and total; backward, of dout, dtotal, total and dx."""
        return 4 * self.rows * self.columns * self.torch_dtype.itemsize * (2 if self.backward else 1)

    def make_inputs(self, seed: int = 0) -> Inputs:
        """Normal tensors."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DTYPES[self.dtype])

        x, residual, dout, dtotal = (normal(self.rows, self.columns) for _ in range(4))
        return Inputs(x, residual, dout, dtotal, normal(self.columns), normal(self.columns))

    def reads(self, x: Inputs) -> tuple[Tensor, ...]:
        """As many tensors as are read and written."""
        return x[:4] * (2 if self.backward else 1)

    def norm(self, peer: str) -> Norm:
        """The function that a peer calls."""
        return choose(peer, _ours, _defined, _plain)

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`."""
        names = ("x", "residual", *self.parameters)
        leaves = [getattr(x, name).detach().requires_grad_(self.backward) for name in names]
        run = partial(self.norm(peer), *leaves)
        if not self.backward:
            return Call(run, lambda results: results)

        def step() -> Result:
            results = run()
            dx, _, *rest = torch.autograd.grad(results, leaves, (x.dout, x.dtotal))
            return (*results, dx, *rest)

        return Call(step, lambda results: tuple(t.detach() for t in results))

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The first and the last 256 rows; with a backward all, since the parameters' gradients sum them."""
        if self.backward:
            yield Part(partial(self.reference, x), lambda result: result)
            return
        for rows in (slice(0, 256), slice(-256, None)):
            cut = x._replace(**{name: getattr(x, name)[rows] for name in Inputs._fields[:4]})
            yield Part(partial(self.reference, cut), partial(_cut, rows=rows))

    def reference(self, x: Inputs, dtype: torch.dtype) -> Result:
        """Ours by its definition, in the given type."""
        call = self.bind(REFERENCE, Inputs(*(t.to(dtype) for t in x)))
        return call.result(call.run())


def _cut(result: Result, rows: slice) -> Result:
    return tuple(t[rows] for t in result)


def choose(peer: str, ours: Norm, defined: Norm, plain: Norm) -> Norm:
    """Ours, ours by its definition, plain PyTorch, or that compiled."""
    if peer == "compiled":
        return torch.compile(plain, dynamic=False)
    return {OURS: ours, REFERENCE: defined}.get(peer, plain)


def _ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return op.layer_norm(x, weight, bias, residual=residual)  # type: ignore[return-value]


def _defined(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return op.layer_norm_reference(op.check(x, weight, bias, residual=residual))


def _plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


def in_types(*cases: Any) -> list[Any]:
    """Each case in float32 and bfloat16."""
    return [replace(case, dtype=dtype) for case in cases for dtype in ("fp32", "bf16")]


def shapes(case: type[LayerNormCase]) -> list[LayerNormCase]:
    """What both norms are timed on: a long batch, a model of GPT-2's size, one token."""
    return in_types(
        case(4096, 2048),
        case(4096, 2048, backward=True),
        case(2048, 768),
        case(2048, 768, backward=True),
        case(1, 2048),
    )


LAYER_NORM = shapes(LayerNormCase)
LAYER_NORM_QUICK = LAYER_NORM[4:7]
