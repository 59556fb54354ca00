"""Launches the kernels of feed_forward."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._gradients import allocate, or_empty
from fastattn.triton._linear import dropout, hidden_bwd, multiply, output_bwd, parameter_gradients
from fastattn.triton._linear_compile import hidden_compilations
from fastattn.triton._runtime import unsupported as unsupported

_PLANE, _HIDDEN_PLANE = 0, 1  # of the dropout's counter


def feed_forward_fwd(call: Any, save: bool = True) -> tuple[Tensor, Tensor | None]:
    """out [M, N] and, where it is to be saved, x w_up^T + b_up [M, F]; both in x's type."""
    x, w_down = call.x, call.w_down
    out = x.new_empty(x.shape[0], w_down.shape[0])
    hidden = x.new_empty(x.shape[0], w_down.shape[1])
    z = x.new_empty(hidden.shape) if save else None
    drop = dropout(call.hidden_dropout_p, call.seed, _HIDDEN_PLANE, x)
    multiply(x, call.w_up, hidden, bias=call.b_up, z=z, drop=drop, activation=call.activation)
    drop = dropout(call.dropout_p, call.seed, _PLANE, x)
    multiply(hidden, w_down, out, bias=call.b_down, residual=call.residual, drop=drop)
    return out, z


def feed_forward_bwd(dout: Tensor, z: Tensor | None, call: Any, need: Sequence[bool]) -> tuple[Tensor, ...]:
    """The gradients of x, w_up, b_up, w_down and b_down, empty where they are not needed.

    A weight's has the weight's strides. Without z it is computed again.
    """
    gradients = allocate(call[:5], need)
    dx, dw_up, db_up, dw_down, db_down = gradients
    x = call.x
    dy = output_bwd(dout, None, dropout(call.dropout_p, call.seed, _PLANE, x), "none")
    if z is None:
        z = x.new_empty(x.shape[0], call.w_up.shape[0])
        multiply(x, call.w_up, z, bias=call.b_up)
    drop = dropout(call.hidden_dropout_p, call.seed, _HIDDEN_PLANE, x)
    dz, hidden = hidden_bwd(dy, call.w_down, z, drop, call.activation, dw_down is not None)
    parameter_gradients(dy, z if hidden is None else hidden, dw_down, db_down)
    parameter_gradients(dz, x, dw_up, db_up)
    if dx is not None:
        multiply(dz, call.w_up.t(), dx)
    return or_empty(gradients, dout)


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists."""
    return hidden_compilations(architecture, gated=False)
