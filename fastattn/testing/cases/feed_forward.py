"""The MLP of GPT-2 and its kin, for one token and for thousands, in inference and in training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import feed_forward as op
from fastattn.testing.cases.case import Part
from fastattn.testing.cases.product import FEW, Given, Inputs, ProductCase


@dataclass(frozen=True)
class FeedForwardCase(ProductCase):
    """One shape: two products with GELU between them."""

    op: ClassVar[str] = "feed_forward"

    rows: int
    features: int
    hidden: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """M, K, F, N."""
        return self.rows, self.features, self.hidden, self.features

    @property
    def weights(self) -> int:
        """Of both matrices."""
        return 2 * self.features * self.hidden

    @property
    def name(self) -> str:
        """For example `fwd+bwd mlp 128,768-3072-768 gelu`: [M, K - F - N]."""
        return f"{self.kind} mlp {self.rows},{self.features}-{self.hidden}-{self.features} gelu"

    def ours(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        return op.feed_forward(**given)

    def eager(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        hidden = F.gelu(F.linear(given["x"], given["w_up"], given["b_up"]))
        return F.linear(hidden, given["w_down"], given["b_down"])

    def parts(self, x: Inputs) -> Iterator[Part]:
        """Some rows with all hidden features; for gradients, all rows with some hidden features."""
        yield from self.row_parts(x)
        at = slice(self.hidden // 2, self.hidden // 2 + FEW)
        if self.backward:
            every = slice(None)
            yield self.part(
                x, partial(_cut_hidden, at), dw_up=at, db_up=at, dw_down=(every, at), db_down=every
            )


def _cut_hidden(at: slice, given: Given, dout: Tensor) -> tuple[Given, Tensor]:
    """Each hidden feature has gradients that do not depend on the others."""
    up = {"w_up": given["w_up"][at], "b_up": given["b_up"][at]}
    return {**given, **up, "w_down": given["w_down"][:, at]}, dout


_GPT2 = FeedForwardCase(1024, 768, 3072)
FEED_FORWARD = [
    replace(_GPT2, rows=rows, backward=backward, dtype=dtype)
    for backward in (False, True)
    for rows in (1, 8, 128, 1024, 4096)
    for dtype in ("fp32", "bf16")
]
FEED_FORWARD_QUICK = [
    case for case in FEED_FORWARD if (case.rows, case.backward) in ((1, False), (128, False), (1024, True))
]
