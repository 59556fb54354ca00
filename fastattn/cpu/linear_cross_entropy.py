"""Launches the kernels of csrc/cpu for linear_cross_entropy."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import core
from fastattn.cpu._core import unsupported as unsupported
from fastattn.cpu._gradients import allocate, or_empty


def linear_cross_entropy_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """[M]: the loss of each token, before the reduction, in float32, and its lse in float64."""
    loss = torch.empty(call.x.shape[0], dtype=torch.float32)
    lse = torch.empty_like(loss, dtype=torch.float64)
    core.linear_cross_entropy_fwd(call, loss, lse, torch.get_num_threads())
    return loss, lse


def linear_cross_entropy_bwd(
    dloss: Tensor, lse: Tensor, call: Any, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, ...]:
    """dx [M, K], dweight [V, K] with weight's strides and dbias [V]; empty where they are not needed."""
    inputs = (call.x, call.weight, call.bias)
    gradients = allocate(inputs, (need_dx, need_dweight, need_dbias))
    core.linear_cross_entropy_bwd(dloss.contiguous(), lse, call, gradients, torch.get_num_threads())
    return or_empty(gradients, call.x)
