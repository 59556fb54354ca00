"""Launches the norm kernels for layer_norm."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._norm import norm_bwd, norm_compilations, norm_fwd
from fastattn.triton._runtime import unsupported as unsupported


def layer_norm_fwd(
    call: Any, for_backward: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """out like x, total with a residual and, where a backward follows, mean and rstd, one a row."""
    x = call.x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if call.residual is None else torch.empty_like(out)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32) if for_backward else None
    rstd = None if mean is None else torch.empty_like(mean)
    norm_fwd(call, call.bias, (out, total, mean, rstd), True, 0.0)
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
    return norm_bwd(dout, dtotal, call, (mean, rstd), (need_dweight, need_dbias), 0.0)


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists."""
    return norm_compilations(architecture, centre=True)
