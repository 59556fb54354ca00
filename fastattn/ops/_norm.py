"""What layer_norm and rms_norm share: their checks, and the form in which rows of any rank go down."""

import math

import torch
from torch import Tensor

from fastattn.ops._checks import TYPES, check_tensor

Rows = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

_MAX_RANK = 4  # of a tensor that the core reads


def check_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Rows:
    """Returns x, weight [N], bias [N] and residual, each with a last stride of 1.

    x and residual stay as they are where both are contiguous and have up to 4 dimensions; else they are
    made [M, N]. Good input passes one condition; the rest finds out what is wrong.
    """
    if not (
        isinstance(x, Tensor)
        and (dtype := x.dtype) in TYPES
        and (rank := x.ndim) > 0
        and (columns := x.shape[-1]) > 0
        and (weight is None or _is_parameter(weight, x, columns))
        and (bias is None or _is_parameter(bias, x, columns))
        and (
            residual is None
            or (
                isinstance(residual, Tensor)
                and residual.dtype is dtype
                and residual.shape == x.shape
                and residual.device == x.device
            )
        )
        and isinstance(eps, float | int)
        and 0.0 <= eps < math.inf
    ):
        raise _error(x, weight, bias, residual, eps)
    if rank > _MAX_RANK or not (x.is_contiguous() and (residual is None or residual.is_contiguous())):
        x, residual = _rows(x), None if residual is None else _rows(residual)
    weight = weight if weight is None or weight.is_contiguous() else weight.contiguous()
    return x, weight, bias if bias is None or bias.is_contiguous() else bias.contiguous(), residual


def _is_parameter(p: object, x: Tensor, columns: int) -> bool:
    return (
        isinstance(p, Tensor)
        and p.ndim == 1
        and p.shape[0] == columns
        and (p.dtype is x.dtype or p.dtype is torch.float32)
        and p.device == x.device
    )


def _error(x: Tensor, weight: object, bias: object, residual: object, eps: object) -> Exception:
    check_tensor("x", x)
    if x.dtype not in TYPES:
        return TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        return ValueError(f"x must have shape [..., N] with N at least 1, got {list(x.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and not _is_parameter(p, x, x.shape[-1]):
            return _parameter_error(name, p, x)
    if not isinstance(eps, float | int):
        return TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= eps < math.inf:
        return ValueError(f"eps must be finite and at least 0, got {eps}")
    return _residual_error(residual, x)


def _parameter_error(name: str, p: object, x: Tensor) -> Exception:
    if not isinstance(p, Tensor):
        return TypeError(f"{name} must be a tensor, got {type(p).__name__}")
    if p.dtype is not x.dtype and p.dtype is not torch.float32:
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


def shaped(
    x: Tensor, call_x: Tensor, residual: Tensor | None, out: Tensor, total: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """What the ops return: in x's shape, with the total where there was a residual."""
    if call_x.ndim != x.ndim:
        out = out.view(x.shape)
        total = total if residual is None else total.view(x.shape)
    return out if residual is None else (out, total)
