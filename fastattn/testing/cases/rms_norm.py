"""rms_norm on [M, N], with the residual added before it: what stands between two blocks of a model."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import rms_norm as op
from fastattn.testing.cases.layer_norm import LayerNormCase, Norm, choose, shapes

_EPS = 1e-6


@dataclass(frozen=True)
class RMSNormCase(LayerNormCase):
    """One shape, with a residual."""

    op: ClassVar[str] = "rms_norm"
    results: ClassVar[tuple[str, ...]] = ("out", "total", "dx", "dweight")
    parameters: ClassVar[tuple[str, ...]] = ("weight",)

    def norm(self, peer: str) -> Norm:
        """The function that a peer calls."""
        return choose(peer, _ours, _defined, _plain)


def _ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return op.rms_norm(x, weight, eps=_EPS, residual=residual)  # type: ignore[return-value]


def _defined(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return op.rms_norm_reference(op.check(x, weight, eps=_EPS, residual=residual))


def _plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, _EPS), total


RMS_NORM = shapes(RMSNormCase)
RMS_NORM_QUICK = RMS_NORM[4:7]
