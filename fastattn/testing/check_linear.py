"""The ops around a matrix product: their inputs and option sets, and one call held against the error rule."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch, feed_forward, gated_feed_forward, linear, linear_cross_entropy
from fastattn.ops._activation import ACTIVATIONS
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

Inputs = dict[str, Any]  # an op's arguments by name

# By name. The sizes that `inputs` takes: rows M, features K, hidden features F, features N of the output.
OPS: dict[str, Callable[..., Tensor]] = {
    "linear": linear,  # M, K, N
    "feed_forward": feed_forward,  # M, K, F, N
    "gated_feed_forward": gated_feed_forward,  # M, K, F, N
    "linear_cross_entropy": linear_cross_entropy,  # M, K, V
}


def check_linear(op: str, given: Inputs, *, backend: str, gradients: bool = True) -> None:
    """Raises AssertionError where the output or a gradient of a call breaks the error rule."""
    wide = {name: x.double() if differentiable(name, x) else x for name, x in given.items()}
    ours = results(op, given, backend=backend, gradients=gradients)
    base = results(op, given, backend=dispatch.REFERENCE, gradients=gradients)
    truth = results(op, wide, backend=dispatch.REFERENCE, gradients=gradients)
    for name in truth:
        assert_close(ours[name], base[name], truth[name], name, given["x"].dtype)


def results(op: str, given: Inputs, *, backend: str, gradients: bool = True) -> dict[str, Tensor]:
    """out and, for a fixed upstream gradient, the gradient of each differentiable input."""
    leaves = {
        name: x.detach().requires_grad_(gradients) for name, x in given.items() if differentiable(name, x)
    }
    out = OPS[op](**{**given, **leaves}, backend=backend)
    found = {"out": out.detach()}
    if gradients:
        dout = upstream(out) if out.ndim else torch.tensor(1.5).to(out)
        grads = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=True)
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def differentiable(name: str, x: Any) -> bool:
    """Whether an argument has a gradient."""
    return isinstance(x, Tensor) and x.is_floating_point() and name != "class_weight"


class Draw:
    """Random tensors of one type, the same for one seed."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def weight(self, out_features: int, in_features: int) -> Tensor:
        """Of such a size that what comes out is as large as what goes in."""
        weight = torch.randn(out_features, in_features, generator=self.generator)
        return (weight / math.sqrt(in_features)).to(self.dtype)

    def classes(self, rows: int, classes: int) -> Tensor:
        return torch.randint(0, classes, (rows,), generator=self.generator)


