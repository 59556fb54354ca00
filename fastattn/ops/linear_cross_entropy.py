"""The loss of a language model's head, without its logits: contract, reference, op and gradient."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch
from fastattn.ops._checks import check_tensor
from fastattn.ops._checks_linear import (
    autocast_all,
    check_bias,
    check_weight,
    check_x,
    has_subclass,
    needs_gradient,
)
from fastattn.ops._gradient import differentiable, first_derivative
from fastattn.ops._gradient_linear import empty_gradients

REDUCTIONS = ("mean", "sum", "none")


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    x: Tensor  # [M, K], last stride 1
    weight: Tensor  # [V, K], one stride 1
    target: Tensor  # int64 [M], contiguous; each in [0, V) or ignore_index
    bias: Tensor | None  # [V], contiguous
    class_weight: Tensor | None  # float32 [V], contiguous
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none


_TENSORS = 5


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of the logits x weight^T + bias, without storing them.

    `F.cross_entropy(logits, target, class_weight, ...)`, and per token z_loss * lse^2, where lse is the log
    of the sum of exp(logit).

    Shapes:
        x [..., K], weight [V, K], target [...], bias and class_weight [V] -> a scalar, or [...] where
        reduction is "none".
        Any strides. A weight is read where it lies if one of its strides is 1: a weight stored as [K, V]
        goes in as `weight.t()`, uncopied, and its gradient has its strides.
    Types:
        x, weight and bias share one of float32, bfloat16, float16 (float64: reference only). target is
        int64, class_weight float32. Logits, sums and the loss are float32. Under autocast x, weight and
        bias are cast to autocast's type.
    Args:
        target: the class of each token, in [0, V), or ignore_index.
        class_weight: each class's share in the loss of its tokens; not differentiable.
        ignore_index: tokens with this target have loss 0 and no gradient, and do not count in the mean.
        label_smoothing: share of the target that is spread over all classes, in [0, 1].
        z_loss: finite and at least 0; its term has no class_weight. Keeps the logits near 0.
        softcap: bounds the logits to (-softcap, softcap), as softcap * tanh(logit / softcap); 0 means none.
        reduction: "none"; "sum"; or "mean", the sum over that of class_weight[target], or over the number
            of tokens that count. As in torch, the mean of no tokens is NaN, and its gradients are 0.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed. What
            stands in target is looked at on the CPU alone.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic), triton (CUDA); see `fastattn.explain`.
    Source:
        Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", arXiv:2411.09009.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    if torch._C._is_any_autocast_enabled():
        x, weight, bias = autocast_all(x, weight, bias)
    call = check(
        x, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap, reduction
    )
    if backend == dispatch.REFERENCE:
        loss, _ = linear_cross_entropy_reference(call)
    elif needs_gradient(call) or dispatch.in_forward_mode():
        loss, _ = differentiable(_LinearCrossEntropy, call, backend)
    elif dispatch.must_trace() or has_subclass(call):
        loss, _ = _OP_FWD(*call, backend)
    else:
        module = dispatch.choose("linear_cross_entropy", backend, call.x.device, call)
        loss, _ = module.linear_cross_entropy_fwd(call)
    return loss.view(target.shape) if reduction == "none" else _reduce(loss, call, reduction)


def _reduce(loss: Tensor, call: Call, reduction: str) -> Tensor:
    total = loss.sum()
    if reduction == "sum":
        return total
    counts = call.target != call.ignore_index
    if call.class_weight is None:
        return total / counts.sum()
    shares = call.class_weight.to(loss.dtype)[call.target.masked_fill(~counts, 0)]
    return total / shares.masked_fill(~counts, 0.0).sum()


def check(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Call:
    """Raises on a bad argument of `linear_cross_entropy`, or returns the call in its normal form."""
    rows = check_x(x)
    weight = check_weight("weight", weight, rows, "[V, K]", rows.shape[1])
    bias = check_bias("bias", bias, rows, weight.shape[0])
    target = _check_target(target, x)
    class_weight = _check_class_weight(class_weight, rows, weight.shape[0])
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    for name, number in (("z_loss", z_loss), ("softcap", softcap)):
        if not 0.0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and at least 0 (0 = none), got {number}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    call = Call(
        rows, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, softcap
    )  # fmt: skip
    if not dispatch.must_trace() and type(target) is Tensor:
        # Where somebody traces nobody can read the classes; the op looks at them when it runs.
        _check_classes(call)
    return call


def _check_target(target: Tensor, x: Tensor) -> Tensor:
    check_tensor("target", target)
    if target.dtype is not torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.device != x.device:
        raise ValueError(f"target must be on x's device {x.device}, got {target.device}")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target must have x's shape without the last dimension, {list(x.shape[:-1])}, "
            f"got {list(target.shape)}"
        )
    return target.reshape(-1).contiguous()


def _check_class_weight(class_weight: Tensor | None, x: Tensor, classes: int) -> Tensor | None:
    if class_weight is None:
        return None
    check_tensor("class_weight", class_weight)
    if class_weight.dtype is not torch.float32:
        raise TypeError(f"class_weight must be float32, got {class_weight.dtype}")
    if class_weight.device != x.device:
        raise ValueError(f"class_weight must be on x's device {x.device}, got {class_weight.device}")
    if tuple(class_weight.shape) != (classes,):
        raise ValueError(f"class_weight must have shape [V] = [{classes}], got {list(class_weight.shape)}")
    if class_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("class_weight must not require a gradient")
    return class_weight.contiguous()


def _check_classes(call: Call) -> None:
    """Looks at what target holds, on the CPU."""
    if call.target.device.type != "cpu":
        return
    classes = call.weight.shape[0]
    wrong = (call.target != call.ignore_index) & ((call.target < 0) | (call.target >= classes))
    if bool(wrong.any()):
        raise ValueError(
            f"target must be in [0, V) = [0, {classes}) or ignore_index = {call.ignore_index}, "
            f"got {int(call.target[wrong][0])}"
        )


def linear_cross_entropy_reference(call: Call) -> tuple[Tensor, Tensor]:
    """The definition: (loss, lse) of each token [M], in plain PyTorch; differentiable.

    The logits are in the inputs' own type, what follows is in float32 or wider. O(M V) memory.
    """
    logits = F.linear(call.x, call.weight, call.bias)
    if call.softcap > 0.0:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    wide = logits if logits.dtype is torch.float64 else logits.float()
    lse = torch.logsumexp(wide, dim=-1)
    loss = F.cross_entropy(
        wide,
        call.target,
        None if call.class_weight is None else call.class_weight.to(wide.dtype),
        ignore_index=call.ignore_index,
        label_smoothing=call.label_smoothing,
        reduction="none",
    )
    if call.z_loss > 0.0:
        loss = loss + (call.z_loss * lse.square()).masked_fill(call.target == call.ignore_index, 0.0)
    return loss, lse


_CALL_SCHEMA = (
    "Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap"
)
_LIB = torch.library.Library("fastattn", "FRAGMENT")
# lse is in float64: backward makes the softmax again, and a rounding error would be on all of it.
_LIB.define(f"linear_cross_entropy_fwd({_CALL_SCHEMA}, str backend) -> (Tensor loss, Tensor lse)")
_LIB.define(
    f"linear_cross_entropy_bwd(Tensor dloss, Tensor lse, {_CALL_SCHEMA}, bool[] need, str backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = args
    call = Call(*fields)
    _check_classes(call)
    module = dispatch.choose("linear_cross_entropy", backend, call.x.device, call)
    return module.linear_cross_entropy_fwd(call)  # type: ignore[no-any-return]


def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = args[0]
    loss = x.new_empty((x.shape[0],), dtype=torch.float32)
    return loss, torch.empty_like(loss, dtype=torch.float64)


def _bwd(*args: Any) -> tuple[Tensor, ...]:
    dloss, lse, *fields, need, backend = args
    call = Call(*fields)
    module = dispatch.choose("linear_cross_entropy", backend, call.x.device, call)
    return module.linear_cross_entropy_bwd(dloss, lse, call, *need)  # type: ignore[no-any-return]


def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    _, _, *fields, need, _ = args
    call = Call(*fields)
    return empty_gradients((call.x, call.weight, call.bias), need)


_LIB.impl("linear_cross_entropy_fwd", _fwd, "CompositeExplicitAutograd")
_LIB.impl("linear_cross_entropy_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::linear_cross_entropy_fwd", _fwd_fake, lib=_LIB)
torch.library.register_fake("fastattn::linear_cross_entropy_bwd", _bwd_fake, lib=_LIB)
_OP_FWD = torch.ops.fastattn.linear_cross_entropy_fwd.default
_OP_BWD = torch.ops.fastattn.linear_cross_entropy_bwd.default


class _LinearCrossEntropy(torch.autograd.Function):
    """Stands outside the op and is used only when a gradient is needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _OP_FWD(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:_TENSORS], output[1])
        ctx.scalars, ctx.backend = inputs[_TENSORS:-1], inputs[-1]

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, lse = ctx.saved_tensors
        need = [ctx.needs_input_grad[at] for at in (0, 1, 3)]
        found = first_derivative(_OP_BWD, dloss, lse, *tensors, *ctx.scalars, need, ctx.backend)
        dx, dweight, dbias = (x if needed else None for x, needed in zip(found, need, strict=True))
        return (dx, dweight, None, dbias, *[None] * 6)
