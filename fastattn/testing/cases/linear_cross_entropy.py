"""The head of a language model and its loss, in evaluation and in training."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import linear_cross_entropy as op
from fastattn.testing.cases.case import Part, Result
from fastattn.testing.cases.product import FEW, Given, Inputs, ProductCase


@dataclass(frozen=True)
class CrossEntropyCase(ProductCase):
    """One shape: tokens, features, classes; the mean over the tokens."""

    op: ClassVar[str] = "linear_cross_entropy"
    has_bias: ClassVar[bool] = False

    rows: int
    features: int
    classes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """M, K, V."""
        return self.rows, self.features, self.classes

    @property
    def weights(self) -> int:
        """Of the head."""
        return self.features * self.classes

    @property
    def out_shape(self) -> tuple[int, ...]:
        """A loss."""
        return ()

    @property
    def name(self) -> str:
        """For example `fwd+bwd loss 2048,768-50257`: [M, K - V]."""
        return f"{self.kind} loss {self.rows},{self.features}-{self.classes}"

    def ours(self, **given: Any) -> Tensor:
        """See `ProductCase`."""
        return op.linear_cross_entropy(**given)

    def eager(self, **given: Any) -> Tensor:
        """The mean, also where a part has some of the rows."""
        logits = _wide(F.linear(given["x"], given["weight"]))
        return F.cross_entropy(logits, given["target"], reduction="sum") / self.rows

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The whole loss and, for gradients, dweight of some classes and dx of some rows."""
        classes = slice(self.classes // 2, self.classes // 2 + FEW)
        names = ("out", "dweight") if self.backward else ("out",)

        def of(result: Result) -> Result:
            return (result[0], result[2][classes]) if self.backward else result

        yield Part(partial(self._loss_and_dweight, x, classes), of, names)
        if self.backward:
            for at in (slice(0, FEW), slice(max(self.rows - FEW, 0), self.rows)):
                yield self.part(x, partial(_cut_rows, at), dx=at)

    def _loss_and_dweight(self, x: Inputs, classes: slice, dtype: torch.dtype) -> Result:
        """Of all rows, a few at a time: all logits in float64 are large."""
        rows, weight = x.given["x"].to(dtype), x.given["weight"].to(dtype)
        losses, dlogits = [], []
        for few, target in zip(rows.split(4 * FEW), x.given["target"].split(4 * FEW), strict=True):
            logits = _wide(F.linear(few, weight))
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            dlogit = logits.softmax(dim=-1)
            dlogit[torch.arange(len(target)), target] -= 1.0
            dlogits.append(dlogit[:, classes].clone())
        loss = torch.cat(losses).mean()
        if not self.backward:
            return (loss,)
        scale = x.dout.to(loss.dtype) / self.rows
        return loss, (torch.cat(dlogits) * scale).to(dtype).t() @ rows


def _cut_rows(at: slice, given: Given, dout: Tensor) -> tuple[Given, Tensor]:
    return {**given, "x": given["x"][at], "target": given["target"][at]}, dout


def _wide(logits: Tensor) -> Tensor:
    """As losses are computed: in float32, or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


_GPT2 = CrossEntropyCase(2048, 768, 50257)
LINEAR_CROSS_ENTROPY = [
    replace(_GPT2, backward=backward, dtype=dtype) for backward in (False, True) for dtype in ("fp32", "bf16")
]
LINEAR_CROSS_ENTROPY_QUICK = [replace(_GPT2, rows=256, dtype=dtype) for dtype in ("fp32", "bf16")]
