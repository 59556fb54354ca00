"""The error rule: the only tolerance of the project.

With truth = the reference in float64 and base = plain PyTorch in the inputs' own type,
max|x - truth| <= 2 max|base - truth| + floor(type), for every output and every gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The floor, as a share of max|truth| (at least 1): 5 roundings to the type, for float32 those of a long
# sum. It is for cases in which the base happens to be exact: where one key takes all the weight,
# gradients are differences of equal numbers (docs/attention.md, "Limits").
_FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


class Errors(NamedTuple):
    """Largest absolute errors against the truth, and what the rule allows."""

    ours: float
    base: float
    allowed: float


def floor(dtype: torch.dtype, truth: Tensor, terms: float = 1.0) -> float:
    """The rule's absolute term for results of this size, each a sum of so many."""
    finite = truth[truth.isfinite()].abs()
    size = max(1.0, float(finite.max()) if finite.numel() else 0.0)
    return _FLOOR[dtype] * size * math.sqrt(max(terms, 1.0))


def errors(
    x: Tensor, base: Tensor, truth: Tensor, dtype: torch.dtype | None = None, terms: float = 1.0
) -> Errors:
    """Measures x and base against truth.

    Args:
        dtype: the inputs' type where x's own is wider (lse).
        terms: how many results were added up to one of x, whose errors add up like a random walk: the
            queries and heads that share a bias.
    """
    if x.shape != truth.shape or base.shape != truth.shape:
        raise AssertionError(f"shapes differ: {list(x.shape)}, {list(base.shape)}, {list(truth.shape)}")
    allowed_floor = floor(dtype or x.dtype, truth, terms)
    if x.numel() == 0:
        return Errors(0.0, 0.0, allowed_floor)
    # Where the base itself overflows it excuses nothing.
    base_error = _largest(torch.where(base.isfinite(), base.double(), truth.double()), truth)
    return Errors(_largest(x, truth), base_error, 2.0 * base_error + allowed_floor)


def assert_close(
    x: Tensor,
    base: Tensor,
    truth: Tensor,
    name: str = "result",
    dtype: torch.dtype | None = None,
    terms: float = 1.0,
) -> None:
    """Raises AssertionError where x breaks the error rule; infinities and NaN must stand where truth's do."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        if not torch.equal(kind(x), kind(truth)):
            where = (kind(x) != kind(truth)).nonzero()[0].tolist() if x.shape == truth.shape else "shape"
            raise AssertionError(f"{name}: {kind.__name__} differs from the truth at {where}")
    found = errors(x, base, truth, dtype, terms)
    if not found.ours <= found.allowed:
        raise AssertionError(
            f"{name}: error {found.ours:.3g} is over {found.allowed:.3g} "
            f"(PyTorch in the same type: {found.base:.3g})"
        )


def _largest(x: Tensor, truth: Tensor) -> float:
    finite = truth.isfinite()
    difference = (x.double() - truth.double())[finite].abs()
    return float(difference.max()) if difference.numel() else 0.0
