"""What the cases of all ops around a matrix product share: x [M, K] times weights."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.testing import check_linear
from fastattn.testing.cases.case import DTYPES, Call, Case, Curve, Part, Result
from fastattn.testing.cases.peers import OURS

FEW = 64  # rows or columns of a part that is held against float64
_ROWS_OF_ONE_PASS = 8  # up to so many, a product takes as long as reading its weights

Given = dict[str, Any]  # an op's arguments by name


class Inputs(NamedTuple):
    """One copy of a case's tensors."""

    given: Given
    dout: Tensor


@dataclass(frozen=True)
class ProductCase(Case[Inputs]):
    """A subclass says which op, which sizes, what PyTorch has for it, and what is checked."""

    has_bias: ClassVar[bool] = True

    dtype: str = field(default="fp32", kw_only=True)
    backward: bool = field(default=False, kw_only=True)
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """As check_linear.OPS has them: rows first, then features of the input."""

    @property
    @abstractmethod
    def weights(self) -> int:
        """How many numbers the weights have."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[M, N]."""
        return self.sizes[0], self.sizes[-1]

    @abstractmethod
    def ours(self, **given: Any) -> Tensor:
        """The op."""

    @abstractmethod
    def eager(self, **given: Any) -> Tensor:
        """The same in plain PyTorch."""

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return "eager", "compiled"

    @property
    def kind(self) -> str:
        """How a name begins."""
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def is_bandwidth_bound(self) -> bool:
        """A few rows, as in generation: bound by reading the weights."""
        return self.sizes[0] <= _ROWS_OF_ONE_PASS and not self.backward

    @property
    def flops(self) -> int:
        """2 for each weight and row; three times that with a backward pass."""
        return 2 * self.sizes[0] * self.weights * (3 if self.backward else 1)

    @property
    def bytes(self) -> int:
        """Of x, weights and output; twice that with a backward pass."""
        rows, features = self.sizes[:2]
        numbers = self.weights + rows * features + math.prod(self.out_shape)
        return numbers * DTYPES[self.dtype].itemsize * (2 if self.backward else 1)

    def make_inputs(self, seed: int = 0) -> Inputs:
        """Normal tensors, weights of such a size that rows stay as large as they are."""
        given = check_linear.inputs(self.op, self.sizes, dtype=DTYPES[self.dtype], seed=seed)
        if not self.has_bias:
            given = {name: x for name, x in given.items() if not name.startswith("b")}
        dout = torch.randn(self.out_shape, generator=torch.Generator().manual_seed(seed + 1))
        return Inputs(given, dout.to(DTYPES[self.dtype]))

    def reads(self, x: Inputs) -> tuple[Tensor, ...]:
        """The weights."""
        return tuple(t for name, t in x.given.items() if name.startswith("w"))

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`."""
        function: Callable[..., Tensor] = self.ours if peer == OURS else self.eager
        if peer == "compiled":
            function = torch.compile(function, dynamic=False)
        run = partial(outputs, function, x.given, x.dout if self.backward else None)
        return Call(partial(run, leaves(x.given, self.backward)), _detached, result_names(x.given))

    def row_parts(self, x: Inputs) -> Iterator[Part]:
        """The first and the last rows: their out and dx."""
        rows = self.sizes[0]
        for at in (slice(0, FEW), slice(max(rows - FEW, 0), rows)):
            yield self.part(x, partial(_cut_rows, at), out=at, dx=at)

    def part(self, x: Inputs, cut: Callable[[Given, Tensor], tuple[Given, Tensor]], **pieces: Any) -> Part:
        """Some rows or some columns of a case, computed as if there were no others.

        Args:
            cut: makes the arguments and dout of the part.
            pieces: by the name of a result: where in the whole result that of the part stands.
        """
        names = tuple(name for name in pieces if name == "out" or self.backward)

        def reference(dtype: torch.dtype) -> Result:
            given, dout = cut(x.given, x.dout)
            given = {name: _cast(name, t, dtype) for name, t in given.items()}
            upstream = dout.to(dtype) if self.backward else None
            found = outputs(self.eager, given, upstream, leaves(given, self.backward))
            by_name = dict(zip(result_names(given), found, strict=False))
            return tuple(by_name[name].detach() for name in names)

        def of(result: Result) -> Result:
            by_name = dict(zip(result_names(x.given), result, strict=False))
            return tuple(by_name[name][pieces[name]] for name in names)

        return Part(reference, of, names)


def _cut_rows(at: slice, given: Given, dout: Tensor) -> tuple[Given, Tensor]:
    return {**given, "x": given["x"][at]}, dout[at]


def result_names(given: Given) -> tuple[str, ...]:
    """Of what `outputs` returns."""
    return "out", *(f"d{name}" for name, x in given.items() if check_linear.differentiable(name, x))


def leaves(given: Given, backward: bool) -> list[Tensor]:
    """The tensors that gradients are asked for."""
    return [
        x.detach().requires_grad_(backward)
        for name, x in given.items()
        if check_linear.differentiable(name, x)
    ]


def outputs(
    function: Callable[..., Tensor], given: Given, dout: Tensor | None, leaves: list[Tensor]
) -> Result:
    """out, or a step of training: out and the gradients."""
    names = (name for name, x in given.items() if check_linear.differentiable(name, x))
    out = function(**{**given, **dict(zip(names, leaves, strict=True))})
    if dout is None:
        return (out,)
    return (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def _detached(result: Result) -> Result:
    return tuple(x.detach() for x in result)


def _cast(name: str, x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if check_linear.differentiable(name, x) else x
