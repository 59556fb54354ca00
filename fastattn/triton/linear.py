"""Launches the kernels of linear."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._gradients import allocate, or_empty
from fastattn.triton._linear import dropout, multiply, output_bwd, parameter_gradients
from fastattn.triton._linear_compile import linear_compilations
from fastattn.triton._runtime import unsupported as unsupported

_PLANE = 0  # of the dropout's counter


def linear_fwd(call: Any, for_backward: bool = True) -> tuple[Tensor, Tensor | None]:
    """out [M, N] and, for a backward through an activation, z [M, N], both in x's type."""
    x, weight = call[:2]
    out = x.new_empty(x.shape[0], weight.shape[0])
    z = torch.empty_like(out) if for_backward and call.activation != "none" else None
    drop = dropout(call.dropout_p, call.seed, _PLANE, x)
    multiply(
        x, weight, out, bias=call.bias, residual=call.residual, z=z, drop=drop, activation=call.activation
    )
    return out, z


def linear_bwd(
    dout: Tensor, z: Tensor | None, call: Any, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, ...]:
    """dx [M, K], dweight [N, K] with weight's strides and dbias [N]; empty where they are not needed."""
    gradients = allocate(call[:3], (need_dx, need_dweight, need_dbias))
    dx, dweight, dbias = gradients
    dz = output_bwd(dout, z, dropout(call.dropout_p, call.seed, _PLANE, call.x), call.activation)
    if dx is not None:
        multiply(dz, call.weight.t(), dx)
    parameter_gradients(dz, call.x, dweight, dbias)
    return or_empty(gradients, dout)


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists."""
    return linear_compilations(architecture)
