"""x weight^T with all that may follow it: contract, plain-PyTorch reference, op and gradient."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch
from fastattn.ops._activation import NONE, activate, check_activation
from fastattn.ops._checks_linear import (
    OUTPUT_PLANE,
    add_outside,
    autocast_all,
    check_bias,
    check_dropout,
    check_residual,
    check_weight,
    check_x,
    drop,
    has_subclass,
    needs_gradient,
    split_residual,
)
from fastattn.ops._gradient import differentiable
from fastattn.ops._gradient_linear import empty_gradients, given, gradients, keep_for_backward, nothing


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    x: Tensor  # [M, K], last stride 1
    weight: Tensor  # [N, K], one stride 1
    bias: Tensor | None  # [N], contiguous
    residual: Tensor | None  # [M, N], last stride 1
    seed: Tensor | None  # int64 [], given when dropout_p > 0
    activation: str  # of _activation.py; "none" where there is none
    dropout_p: float


_INPUTS = 3  # the tensors of a Call that have a gradient by the op: x, weight, bias


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + dropout(activation(x weight^T + bias)), in one pass over the output.

    Shapes:
        x [..., K], weight [N, K], bias [N], residual [..., N] with as many rows as x -> out [..., N].
        Any strides. A weight is read where it lies if one of its strides is 1: a weight stored as [K, N]
        goes in as `weight.t()`, uncopied, and its gradient has its strides.
    Types:
        All share one of float32, bfloat16, float16 (float64: reference only). Sums are in float32. Under
        autocast x, weight and bias are cast to autocast's type; a residual in another type is then added
        outside, in the wider of the two.
    Args:
        activation: None, "relu", "relu2" (the square of relu), "gelu", "gelu_tanh", "silu", "sigmoid" or
            "tanh".
        residual: added to the result; differentiable.
        dropout_p: share of the numbers set to 0 before the residual is added, in [0, 1); the others grow
            by 1 / (1 - dropout_p).
        seed: of the dropout, in [0, 2**63), an int or an int64 tensor of shape []; the same seed drops
            the same positions on every backend. Default: drawn from torch's CPU generator.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic), triton (CUDA); see `fastattn.explain`.
    Source:
        Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication".
    """
    if backend is None:
        backend = dispatch.DEFAULT
    outside = None
    if torch._C._is_any_autocast_enabled():
        x, weight, bias = autocast_all(x, weight, bias)
        residual, outside = split_residual(residual, x)
    call = check(x, weight, bias, activation, residual, dropout_p, seed)
    if backend == dispatch.REFERENCE:
        out = linear_reference(call)
    elif needs_gradient(call) or dispatch.in_forward_mode():
        out, _ = differentiable(_Linear, (*call, True), backend)
    elif dispatch.must_trace() or has_subclass(call):
        out, _ = _OP_FWD(*call, False, backend)
    else:
        module = dispatch.choose("linear", backend, call.x.device, call)
        out, _ = module.linear_fwd(call, False)
    out = out if x.ndim == 2 else out.view((*x.shape[:-1], out.shape[1]))
    return add_outside(outside, out)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Call:
    """Raises on a bad argument of `linear`, or returns the call in its normal form."""
    x = check_x(x)
    weight = check_weight("weight", weight, x, "[N, K]", x.shape[1])
    size = weight.shape[0]
    bias = check_bias("bias", bias, x, size)
    name = check_activation(activation)
    residual = check_residual(residual, x, size)
    return Call(x, weight, bias, residual, check_dropout(seed, dropout_p=dropout_p), name, dropout_p)


def linear_reference(call: Call) -> Tensor:
    """The definition, in plain PyTorch and the inputs' own type; differentiable."""
    out = activate(call.activation, F.linear(call.x, call.weight, call.bias))
    out = drop(out, call.seed, call.dropout_p, OUTPUT_PLANE)
    return out if call.residual is None else call.residual + out


_CALL_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? seed, str activation, float dropout_p"
)
_LIB = torch.library.Library("fastattn", "FRAGMENT")
# z is what the activation is applied to; empty where there is none, and where no backward follows.
_LIB.define(f"linear_fwd({_CALL_SCHEMA}, bool for_backward, str backend) -> (Tensor out, Tensor z)")
_LIB.define(
    f"linear_bwd(Tensor dout, Tensor z, {_CALL_SCHEMA}, bool[] need, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *fields, for_backward, backend = args
    call = Call(*fields)
    module = dispatch.choose("linear", backend, call.x.device, call)
    out, z = module.linear_fwd(call, for_backward)
    return out, nothing(out) if z is None else z


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *fields, for_backward, _ = args
    call = Call(*fields)
    out = call.x.new_empty((call.x.shape[0], call.weight.shape[0]))
    has_z = for_backward and call.activation != NONE
    return out, torch.empty_like(out) if has_z else nothing(out)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    dout, z, *fields, need, backend = args
    call = Call(*fields)
    module = dispatch.choose("linear", backend, call.x.device, call)
    return module.linear_bwd(dout, given(z), call, *need)  # type: ignore[no-any-return]


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    _, _, *fields, need, _ = args
    return empty_gradients(fields[:_INPUTS], need)


_LIB.impl("linear_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("linear_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::linear_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::linear_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.linear_fwd.default
_OP_BWD = torch.ops.fastattn.linear_bwd.default


class _Linear(torch.autograd.Function):
    """Stands outside the op and is used only when a gradient is needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _OP_FWD(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        keep_for_backward(ctx, inputs, output, _INPUTS)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(ctx, _OP_BWD, dout)
