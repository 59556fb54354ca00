"""One call of an op held against the error rule, and the option sets that its tests run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import attention, attention_varlen, dispatch, explain
from fastattn.testing.compare import assert_close

_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str, gradients: bool = True, **options: Any
) -> None:
    """Raises AssertionError where out, lse or a gradient breaks the error rule."""
    _check(attention, {"q": q, "k": k, "v": v, **options}, backend, gradients)


def check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    backend: str,
    gradients: bool = True,
    **options: Any,
) -> None:
    """The same for attention_varlen."""
    starts = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    _check(attention_varlen, {"q": q, "k": k, "v": v, **starts, **options}, backend, gradients)


def _check(op: Callable[..., Any], given: dict[str, Any], backend: str, gradients: bool) -> None:
    wide = {name: x.double() if name in _DIFFERENTIABLE and x is not None else x for name, x in given.items()}
    ours = results(**given, backend=backend, gradients=gradients, op=op)
    base = results(**given, backend=dispatch.REFERENCE, gradients=gradients, op=op)
    truth = results(**wide, backend=dispatch.REFERENCE, gradients=gradients, op=op)
    q, k = given["q"], given["k"]
    for name in truth:
        # A shared bias or sink collects the gradients of all rows that share it.
        rows = math.prod(q.shape[:-1])
        shared = {"dbias": rows * k.shape[1], "dsinks": rows}.get(name, 0)
        terms = shared / max(truth[name].numel(), 1)
        assert_close(ours[name], base[name], truth[name], name, q.dtype, terms)


def results(
    *, backend: str, gradients: bool = True, op: Callable[..., Any] = attention, **given: Any
) -> dict[str, Tensor]:
    """out, lse and, for a fixed upstream gradient of both, the gradient of each differentiable input."""
    leaves = {
        name: given[name].detach().requires_grad_(gradients)
        for name in _DIFFERENTIABLE
        if given.get(name) is not None
    }
    out, lse = op(**{**given, **leaves}, return_lse=True, backend=backend)
    found = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        # The reference's lse is a constant where there are no keys.
        outputs = [x for x in (out, lse) if x.requires_grad]
        grads = torch.autograd.grad(
            outputs, list(leaves.values()), [upstream(x) for x in outputs], materialize_grads=True
        )
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def upstream(x: Tensor) -> Tensor:
    """A gradient that comes in for x. Multiples of 1/4, so that every type holds the same numbers."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 9, x.shape, generator=generator).to(x) / 4


def refusal(backend: str, *args: Any, op: Callable[..., Any] = attention, **options: Any) -> str | None:
    """Why the backend does not take this call; None where it does."""
    if backend == dispatch.REFERENCE:
        return None
    return dict(explain(op, *args, **options))[backend]


class _Draw:
    """Random option tensors that fit q and k."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.B, self.Sq, self.H, _ = q.shape
        self.Sk = k.shape[1]
        self.dtype = q.dtype
        self.generator = torch.Generator().manual_seed(2)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.7

    def slopes(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) * 0.2

    def bias_with_infinities(self) -> Tensor:
        bias = self.normal(self.B, self.H, self.Sq, self.Sk)
        bias[~self.mask(self.B, self.H, self.Sq, self.Sk)] = -torch.inf
        bias[:, :, ::3] = -torch.inf  # rows that see nothing
        return bias


_OPTION_SETS: dict[str, Callable[[_Draw], dict[str, Any]]] = {
    "plain": lambda d: {},
    "scale": lambda d: {"softmax_scale": 0.3},
    "scale_zero": lambda d: {"softmax_scale": 0.0},
    "causal": lambda d: {"causal": True},
    "window": lambda d: {"window_size": (20, 10)},
    "window_left": lambda d: {"window_size": (20, -1)},
    "window_right": lambda d: {"window_size": (-1, 5)},
    "window_self": lambda d: {"window_size": (0, 0)},
    "window_causal": lambda d: {"causal": True, "window_size": (33, 7)},
    "softcap": lambda d: {"softcap": 2.0},
    "alibi": lambda d: {"alibi_slopes": d.slopes(d.H)},
    "alibi_batch": lambda d: {"alibi_slopes": d.slopes(d.B, d.H), "causal": True},
    "mask": lambda d: {"mask": d.mask(d.B, d.H, d.Sq, d.Sk)},
    "mask_2d": lambda d: {"mask": d.mask(d.Sq, d.Sk)},
    "mask_batch": lambda d: {"mask": d.mask(1, d.H, d.Sq, d.Sk)},
    "mask_head": lambda d: {"mask": d.mask(d.B, 1, d.Sq, d.Sk)},
    "mask_query": lambda d: {"mask": d.mask(d.B, 1, 1, d.Sk)},
    "mask_key": lambda d: {"mask": d.mask(d.B, 1, d.Sq, 1)},
    "mask_none": lambda d: {"mask": torch.zeros((), dtype=torch.bool)},
    "bias": lambda d: {"bias": d.normal(d.B, d.H, d.Sq, d.Sk)},
    "bias_3d": lambda d: {"bias": d.normal(d.H, d.Sq, d.Sk)},
    "bias_head": lambda d: {"bias": d.normal(d.B, 1, d.Sq, d.Sk)},
    "bias_query": lambda d: {"bias": d.normal(d.B, d.H, 1, d.Sk)},
    "bias_key": lambda d: {"bias": d.normal(1, d.H, d.Sq, 1)},
    "bias_scalar": lambda d: {"bias": d.normal()},
    "bias_float32": lambda d: {"bias": d.normal(1, d.H, d.Sq, d.Sk).float()},
    "bias_infinite": lambda d: {"bias": d.bias_with_infinities()},
    "sinks": lambda d: {"sinks": d.normal(d.H)},
    "sinks_float32": lambda d: {"sinks": d.normal(d.H).float(), "causal": True},
    "dropout": lambda d: {"dropout_p": 0.3, "seed": 2**40 + 7},
    "everything": lambda d: {
        "causal": True,
        "window_size": (250, -1),
        "softmax_scale": 0.2,
        "softcap": 20.0,
        "alibi_slopes": d.slopes(d.B, d.H),
        "mask": d.mask(d.B, 1, d.Sq, d.Sk),
        "bias": d.normal(1, d.H, d.Sq, d.Sk),
        "sinks": d.normal(d.H),
        "dropout_p": 0.2,
        "seed": 5,
    },
}
OPTION_SETS = tuple(_OPTION_SETS)


def option_set(name: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    """The keyword arguments of one option set, their tensors drawn to fit q and k."""
    return _OPTION_SETS[name](_Draw(q, k))


# Options that need no [Sq, Sk]: what sequences of different lengths can share.
PACKED_OPTION_SETS = tuple(name for name in OPTION_SETS if not name.startswith(("mask", "bias")))


def packed_option_set(name: str, q: Tensor, batch: int) -> dict[str, Any]:
    """The keyword arguments of one option set for packed sequences."""
    stand_in = q.new_empty((batch, 1, q.shape[-2], 1))
    options = option_set(name, stand_in, stand_in)
    return {key: x for key, x in options.items() if key not in ("mask", "bias")}
