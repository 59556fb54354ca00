"""The SwiGLU of Llama and its kin, for one token and for a prompt, in inference and in training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import gated_feed_forward as op
from fastattn.testing.cases.case import Part
from fastattn.testing.cases.product import FEW, Given, Inputs, ProductCase


@dataclass(frozen=True)
class GatedCase(ProductCase):
    """One shape: gate and up, SiLU of the one times the other, down."""

    op: ClassVar[str] = "gated_feed_forward"
    has_bias: ClassVar[bool] = False

    rows: int
    features: int
    hidden: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """M, K, F, N."""
        return self.rows, self.features, self.hidden, self.features

    @property
    def weights(self) -> int:
        """Of the three matrices."""
        return 3 * self.features * self.hidden

    @property
    def name(self) -> str:
        """For example `fwd mlp 8,2048-5632-2048 swiglu`: [M, K - F - N]."""
        return f"{self.kind} mlp {self.rows},{self.features}-{self.hidden}-{self.features} swiglu"

    def ours(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        return op.gated_feed_forward(**given)

    def eager(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        x = given["x"]
        hidden = F.silu(F.linear(x, given["w_gate"])) * F.linear(x, given["w_up"])
        return F.linear(hidden, given["w_down"])

    def parts(self, x: Inputs) -> Iterator[Part]:
        """Some rows with all hidden features; for gradients, all rows with some hidden features."""
        yield from self.row_parts(x)
        at = slice(self.hidden // 2, self.hidden // 2 + FEW)
        if self.backward:
            yield self.part(x, partial(_cut_hidden, at), dw_gate=at, dw_up=at, dw_down=(slice(None), at))


def _cut_hidden(at: slice, given: Given, dout: Tensor) -> tuple[Given, Tensor]:
    """Each hidden feature has gradients that do not depend on the others."""
    cut = {"w_gate": given["w_gate"][at], "w_up": given["w_up"][at], "w_down": given["w_down"][:, at]}
    return {**given, **cut}, dout


_LLAMA = GatedCase(1024, 2048, 5632)
GATED_FEED_FORWARD = [
    replace(_LLAMA, rows=rows, backward=backward, dtype=dtype)
    for backward in (False, True)
    for rows in (1, 8, 1024)
    for dtype in ("fp32", "bf16")
]
GATED_FEED_FORWARD_QUICK = [case for case in GATED_FEED_FORWARD if case.rows < 1024 and not case.backward]
