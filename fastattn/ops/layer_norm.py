"""layer_norm: the contract, its plain-PyTorch reference, its op and its gradient."""

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
    bias: Tensor | None  # [N], in x's type or float32
    residual: Tensor | None  # like x
    eps: float


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, after adding a residual.

    With a residual, `total = x + residual` is what is normalised, and it is returned too: the sum that
    the next residual connection needs. Each tensor passes through memory once, forward and backward.

    Shapes:
        x, residual [..., N], weight and bias [N] -> out [..., N], or (out, total) with a residual. Any
        strides; x and residual are copied only where no view as [M, N] with a last stride of 1 exists.
    Types:
        x is float32, bfloat16 or float16 (float64: reference only); residual, out and total are in x's
        type, weight and bias in x's type or float32. All arithmetic is in float32; total is rounded to
        x's type before it is normalised, as x + residual would be. Autocast changes nothing.
    Args:
        weight: multiplies the normalised values; None means 1.
        bias: is added to the result; None means 0.
        eps: is added to the variance; finite and at least 0.
        residual: is added to x; in x's shape.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
        dweight and dbias have the same bits for any number of threads.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic), triton (CUDA); see `fastattn.explain`.
    Source:
        Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    call = check(x, weight, bias, eps=eps, residual=residual)
    if backend == dispatch.REFERENCE:
        out, total = layer_norm_reference(call)
    elif _needs_gradient(call) or dispatch.in_forward_mode():
        out, total, _, _ = differentiable(_LayerNorm, call, backend)
    elif dispatch.must_trace() or type(x) is not Tensor:
        out, total, _, _ = _OP_FWD(*call, backend)
    else:
        module = dispatch.choose("layer_norm", backend, x.device, call)
        out, total, _, _ = module.layer_norm_fwd(call, False)
    return shaped(x, call.x, residual, out, total)


def _needs_gradient(call: Call) -> bool:
    return torch.is_grad_enabled() and (
        call.x.requires_grad
        or (call.weight is not None and call.weight.requires_grad)
        or (call.bias is not None and call.bias.requires_grad)
        or (call.residual is not None and call.residual.requires_grad)
    )


def check(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Call:
    """Raises on a bad argument of `layer_norm`, or returns the call in its normal form."""
    return Call(*check_rows(x, weight, bias, residual, eps), eps)


def layer_norm_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: float32 inside, or float64 where x is; differentiable."""
    total = call.x if call.residual is None else call.x + call.residual
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    out = centered / torch.sqrt(variance + call.eps)
    if call.weight is not None:
        out = out * call.weight.to(out.dtype)
    if call.bias is not None:
        out = out + call.bias.to(out.dtype)
    return out.to(total.dtype), total


_LIB = torch.library.Library("fastattn", "FRAGMENT")
# total is empty where there is no residual: an op must not return its own input. Backward normalises
# once more, with mean and rstd: that reads less than keeping the normalised values would.
_LIB.define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str backend)"
    " -> (Tensor out, Tensor total, Tensor mean, Tensor rstd)"
)
_LIB.define(
    "layer_norm_bwd(Tensor dout, Tensor? dtotal, Tensor total, Tensor mean, Tensor rstd, Tensor? weight, "
    "Tensor? bias, bool need_dweight, bool need_dbias, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    module = dispatch.choose("layer_norm", args[-1], call.x.device, call)
    out, total, mean, rstd = module.layer_norm_fwd(call)
    return out, call.x.new_empty(0) if total is None else total, mean, rstd


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(*args[:-1])
    mean, rstd = (call.x.new_empty(call.x.shape[:-1], dtype=torch.float32) for _ in range(2))
    total = call.x.new_empty(0 if call.residual is None else call.x.shape)
    return call.x.new_empty(call.x.shape), total, mean, rstd


def _bwd(dout: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, *args: Any) -> Any:
    weight, bias, need_dweight, need_dbias, backend = args
    call = Call(total, weight, bias, None, 0.0)
    module = dispatch.choose("layer_norm", backend, total.device, call)
    return module.layer_norm_bwd(dout, dtotal, mean, rstd, call, need_dweight, need_dbias)


def _bwd_fake(dout: Tensor, dtotal: Any, total: Tensor, mean: Any, rstd: Any, *args: Any) -> Any:
    weight, bias, need_dweight, need_dbias, _ = args
    dweight = weight.new_empty(weight.shape) if need_dweight else total.new_empty(0)
    dbias = bias.new_empty(bias.shape) if need_dbias else total.new_empty(0)
    return total.new_empty(total.shape), dweight, dbias


_LIB.impl("layer_norm_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("layer_norm_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::layer_norm_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::layer_norm_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.layer_norm_fwd.default
_OP_BWD = torch.ops.fastattn.layer_norm_bwd.default


class _LayerNorm(torch.autograd.Function):
    """Stands outside the op and is used only when a gradient is needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _OP_FWD(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, residual, _, backend = inputs
        _, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd, *(() if residual is not None else (total,)))
        ctx.save_for_backward(x if residual is None else total, mean, rstd, weight, bias)
        ctx.has_residual, ctx.backend = residual is not None, backend

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, rstd, weight, bias = ctx.saved_tensors
        _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = first_derivative(
            _OP_BWD, dout, dtotal if ctx.has_residual else None, total, mean, rstd, weight, bias,
            need_dweight, need_dbias, ctx.backend,
        )  # fmt: skip
        dresidual = dx if ctx.has_residual else None
        return dx, dweight if need_dweight else None, dbias if need_dbias else None, dresidual, None, None
