"""Launches the layer_norm kernels of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import core
from fastattn.cpu._core import unsupported as unsupported
from fastattn.cpu._rows import readable


def layer_norm_fwd(
    call: Any, for_backward: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """out like x, total with a residual and, where a backward follows, mean and rstd, one a row."""
    x, _, _, residual, _ = call
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(out)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32) if for_backward else None
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
    """dx like x, dweight and dbias [N], empty where not needed. The call's x is what was normalised."""
    total, weight, bias, _, _ = call
    dout, dtotal = readable(dout), None if dtotal is None else readable(dtotal)
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight) if need_dweight else None
    dbias = torch.empty_like(bias) if need_dbias else None
    gradients = (dout, dtotal, mean, rstd, dx, dweight, dbias)
    core.layer_norm_bwd(call, gradients, torch.get_num_threads())
    nothing = [dx.new_empty(0) if x is None else x for x in (dweight, dbias)]
    return dx, nothing[0], nothing[1]
