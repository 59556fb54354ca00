"""What layer_norm and rms_norm share: their checks, and the form [M, N] of rows of any rank."""

import math
from typing import TypeGuard

from torch import Tensor

from fastattn.ops._checks import TYPES, check_tensor

Rows = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def check_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Rows:
    """Returns x [M, N], weight [N], bias [N] and residual [M, N], each with a last stride of 1.

    Good input passes one condition; the rest finds out what is wrong.
    """
    if not (
        isinstance(x, Tensor)
        and x.dtype in TYPES
        and len(sizes := x.shape) > 0
        and sizes[-1] > 0
        and (weight is None or _is_parameter(weight, x))
        and (bias is None or _is_parameter(bias, x))
        and (residual is None or _is_alike(residual, x))
        and isinstance(eps, float | int)
        and 0.0 <= eps < math.inf
    ):
        raise _error(x, weight, bias, residual, eps)
    return (
        _rows(x),
        None if weight is None else _dense(weight),
        None if bias is None else _dense(bias),
        None if residual is None else _rows(residual),
    )


def _is_parameter(p: object, x: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(p, Tensor)
        and p.shape == x.shape[-1:]
        and (p.dtype is x.dtype or p.dtype is TYPES[0])
        and p.device == x.device
    )


def _is_alike(residual: object, x: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device
    )


def _error(x: Tensor, weight: object, bias: object, residual: object, eps: object) -> Exception:
    check_tensor("x", x)
    if x.dtype not in TYPES:
        return TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        return ValueError(f"x must have shape [..., N] with N at least 1, got {list(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and not _is_parameter(p, x):
            return parameter_error(name, p, x)
    if residual is not None and not _is_alike(residual, x):
        return _residual_error(residual, x)
    if not isinstance(eps, float | int):
        return TypeError(f"eps must be a number, got {type(eps).__name__}")
    return ValueError(f"eps must be finite and at least 0, got {eps}")


def parameter_error(name: str, p: object, x: Tensor) -> Exception:
    """Why p is no [N] that goes with x."""
    if not isinstance(p, Tensor):
        return TypeError(f"{name} must be a tensor, got {type(p).__name__}")
    if p.dtype is not x.dtype and p.dtype is not TYPES[0]:
        return TypeError(f"{name} must be in x's type {x.dtype} or float32, got {p.dtype}")
    if p.device != x.device:
        return ValueError(f"{name} must be on x's device {x.device}, got {p.device}")
    return ValueError(f"{name} must have shape [N] = [{x.shape[-1]}], got {list(p.shape)}")


def _residual_error(residual: object, x: Tensor) -> Exception:
    if not isinstance(residual, Tensor):
        return TypeError(f"residual must be a tensor, got {type(residual).__name__}")
    if residual.dtype is not x.dtype:
        return TypeError(f"residual must be in x's type {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        return ValueError(f"residual must be on x's device {x.device}, got {residual.device}")
    return ValueError(f"residual must have x's shape {list(x.shape)}, got {list(residual.shape)}")


def _rows(x: Tensor) -> Tensor:
    """x [..., N] as [M, N], copied only where there is no such view."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _dense(p: Tensor) -> Tensor:
    return p if p.stride(0) == 1 else p.contiguous()


def shaped(x: Tensor, residual: Tensor | None, out: Tensor, total: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What the ops return: in x's shape, with the total where there was a residual."""
    if x.ndim != 2:
        out = out.view(x.shape)
        total = total if residual is None else total.view(x.shape)
    return out if residual is None else (out, total)
