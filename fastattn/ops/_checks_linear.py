"""What the ops around a matrix product share: checks, the rows of a call, dropout on rows."""

from typing import Any

import torch
from torch import Tensor

from fastattn import dropout
from fastattn.ops._checks import TYPES, autocast, check_seed, check_tensor

# Planes of the dropout's counter: of the output, and of what stands between two products.
OUTPUT_PLANE = 0
HIDDEN_PLANE = 1

_PLAIN = (Tensor, torch.nn.Parameter)


def autocast_all(*tensors: Tensor | None) -> Any:
    """The tensors in autocast's type, where it is on."""
    return tuple(x if x is None else autocast(x) for x in tensors)


def needs_gradient(call: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in call)


def has_subclass(call: tuple[Any, ...]) -> bool:
    """Whether one of its tensors may keep its numbers elsewhere than a plain one."""
    return any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in call)


def check_x(x: Tensor) -> Tensor:
    """x [..., K] as its rows [M, K]."""
    check_tensor("x", x)
    if x.dtype not in TYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., K] with K at least 1, got {list(x.shape)}")
    return _rows(x)


def _rows(x: Tensor) -> Tensor:
    """[M, K] with a last stride of 1: a view where there is one."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{name} must be in x's type {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def check_weight(name: str, weight: Tensor, x: Tensor, layout: str, in_features: int) -> Tensor:
    """A weight [out, in] of which one stride is 1: itself, unless it is strided in both dimensions.

    Args:
        layout: how the docstring writes its shape.
    """
    _check_like(name, weight, x)
    if weight.ndim != 2 or weight.shape[1] != in_features or weight.shape[0] < 1:
        raise ValueError(
            f"{name} must have shape {layout} with {in_features} columns and at least 1 row, "
            f"got {list(weight.shape)}"
        )
    return weight if 1 in weight.stride() else weight.contiguous()


def check_bias(name: str, bias: Tensor | None, x: Tensor, size: int) -> Tensor | None:
    """A bias of as many numbers as its weight has rows, one after the other."""
    if bias is None:
        return None
    _check_like(name, bias, x)
    if tuple(bias.shape) != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(bias.shape)}")
    return bias.contiguous()


def check_residual(residual: Tensor | None, x: Tensor, size: int) -> Tensor | None:
    """residual [..., N] as rows that go with the rows of x [M, K]."""
    if residual is None:
        return None
    _check_like("residual", residual, x)
    nrows = x.shape[0]
    if residual.ndim < 1 or residual.shape[-1] != size or residual.numel() != nrows * size:
        raise ValueError(
            f"residual must have shape [..., {size}] with x's {nrows} rows, got {list(residual.shape)}"
        )
    return _rows(residual)


def check_dropout(seed: int | Tensor | None, **shares: float) -> Tensor | None:
    """The seed, where something is dropped or it is given."""
    for name, p in shares.items():
        if not 0.0 <= p < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {p}")
    return check_seed(seed) if seed is not None or any(shares.values()) else None


def drop(x: Tensor, seed: Tensor | None, p: float, plane: int) -> Tensor:
    """x [M, N] without a share p of it, in plain PyTorch."""
    if p == 0.0:
        return x
    assert seed is not None
    keep = dropout.keep_mask(seed.to(x.device), p, 1, x.shape[0], x.shape[1], plane)[0]
    return x * keep / (1.0 - p)


def split_residual(residual: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(what the op adds, what is added outside): autocast casts x, and no residual."""
    if isinstance(residual, Tensor) and residual.dtype is not x.dtype and residual.is_floating_point():
        return None, residual
    return residual, None


def add_outside(residual: Tensor | None, out: Tensor) -> Tensor:
    """Of `split_residual`'s second; in the wider of the two types."""
    if residual is None:
        return out
    if residual.shape[-1:] != out.shape[-1:] or residual.numel() != out.numel():
        raise ValueError(
            f"residual must have shape [..., {out.shape[-1]}] with x's {out[..., 0].numel()} rows, "
            f"got {list(residual.shape)}"
        )
    return residual.reshape(out.shape) + out
