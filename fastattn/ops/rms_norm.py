"""rms_norm: the contract, its plain-PyTorch reference, its op and its gradient."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.ops._gradient import differentiable, first_derivative
from fastattn.ops._norm import check_rows, shaped


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    x: Tensor  # [..., N], contiguous, of rank 1 to 4; or [M, N], last stride 1
    weight: Tensor | None  # [N], in x's type or float32
    residual: Tensor | None  # like x
    eps: float
    weight_offset: float  # 0 where there is no weight


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimension, after adding a residual.

    With a residual, `total = x + residual` is what is normalised, and it is returned too: the sum that
    the next residual connection needs. Each tensor passes through memory once, forward and backward.

    Shapes:
        x, residual [..., N], weight [N] -> out [..., N], or (out, total) with a residual. Any strides; x
        and residual are copied only where no view as [M, N] with a last stride of 1 exists.
    Types:
        x is float32, bfloat16 or float16 (float64: reference only); residual, out and total are in x's
        type, weight in x's type or float32. All arithmetic is in float32, the product with the weight
        too; total is rounded to x's type before it is normalised, as x + residual would be. Autocast
        changes nothing.
    Args:
        weight: multiplies the normalised values; None means 1.
        eps: is added to the mean of the squares; finite and at least 0.
        residual: is added to x; in x's shape.
        weight_offset: is added to the weight in float32; Gemma's models need 1. Finite; needs a weight.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
        dweight has the same bits for any number of threads.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic), triton (CUDA); see `fastattn.explain`.
    Source:
        Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    call = check(x, weight, eps=eps, residual=residual, weight_offset=weight_offset)
    if backend == dispatch.REFERENCE:
        out, total = rms_norm_reference(call)
    elif _needs_gradient(call) or dispatch.in_forward_mode():
        out, total, _ = differentiable(_RMSNorm, call, backend)
    elif dispatch.must_trace() or type(x) is not Tensor:
        out, total, _ = _OP_FWD(*call, backend)
    else:
        module = dispatch.choose("rms_norm", backend, x.device, call)
        out, total, _ = module.rms_norm_fwd(call, False)
    return shaped(x, call.x, residual, out, total)


def _needs_gradient(call: Call) -> bool:
    return torch.is_grad_enabled() and (
        call.x.requires_grad
        or (call.weight is not None and call.weight.requires_grad)
        or (call.residual is not None and call.residual.requires_grad)
    )


def check(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Call:
    """Raises on a bad argument of `rms_norm`, or returns the call in its normal form."""
    x, weight, _, residual = check_rows(x, weight, None, residual, eps)
    if weight_offset != 0.0:
        if not -math.inf < weight_offset < math.inf:
            raise ValueError(f"weight_offset must be finite, got {weight_offset}")
        if weight is None:
            raise ValueError(f"weight_offset is added to the weight, and there is none; got {weight_offset}")
    return Call(x, weight, residual, eps, weight_offset)


def rms_norm_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: float32 inside, or float64 where x is; differentiable."""
    total = call.x if call.residual is None else call.x + call.residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    out = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + call.eps)
    if call.weight is not None:
        out = out * (call.weight.to(out.dtype) + call.weight_offset)
    return out.to(total.dtype), total


_LIB = torch.library.Library("fastattn", "FRAGMENT")
# total is empty where there is no residual: an op must not return its own input. Backward normalises
# once more, with rstd: that reads less than keeping the normalised values would.
_LIB.define(
    "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? residual, float eps, float weight_offset, str backend)"
    " -> (Tensor out, Tensor total, Tensor rstd)"
)
_LIB.define(
    "rms_norm_bwd(Tensor dout, Tensor? dtotal, Tensor total, Tensor rstd, Tensor? weight, "
    "float weight_offset, bool need_dweight, str backend) -> (Tensor dx, Tensor dweight)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    module = dispatch.choose("rms_norm", args[-1], call.x.device, call)
    out, total, rstd = module.rms_norm_fwd(call)
    return out, call.x.new_empty(0) if total is None else total, rstd


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    total = call.x.new_empty(0 if call.residual is None else call.x.shape)
    rstd = call.x.new_empty(call.x.shape[:-1], dtype=torch.float32)
    return call.x.new_empty(call.x.shape), total, rstd


def _bwd(dout: Tensor, dtotal: Tensor | None, total: Tensor, rstd: Tensor, *args: Any) -> Any:
    weight, weight_offset, need_dweight, backend = args
    call = Call(total, weight, None, 0.0, weight_offset)
    module = dispatch.choose("rms_norm", backend, total.device, call)
    return module.rms_norm_bwd(dout, dtotal, rstd, call, need_dweight)


def _bwd_fake(dout: Tensor, dtotal: Any, total: Tensor, rstd: Any, *args: Any) -> Any:
    weight, _, need_dweight, _ = args
    dweight = weight.new_empty(weight.shape) if need_dweight else total.new_empty(0)
    return total.new_empty(total.shape), dweight


_LIB.impl("rms_norm_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("rms_norm_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::rms_norm_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::rms_norm_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.rms_norm_fwd.default
_OP_BWD = torch.ops.fastattn.rms_norm_bwd.default


class _RMSNorm(torch.autograd.Function):
    """Stands outside the op and is used only when a gradient is needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _OP_FWD(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, residual, _, weight_offset, backend = inputs
        _, total, rstd = output
        ctx.mark_non_differentiable(rstd, *(() if residual is not None else (total,)))
        ctx.save_for_backward(x if residual is None else total, rstd, weight)
        ctx.has_residual, ctx.weight_offset, ctx.backend = residual is not None, weight_offset, backend

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd, weight = ctx.saved_tensors
        need_dweight = ctx.needs_input_grad[1]
        dx, dweight = first_derivative(
            _OP_BWD, dout, dtotal if ctx.has_residual else None, total, rstd, weight,
            ctx.weight_offset, need_dweight, ctx.backend,
        )  # fmt: skip
        dresidual = dx if ctx.has_residual else None
        return dx, dweight if need_dweight else None, dresidual, None, None, None
