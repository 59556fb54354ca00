"""One call of layer_norm, rms_norm or rotary held against the error rule, and what its tests run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, layer_norm, rms_norm, rotary
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

Given = dict[str, Any]  # the arguments of a call, by name

_DIFFERENTIABLE = ("x", "weight", "bias", "residual")


def check_op(op: Callable[..., Any], given: Given, *, backend: str, gradients: bool = True) -> None:
    """Raises AssertionError where a result or a gradient breaks the error rule."""
    wide = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }
    ours = op_results(op, given, backend=backend, gradients=gradients)
    base = op_results(op, given, backend=dispatch.REFERENCE, gradients=gradients)
    truth = op_results(op, wide, backend=dispatch.REFERENCE, gradients=gradients)
    for name in truth:
        assert_close(ours[name], base[name], truth[name], name, given["x"].dtype)


def op_results(
    op: Callable[..., Any], given: Given, *, backend: str, gradients: bool = True
) -> dict[str, Tensor]:
    """out, total and, for a fixed upstream gradient of both, the gradient of each differentiable input."""
    leaves = {
        name: given[name].detach().requires_grad_(gradients)
        for name in _DIFFERENTIABLE
        if given.get(name) is not None
    }
    raw = op(**{**given, **leaves}, backend=backend)
    outputs = (raw,) if isinstance(raw, Tensor) else raw
    found = dict(zip(("out", "total"), (x.detach() for x in outputs), strict=False))
    if gradients:
        grads = torch.autograd.grad(outputs, list(leaves.values()), [upstream(x) for x in outputs])
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


class _Draw:
    """Random tensors that fit x."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.generator = torch.Generator().manual_seed(2)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.x.dtype)

    def row(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(self.x.shape[-1], dtype=dtype)

    def residual(self) -> Tensor:
        return self.normal(*self.x.shape)

    def angles(self, *shape: int, dtype: torch.dtype = torch.float32) -> Given:
        angles = torch.rand(shape, generator=self.generator) * 100.0
        return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}

    def positions(self, *shape: int, count: int) -> Tensor:
        return torch.randint(0, count, shape, generator=self.generator)


_NORM_OPTION_SETS: dict[str, Callable[[_Draw], Given]] = {
    "plain": lambda d: {},
    "weight": lambda d: {"weight": d.row()},
    "weight_float32": lambda d: {"weight": d.row(torch.float32)},
    "residual": lambda d: {"residual": d.residual()},
    "eps": lambda d: {"weight": d.row(), "eps": 0.3},
    "residual_weight": lambda d: {"residual": d.residual(), "weight": d.row()},
}
_LAYER_OPTION_SETS: dict[str, Callable[[_Draw], Given]] = {
    "bias": lambda d: {"bias": d.row()},
    "weight_bias": lambda d: {"weight": d.row(), "bias": d.row()},
    "bias_float32": lambda d: {"weight": d.row(), "bias": d.row(torch.float32)},
    "everything": lambda d: {
        "weight": d.row(),
        "bias": d.row(),
        "residual": d.residual(),
        "eps": 1e-3,
    },
}
_RMS_OPTION_SETS: dict[str, Callable[[_Draw], Given]] = {
    "offset": lambda d: {"weight": d.row(), "weight_offset": 1.0},
    "everything": lambda d: {
        "weight": d.row(),
        "residual": d.residual(),
        "eps": 1e-3,
        "weight_offset": -0.5,
    },
}
_NORM_SETS = {
    layer_norm: _NORM_OPTION_SETS | _LAYER_OPTION_SETS,
    rms_norm: _NORM_OPTION_SETS | _RMS_OPTION_SETS,
}
NORM_OPTION_SETS = [(op, name) for op, sets in _NORM_SETS.items() for name in sets]


def norm_inputs(op: Callable[..., Any], option: str, *shape: int, dtype: torch.dtype, seed: int = 0) -> Given:
    """Normal x of a shape, and one option set drawn to fit it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return {"x": x, **_NORM_SETS[op][option](_Draw(x))}


# Each takes the draw and R / 2; x is [B, S, H, D].
_ROTARY_OPTION_SETS: dict[str, Callable[[_Draw, int], Given]] = {
    "tables": lambda d, pairs: d.angles(d.x.shape[1], pairs),
    "tables_in_type": lambda d, pairs: d.angles(d.x.shape[1] + 3, pairs, dtype=d.x.dtype),
    "tokens": lambda d, pairs: d.angles(*d.x.shape[:2], pairs),
    "shared_tokens": lambda d, pairs: d.angles(1, d.x.shape[1], pairs, dtype=d.x.dtype),
    "positions": lambda d, pairs: {
        **d.angles(50, pairs),
        "positions": d.positions(*d.x.shape[:2], count=50),
    },
    "positions_int32": lambda d, pairs: {
        **d.angles(300, pairs, dtype=d.x.dtype),
        "positions": d.positions(d.x.shape[1], count=300).int(),
    },
}
ROTARY_OPTION_SETS = tuple(_ROTARY_OPTION_SETS)


def rotary_inputs(
    option: str, *shape: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool = False, seed: int = 0
) -> Given:
    """Normal x [B, S, H, D], and one option set drawn to fit it."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tables = _ROTARY_OPTION_SETS[option](_Draw(x), rotary_dim // 2)
    return {"x": x, **tables, "interleaved": interleaved}


OPS = (layer_norm, rms_norm, rotary)
