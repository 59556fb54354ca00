"""Launches the rms_norm kernels of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import core
from fastattn.cpu._core import unsupported as unsupported
from fastattn.cpu._rows import readable


def rms_norm_fwd(call: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out like x, total with a residual and, where a backward follows, rstd, one a row."""
    x, _, residual, _, _ = call
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32) if for_backward else None
    core.rms_norm_fwd(call, out, total, None, rstd, torch.get_num_threads())
    return out, total, rstd


def rms_norm_bwd(
    dout: Tensor, dtotal: Tensor | None, rstd: Tensor, call: Any, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx like x and dweight [N], empty where not needed. The call's x is what was normalised."""
    total, weight, *_ = call
    dout, dtotal = readable(dout), None if dtotal is None else readable(dtotal)
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight) if need_dweight else None
    core.rms_norm_bwd(call, (dout, dtotal, None, rstd, dx, dweight, None), torch.get_num_threads())
    return dx, dx.new_empty(0) if dweight is None else dweight
