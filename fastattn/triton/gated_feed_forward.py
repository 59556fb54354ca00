"""Launches the kernels of gated_feed_forward."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._gradients import allocate, or_empty
from fastattn.triton._linear import (
    dropout,
    hidden_bwd,
    multiply,
    multiply_gated,
    output_bwd,
    parameter_gradients,
)
from fastattn.triton._linear_compile import hidden_compilations
from fastattn.triton._runtime import unsupported as unsupported

_PLANE, _HIDDEN_PLANE = 0, 1  # of the dropout's counter


def gated_feed_forward_fwd(call: Any, save: bool = True) -> tuple[Tensor, Tensor | None]:
    """out [M, N] and, where it is to be saved, gate and up side by side [M, 2 F]; both in x's type."""
    x, w_down = call.x, call.w_down
    out = x.new_empty(x.shape[0], w_down.shape[0])
    hidden = x.new_empty(x.shape[0], w_down.shape[1])
    z = x.new_empty(x.shape[0], 2 * w_down.shape[1]) if save else None
    drop = dropout(call.hidden_dropout_p, call.seed, _HIDDEN_PLANE, x)
    multiply_gated(x, *_halves(call), hidden, z, drop, call.activation)
    drop = dropout(call.dropout_p, call.seed, _PLANE, x)
    multiply(hidden, w_down, out, bias=call.b_down, residual=call.residual, drop=drop)
    return out, z


def gated_feed_forward_bwd(
    dout: Tensor, z: Tensor | None, call: Any, need: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients of x, w_gate, w_up, w_down, b_gate, b_up and b_down, empty where they are not needed.

    A weight's has the weight's strides. Without z it is computed again.
    """
    gradients = allocate(call[:7], need)
    dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down = gradients
    x = call.x
    size = call.w_down.shape[1]
    dy = output_bwd(dout, None, dropout(call.dropout_p, call.seed, _PLANE, x), "none")
    if z is None:
        z = _gate_and_up(call)
    drop = dropout(call.hidden_dropout_p, call.seed, _HIDDEN_PLANE, x)
    dz, hidden = hidden_bwd(dy, call.w_down, z, drop, call.activation, dw_down is not None)
    parameter_gradients(dy, z if hidden is None else hidden, dw_down, db_down)
    if call.w_up is None:
        parameter_gradients(dz, x, dw_gate, db_gate)
    else:
        parameter_gradients(dz[:, :size], x, dw_gate, db_gate)
        parameter_gradients(dz[:, size:], x, dw_up, db_up)
    if dx is not None and call.w_up is None:
        multiply(dz, call.w_gate.t(), dx)
    elif dx is not None:
        # Twice in float32, so that the sum is rounded once.
        sums = x.new_empty(dx.shape, dtype=torch.float32)
        multiply(dz[:, :size], call.w_gate.t(), sums)
        multiply(dz[:, size:], call.w_up.t(), dx, residual=sums)
    return or_empty(gradients, dout)


def _halves(call: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """(gate's and up's weight, their biases)."""
    if call.w_up is not None:
        return (call.w_gate, call.w_up), (call.b_gate, call.b_up)
    size = call.w_down.shape[1]
    weights = call.w_gate[:size], call.w_gate[size:]
    return weights, ((None, None) if call.b_gate is None else (call.b_gate[:size], call.b_gate[size:]))


def _gate_and_up(call: Any) -> Tensor:
    """What forward may have saved."""
    x, size = call.x, call.w_down.shape[1]
    z: Tensor = x.new_empty(x.shape[0], 2 * size)
    for half, weight, bias in zip(z.split(size, dim=1), *_halves(call), strict=True):
        multiply(x, weight, half, bias=bias)
    return z


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists."""
    return hidden_compilations(architecture, gated=True)
