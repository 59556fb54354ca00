"""What the gradients of the ops share: an autograd.Function around the op, and no second derivative."""

from typing import Any

import torch
from torch import Tensor


def differentiable(function: type[torch.autograd.Function], call: tuple[Any, ...], backend: str) -> Any:
    """Runs an op under its autograd.Function."""
    if torch.compiler.is_compiling():
        call = _distinct(call)
    return function.apply(*call, backend)


def _distinct(call: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call without a tensor that occurs twice, which Dynamo refuses for an autograd.Function."""
    return tuple(
        x.view_as(x) if isinstance(x, Tensor) and any(x is earlier for earlier in call[:at]) else x
        for at, x in enumerate(call)
    )


class AttentionFunction(torch.autograd.Function):
    """Stands outside an op and is used only when a gradient is needed.

    Its inputs are those of the op: a call that begins with 8 tensors, and the backend. Its outputs are
    out, lse and lse_rest. What is left to a subclass are `forward` and `backward`.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[:8], *output)
        ctx.scalars = inputs[8:]


def first_derivative(op: Any, *args: Any) -> tuple[Tensor, ...]:
    """Runs the backward of an op so that nobody can differentiate it once more."""
    differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return _FirstDerivative.apply(op, *args) if differentiated else op(*args)  # type: ignore[no-any-return, no-untyped-call]


class _FirstDerivative(torch.autograd.Function):
    """Stands in the graph of the gradients so that a second derivative is refused, and not 0.

    `once_differentiable` does so too, but not under torch.func.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *args: Any) -> tuple[Tensor, ...]:
        return op(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        name = ctx.op._opname.removesuffix("_bwd")
        raise NotImplementedError(f"fastattn.{name} has no second derivative; backend='reference' has one")
