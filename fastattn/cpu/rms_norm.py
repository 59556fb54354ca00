"""Launches the rms_norm kernels of csrc/cpu."""

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


def rms_norm_fwd(call: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [M, N], total [M, N] with a residual and, where a backward follows, rstd [M]."""
    x, _, residual, _, _ = call
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(out)
    rstd = torch.empty(x.shape[0], dtype=torch.float32) if for_backward else None
    core.rms_norm_fwd(call, out, total, None, rstd, torch.get_num_threads())
    return out, total, rstd


def rms_norm_bwd(
    dout: Tensor, dtotal: Tensor | None, rstd: Tensor, call: Any, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx [M, N] and dweight [N], empty where not needed. The call's x is what was normalised."""
    total, weight, *_ = call
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    if dtotal is not None and dtotal.stride(1) != 1:
        dtotal = dtotal.contiguous()
    dx = torch.empty(total.shape, dtype=total.dtype)
    dweight = torch.empty_like(weight) if need_dweight else None
    core.rms_norm_bwd(call, (dout, dtotal, None, rstd, dx, dweight, None), torch.get_num_threads())
    return dx, dx.new_empty(0) if dweight is None else dweight
