"""Launches the norm kernels for rms_norm."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._norm import norm_bwd, norm_compilations, norm_fwd
from fastattn.triton._runtime import unsupported as unsupported


def rms_norm_fwd(call: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out like x, total with a residual and, where a backward follows, rstd, one a row."""
    x = call.x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if call.residual is None else torch.empty_like(out)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32) if for_backward else None
    norm_fwd(call, None, (out, total, None, rstd), False, call.weight_offset)
    return out, total, rstd


def rms_norm_bwd(
    dout: Tensor, dtotal: Tensor | None, rstd: Tensor, call: Any, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx like x and dweight [N], empty where not needed. The call's x is what was normalised."""
    need = (need_dweight, False)
    dx, dweight, _ = norm_bwd(dout, dtotal, call, (None, rstd), need, call.weight_offset)
    return dx, dweight


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists."""
    return norm_compilations(architecture, centre=False)
