"""Launches the layer_norm kernels of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import TYPE_CODES, core, missing


def unsupported(call: Any) -> str | None:
    """Why these kernels refuse a call, or None."""
    if core is None:
        return missing
    if call[0].dtype not in TYPE_CODES:
        return f"has no kernel for {call[0].dtype}"
    return None


def layer_norm_fwd(
    call: Any, for_backward: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """out [M, N], total [M, N] with a residual and, where a backward follows, mean and rstd [M]."""
    x, _, _, residual, _ = call
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(out)
    mean = torch.empty(x.shape[0], dtype=torch.float32) if for_backward else None
    rstd = None if mean is None else torch.empty_like(mean)
    core.layer_norm_fwd(call, out, total, mean, rstd, torch.get_num_threads())
    return out, total, mean, rstd


def layer_norm_bwd(
    dout: Tensor,
    dtotal: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    call: Any,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, N], dweight and dbias [N], empty where not needed. The call's x is what was normalised."""
    total, weight, bias, _, _ = call
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    if dtotal is not None and dtotal.stride(1) != 1:
        dtotal = dtotal.contiguous()
    dx = torch.empty(total.shape, dtype=total.dtype)
    dweight = torch.empty_like(weight) if need_dweight else None
    dbias = torch.empty_like(bias) if need_dbias else None
    gradients = (dout, dtotal, mean, rstd, dx, dweight, dbias)
    core.layer_norm_bwd(call, gradients, torch.get_num_threads())
    nothing = [dx.new_empty(0) if x is None else x for x in (dweight, dbias)]
    return dx, nothing[0], nothing[1]
