"""Launches the kernels of csrc/cpu for feed_forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import core
from fastattn.cpu._core import unsupported as unsupported
from fastattn.cpu._gradients import allocate, or_empty, with_unit_stride


def feed_forward_fwd(call: Any, save: bool = True) -> tuple[Tensor, Tensor | None]:
    """out [M, N] and, where it is to be saved, x w_up^T + b_up [M, F]; both in x's type."""
    x, w_down = call.x, call.w_down
    out = x.new_empty(x.shape[0], w_down.shape[0])
    z = x.new_empty(x.shape[0], w_down.shape[1]) if save else None
    core.feed_forward_fwd(call, out, z, torch.get_num_threads())
    return out, z


def feed_forward_bwd(dout: Tensor, z: Tensor | None, call: Any, need: Sequence[bool]) -> tuple[Tensor, ...]:
    """The gradients of x, w_up, b_up, w_down and b_down, empty where they are not needed.

    A weight's has the weight's strides. Without z it is computed again.
    """
    gradients = allocate(call[:5], need)
    core.feed_forward_bwd(with_unit_stride(dout), z, call, gradients, torch.get_num_threads())
    return or_empty(gradients, dout)
