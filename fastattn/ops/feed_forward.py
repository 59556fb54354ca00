"""Two products with an activation between them: contract, reference, op and gradient."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch
from fastattn.ops._activation import activate, check_activation
from fastattn.ops._checks_linear import (
    HIDDEN_PLANE,
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
    w_up: Tensor  # [F, K], one stride 1
    b_up: Tensor | None  # [F], contiguous
    w_down: Tensor  # [N, F], one stride 1
    b_down: Tensor | None  # [N], contiguous
    residual: Tensor | None  # [M, N], last stride 1
    seed: Tensor | None  # int64 [], given when something is dropped
    activation: str  # of _activation.py; "none" where there is none
    dropout_p: float
    hidden_dropout_p: float


_INPUTS = 5  # the tensors of a Call that have a gradient by the op


def feed_forward(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    save_memory: bool = False,
    backend: str | None = None,
) -> Tensor:
    """residual + dropout(hidden w_down^T + b_down), hidden = dropout(activation(x w_up^T + b_up)).

    Shapes:
        x [..., K], w_up [F, K], b_up [F], w_down [N, F], b_down [N], residual [..., N] with as many rows
        as x -> out [..., N]. A bias may be None.
        Any strides. A weight is read where it lies if one of its strides is 1: a weight stored as [in, out]
        goes in as `weight.t()`, uncopied, and its gradient has its strides.
    Types:
        All share one of float32, bfloat16, float16 (float64: reference only). Sums are in float32, the
        hidden numbers in x's type. Under autocast x, weights and biases are cast to autocast's type; a
        residual in another type is then added outside, in the wider of the two.
    Args:
        activation: None, "relu", "relu2" (the square of relu), "gelu", "gelu_tanh", "silu", "sigmoid" or
            "tanh".
        residual: added to the result; differentiable.
        dropout_p: share of the output's numbers set to 0 before the residual is added, in [0, 1); the
            others grow by 1 / (1 - dropout_p).
        hidden_dropout_p: the same for the hidden numbers, after the activation.
        seed: of both dropouts, in [0, 2**63), an int or an int64 tensor of shape []; the same seed drops
            the same positions on every backend. Default: drawn from torch's CPU generator.
        save_memory: keep nothing of size F for the backward pass, which then computes x w_up^T
            again.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic), triton (CUDA); see `fastattn.explain`.
    Source:
        Vaswani et al. 2017, arXiv:1706.03762, section 3.3.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    outside = None
    if torch._C._is_any_autocast_enabled():
        x, w_up, b_up, w_down, b_down = autocast_all(x, w_up, b_up, w_down, b_down)
        residual, outside = split_residual(residual, x)
    call = check(
        x, w_up, b_up, w_down, b_down, activation, residual, dropout_p, hidden_dropout_p, seed
    )  # fmt: skip
    if backend == dispatch.REFERENCE:
        out = feed_forward_reference(call)
    elif needs_gradient(call) or dispatch.in_forward_mode():
        out, _ = differentiable(_FeedForward, (*call, not save_memory), backend)
    elif dispatch.must_trace() or has_subclass(call):
        out, _ = _OP_FWD(*call, False, backend)
    else:
        module = dispatch.choose("feed_forward", backend, call.x.device, call)
        out, _ = module.feed_forward_fwd(call, False)
    out = out if x.ndim == 2 else out.view((*x.shape[:-1], out.shape[1]))
    return add_outside(outside, out)


def check(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str | None = "gelu",
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    hidden_dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Call:
    """Raises on a bad argument of `feed_forward`, or returns the call in its normal form."""
    x = check_x(x)
    w_up = check_weight("w_up", w_up, x, "[F, K]", x.shape[1])
    hidden = w_up.shape[0]
    b_up = check_bias("b_up", b_up, x, hidden)
    w_down = check_weight("w_down", w_down, x, "[N, F]", hidden)
    size = w_down.shape[0]
    b_down = check_bias("b_down", b_down, x, size)
    name = check_activation(activation)
    residual = check_residual(residual, x, size)
    checked_seed = check_dropout(seed, dropout_p=dropout_p, hidden_dropout_p=hidden_dropout_p)
    return Call(
        x, w_up, b_up, w_down, b_down, residual, checked_seed, name, dropout_p, hidden_dropout_p
    )  # fmt: skip


def feed_forward_reference(call: Call) -> Tensor:
    """The definition, in plain PyTorch and the inputs' own type; differentiable."""
    hidden = activate(call.activation, F.linear(call.x, call.w_up, call.b_up))
    hidden = drop(hidden, call.seed, call.hidden_dropout_p, HIDDEN_PLANE)
    out = F.linear(hidden, call.w_down, call.b_down)
    out = drop(out, call.seed, call.dropout_p, OUTPUT_PLANE)
    return out if call.residual is None else call.residual + out


_CALL_SCHEMA = (
    "Tensor x, Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, Tensor? residual, Tensor? seed, "
    "str activation, float dropout_p, float hidden_dropout_p"
)
_LIB = torch.library.Library("fastattn", "FRAGMENT")
# z is what activations are applied to; empty where nobody keeps it, and backward computes it anew.
_LIB.define(f"feed_forward_fwd({_CALL_SCHEMA}, bool save, str backend) -> (Tensor out, Tensor z)")
_LIB.define(
    f"feed_forward_bwd(Tensor dout, Tensor z, {_CALL_SCHEMA}, bool[] need, str backend) -> "
    "(Tensor dx, Tensor dw_up, Tensor db_up, Tensor dw_down, Tensor db_down)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *fields, save, backend = args
    call = Call(*fields)
    module = dispatch.choose("feed_forward", backend, call.x.device, call)
    out, z = module.feed_forward_fwd(call, save)
    return out, nothing(out) if z is None else z


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *fields, save, _ = args
    call = Call(*fields)
    out = call.x.new_empty((call.x.shape[0], call.w_down.shape[0]))
    return out, call.x.new_empty((call.x.shape[0], call.w_up.shape[0])) if save else nothing(out)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    dout, z, *fields, need, backend = args
    call = Call(*fields)
    module = dispatch.choose("feed_forward", backend, call.x.device, call)
    return module.feed_forward_bwd(dout, given(z), call, tuple(need))  # type: ignore[no-any-return]


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    _, _, *fields, need, _ = args
    return empty_gradients(fields[:_INPUTS], need)


_LIB.impl("feed_forward_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("feed_forward_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::feed_forward_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::feed_forward_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.feed_forward_fwd.default
_OP_BWD = torch.ops.fastattn.feed_forward_bwd.default


class _FeedForward(torch.autograd.Function):
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
