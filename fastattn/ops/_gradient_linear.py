"""What the gradients of the ops around a matrix product share.

The call of such an op begins with the inputs that have gradients, x first; its residual and its seed follow.
Its forward returns (out, z), its backward those gradients; an empty tensor stands for one that is not there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ops._gradient import first_derivative


def nothing(like: Tensor) -> Tensor:
    """Stands for a tensor that is not there, since ops return tensors alone."""
    return like.new_empty((0,))


def given(x: Tensor) -> Tensor | None:
    """The tensor, unless it stands for one that is not there."""
    return None if x.ndim == 1 else x


def empty_gradients(inputs: Sequence[Tensor | None], need: Sequence[bool]) -> tuple[Tensor, ...]:
    """What backward returns, with nothing in it: weights have their own strides."""
    x = inputs[0]
    assert x is not None
    dx = x.new_empty(x.shape) if need[0] else nothing(x)
    rest = zip(inputs[1:], need[1:], strict=True)
    return dx, *(torch.empty_like(y) if y is not None and needed else nothing(x) for y, needed in rest)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor], count: int) -> None:
    """Saves a call whose first `count` tensors have gradients, and z; the residual is not needed again.

    Args:
        inputs: the call, whether z is kept, the backend.
    """
    z = output[1]
    ctx.mark_non_differentiable(z)
    ctx.save_for_backward(*inputs[:count], inputs[count + 1], z)
    ctx.scalars = inputs[count + 2 : -2]
    ctx.backend = inputs[-1]


def gradients(ctx: Any, op_bwd: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """One for each input of the function: those of the op, the residual's, and None for the rest."""
    *inputs, seed, z = ctx.saved_tensors
    *need, need_residual = ctx.needs_input_grad[: len(inputs) + 1]
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if any(need):
        call = (*inputs, None, seed, *ctx.scalars)
        every = first_derivative(op_bwd, dout, z, *call, need, ctx.backend)
        found = tuple(x if needed else None for x, needed in zip(every, need, strict=True))
    residual = dout if need_residual else None
    return (*found, residual, *[None] * (len(ctx.scalars) + 3))