def inputs(op: str, sizes: Sequence[int], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """x, weights and biases of a call with sizes as `OPS` has them."""
    draw = Draw(dtype, seed)
    return _INPUTS[op](draw, *sizes)


def _linear(draw: Draw, rows: int, features: int, out: int) -> Inputs:
    return {"x": draw.normal(rows, features), "weight": draw.weight(out, features), "bias": draw.normal(out)}


def _feed_forward(draw: Draw, rows: int, features: int, hidden: int, out: int) -> Inputs:
    return {
        "x": draw.normal(rows, features),
        "w_up": draw.weight(hidden, features),
        "b_up": draw.normal(hidden),
        "w_down": draw.weight(out, hidden),
        "b_down": draw.normal(out),
    }


def _gated_feed_forward(draw: Draw, rows: int, features: int, hidden: int, out: int) -> Inputs:
    return {
        "x": draw.normal(rows, features),
        "w_gate": draw.weight(hidden, features),
        "w_up": draw.weight(hidden, features),
        "w_down": draw.weight(out, hidden),
        "b_gate": draw.normal(hidden),
        "b_up": draw.normal(hidden),
        "b_down": draw.normal(out),
    }


def _linear_cross_entropy(draw: Draw, rows: int, features: int, classes: int) -> Inputs:
    return {
        "x": draw.normal(rows, features),
        "weight": draw.weight(classes, features),
        "target": draw.classes(rows, classes),
        "bias": draw.normal(classes),
    }


_INPUTS: dict[str, Callable[..., Inputs]] = {
    "linear": _linear,
    "feed_forward": _feed_forward,
    "gated_feed_forward": _gated_feed_forward,
    "linear_cross_entropy": _linear_cross_entropy,
}


def with_options(op: str, name: str, given: Inputs) -> Inputs:
    """The call with one option set of `OPTION_SETS[op]`, whose tensors are drawn to fit."""
    x = given["x"]
    return given | _SETS[op][name](Draw(x.dtype, seed=2), given)


Options = Callable[[Draw, Inputs], Inputs]


def _no_bias(_: Draw, given: Inputs) -> Inputs:
    return {name: None for name in given if name.startswith("b")}


def _transposed(_: Draw, given: Inputs) -> Inputs:
    """Weights that are stored as [in, out]."""
    weights = {name: w for name, w in given.items() if name.startswith("w") and w is not None}
    return {name: w.t().contiguous().t() for name, w in weights.items()}


def _residual(draw: Draw, given: Inputs) -> Inputs:
    size = given["w_down" if "w_down" in given else "weight"].shape[0]
    return {"residual": draw.normal(given["x"].shape[0], size)}


def _stacked(_: Draw, given: Inputs) -> Inputs:
    """Gate and up in one weight and one bias."""
    weight = torch.cat([given["w_gate"], given["w_up"]])
    bias = torch.cat([given["b_gate"], given["b_up"]])
    return {"w_gate": weight, "w_up": None, "b_gate": bias, "b_up": None}


def _stacked_transposed(draw: Draw, given: Inputs) -> Inputs:
    stacked = _stacked(draw, given)
    return stacked | _transposed(draw, given | stacked)


_DROPOUT = {"dropout_p": 0.3, "seed": 2**40 + 7}
_BOTH_DROPOUTS = {**_DROPOUT, "hidden_dropout_p": 0.2}


def _activation(name: str) -> Options:
    return lambda d, given: {"activation": name}


_LINEAR_SETS: dict[str, Options] = {
    "plain": lambda d, given: {"activation": None},
    **{name: _activation(name) for name in ACTIVATIONS},
    "no_bias": _no_bias,
    "transposed": _transposed,
    "residual": _residual,
    "dropout": lambda d, given: dict(_DROPOUT),
    "everything": lambda d, given: {
        **_transposed(d, given),
        **_residual(d, given),
        **_DROPOUT,
        "activation": "gelu",
    },
}
_FEED_FORWARD_SETS: dict[str, Options] = {
    **_LINEAR_SETS,
    "hidden_dropout": lambda d, given: {"hidden_dropout_p": 0.4, "seed": 9},
    "save_memory": lambda d, given: {"save_memory": True},
    "everything": lambda d, given: {
        **_transposed(d, given),
        **_residual(d, given),
        **_BOTH_DROPOUTS,
        "activation": "gelu_tanh",
        "save_memory": True,
    },
}
_GATED_SETS: dict[str, Options] = {
    **_FEED_FORWARD_SETS,
    "stacked": _stacked,
    "stacked_transposed": _stacked_transposed,
}


def _ignored(draw: Draw, given: Inputs) -> Inputs:
    target = given["target"].clone()
    target[1::3] = -100
    return {"target": target}


def _class_weight(draw: Draw, given: Inputs) -> Inputs:
    return {"class_weight": torch.rand(given["weight"].shape[0], generator=draw.generator) + 0.1}


_CROSS_ENTROPY_SETS: dict[str, Options] = {
    "plain": lambda d, given: {},
    "no_bias": _no_bias,
    "transposed": _transposed,
    "sum": lambda d, given: {"reduction": "sum"},
    "none": lambda d, given: {"reduction": "none"},
    "ignored": _ignored,
    "ignore_index": lambda d, given: {"ignore_index": 0},
    "class_weight": _class_weight,
    "label_smoothing": lambda d, given: {"label_smoothing": 0.2},
    "only_smoothing": lambda d, given: {"label_smoothing": 1.0},
    "z_loss": lambda d, given: {"z_loss": 0.1},
    "softcap": lambda d, given: {"softcap": 2.0},
    "everything": lambda d, given: {
        **_transposed(d, given),
        **_ignored(d, given),
        **_class_weight(d, given),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 5.0,
        "reduction": "none",
    },
}

_SETS: dict[str, dict[str, Options]] = {
    "linear": _LINEAR_SETS,
    "feed_forward": _FEED_FORWARD_SETS,
    "gated_feed_forward": _GATED_SETS,
    "linear_cross_entropy": _CROSS_ENTROPY_SETS,
}
OPTION_SETS = {op: tuple(sets) for op, sets in _SETS.items()}
EVERY_OPTION = tuple((op, name) for op, names in OPTION_SETS.items() for name in names)
