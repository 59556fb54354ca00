"""Launches the kernels of csrc/cpu for linear."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import core
from fastattn.cpu._core import unsupported as unsupported
from fastattn.cpu._gradients import allocate, or_empty, with_unit_stride


def linear_fwd(call: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None]:
    """out [M, N] and, for a backward through an activation, z [M, N], both in x's type."""
    x, weight = call[:2]
    out = x.new_empty(x.shape[0], weight.shape[0])
    z = torch.empty_like(out) if for_backward and call.activation != "none" else None
    core.linear_fwd(call, out, z, torch.get_num_threads())
    return out, z


def linear_bwd(
    dout: Tensor, z: Tensor | None, call: Any, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, ...]:
    """dx [M, K], dweight [N, K] with weight's strides and dbias [N]; empty where they are not needed."""
    gradients = allocate(call[:3], (need_dx, need_dweight, need_dbias))
    core.linear_bwd(with_unit_stride(dout), z, call, gradients, torch.get_num_threads())
    return or_empty(gradients, dout)
