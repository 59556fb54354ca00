"""Linear layers as models have them: a projection, and the first half of an MLP."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import linear as op
from fastattn.ops._activation import activate, check_activation
from fastattn.testing.cases.case import Part
from fastattn.testing.cases.product import FEW, Given, Inputs, ProductCase


@dataclass(frozen=True)
class LinearCase(ProductCase):
    """One shape: [M, K] times [K, N], a bias, maybe an activation."""

    op: ClassVar[str] = "linear"

    rows: int
    features: int
    out: int
    activation: str | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """M, K, N."""
        return self.rows, self.features, self.out

    @property
    def weights(self) -> int:
        """Of the one matrix."""
        return self.features * self.out

    @property
    def name(self) -> str:
        """For example `fwd linear 128,768-3072 gelu`: [M, K - N]."""
        return f"{self.kind} linear {self.rows},{self.features}-{self.out} {self.activation or 'plain'}"

    def ours(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        return op.linear(**given, activation=self.activation)

    def eager(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        out = F.linear(given["x"], given["weight"], given["bias"])
        return activate(check_activation(self.activation), out)

    def parts(self, x: Inputs) -> Iterator[Part]:
        """Some rows with all columns, and all rows of some columns."""
        yield from self.row_parts(x)
        at = slice(self.out // 2, self.out // 2 + FEW)
        yield self.part(x, partial(_cut_columns, at), out=(slice(None), at), dweight=at, dbias=at)


def _cut_columns(at: slice, given: Given, dout: Tensor) -> tuple[Given, Tensor]:
    return {**given, "weight": given["weight"][at], "bias": given["bias"][at]}, dout[:, at]


_UP = LinearCase(1024, 768, 3072, "gelu")
_PROJECTION = LinearCase(1024, 768, 768)
_SHAPES = [
    *(replace(_UP, rows=rows) for rows in (1, 8, 128, 1024, 4096)),
    replace(_UP, activation=None),
    _PROJECTION,
    replace(_UP, backward=True),
    replace(_PROJECTION, backward=True),
]
LINEAR = [replace(case, dtype=dtype) for case in _SHAPES for dtype in ("fp32", "bf16")]
LINEAR_QUICK = [case for case in LINEAR if case.activation and case.rows in (1, 1024)]
