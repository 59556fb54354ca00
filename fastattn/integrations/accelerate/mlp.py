"""Feed-forward layers: two or three linears with an activation between them, as one op."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn.integrations.accelerate.formula import match
from fastattn.integrations.accelerate.replacement import Layer, Refused, has_own, replaced
from fastattn.integrations.accelerate.structure import (
    Linear,
    Rate,
    Unfit,
    activation_of,
    inside,
    linear_of,
    rate_of,
)
from fastattn.integrations.accelerate.weights import Given, given_by
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.gated_feed_forward import gated_feed_forward

_PLAIN = "self.ACTIVATION(self.UP(x))"
_GATED = "self.ACTIVATION(self.GATE(x)) * self.UP(x)"
_HALVES = "self.GATE(x).chunk(2, dim=-1)"
_STACKED = (f"{_HALVES}[1] * self.ACTIVATION({_HALVES}[0])", f"self.ACTIVATION({_HALVES}[0]) * {_HALVES}[1]")
# T5 casts to the type of its last weight, which may differ from the others'; then it is left alone.
_T5 = (
    "self.DOWN({0}.to(self.DOWN.weight.dtype) if isinstance(self.DOWN.weight, torch.Tensor) "
    "and {0}.dtype != self.DOWN.weight.dtype and self.DOWN.weight.dtype != torch.int8 else {0})"
)
_ENDS = (
    "self.DOWN({0})",
    "self.DROPOUT(self.DOWN({0}))",
    "self.DOWN(self.HIDDEN_DROPOUT({0}))",
    "self.DROPOUT(self.DOWN(self.HIDDEN_DROPOUT({0})))",
    _T5.format("self.HIDDEN_DROPOUT({0})"),
)
_PATTERNS = [
    "lambda self, x: " + end.format(hidden) for hidden in (_PLAIN, _GATED, *_STACKED) for end in _ENDS
]
# torch.nn.TransformerEncoderLayer and TransformerDecoderLayer have theirs in a method.
_METHODS = ("forward", "_ff_block")

# Classes that are feed-forward layers by their name: if they are left alone, the report says so.
_NAMED = re.compile(r"MLP|Mlp|FeedForward|FFN|ActDense|Experts")


class _Parts(NamedTuple):
    """What of a module plays which role."""

    gate: Given | None
    up: Given | None  # None: stacked below the gate
    down: Given
    options: Callable[[], dict[str, Any]]  # the op's keywords, as they are now
    unchanged: Callable[[], bool]
    linears: tuple[nn.Module, ...]


def mlp_layer(name: str, module: nn.Module) -> Layer | None:
    """The feed-forward layer that this module is, whether it can be served or not; None: it is none."""
    why_not = ""
    for method in _METHODS:
        for attributes in _readings(getattr(type(module), method, None)):
            try:
                if has_own(module, method):
                    raise Unfit(f"its {method} was replaced already")
                parts = _parts(module, attributes)
            except Unfit as reason:
                why_not = why_not or str(reason)
                continue
            return _layer(name, module, method, parts)
    if _NAMED.search(type(module).__name__) and not isinstance(module, nn.ModuleList):
        return Layer(name, "mlp", module, "", why_not or "its forward is none of the formulas known")
    return None


def _readings(method: Any) -> Iterator[dict[str, str]]:
    """Who plays which role, in each way that the formula can be read: a dropout may stand in two places."""
    for pattern in _PATTERNS:
        if (attributes := match(method, pattern)) is not None:
            yield attributes


def _parts(module: nn.Module, attributes: dict[str, str]) -> _Parts:
    """Raises Unfit where an attribute is not what its role asks for."""
    linears = {
        role: _linear(module, attributes[role]) for role in ("GATE", "UP", "DOWN") if role in attributes
    }
    if len({linear.parameters["weight"].dtype for linear in linears.values()}) > 1:  # type: ignore[union-attr]
        raise Unfit("its weights are of different types")
    given = {role: given_by(linear) for role, linear in linears.items()}
    options = _options(
        activation_of(getattr(module, attributes["ACTIVATION"])),
        _rate(module, attributes.get("DROPOUT")),
        _rate(module, attributes.get("HIDDEN_DROPOUT")),
    )
    unchanged = inside(module, set(attributes.values()))
    covered = tuple(getattr(module, attributes[role]) for role in linears)
    return _Parts(given.get("GATE"), given.get("UP"), given["DOWN"], options, unchanged, covered)


def _linear(module: nn.Module, name: str) -> Linear:
    try:
        return linear_of(getattr(module, name))
    except Unfit as reason:
        raise Unfit(f"{name} {reason}") from None


def _rate(module: nn.Module, name: str | None) -> Rate | None:
    return None if name is None else rate_of(getattr(module, name))


def _options(activation: str, rate: Rate | None, hidden_rate: Rate | None) -> Callable[[], dict[str, Any]]:
    fixed = {"activation": activation}
    if rate is None and hidden_rate is None:
        return lambda: fixed
    rate, hidden_rate = rate or (lambda: 0.0), hidden_rate or (lambda: 0.0)

    def options() -> dict[str, Any]:
        p, hidden_p = rate(), hidden_rate()
        return {**fixed, "dropout_p": p, "hidden_dropout_p": hidden_p} if p or hidden_p else fixed

    return options


def _layer(name: str, module: nn.Module, method: str, parts: _Parts) -> Layer:
    if parts.gate is None:
        ops, compute = "feed_forward", _plain(parts)
    else:
        ops, compute = "gated_feed_forward", _gated(parts, parts.gate)
    return Layer(name, "mlp", module, ops, covers=parts.linears, replace=replaced(compute, method))


def _plain(parts: _Parts) -> Callable[[Tensor], Tensor]:
    _, up, down, options, unchanged, _ = parts
    assert up is not None

    def compute(x: Tensor) -> Tensor:
        if not unchanged():
            raise Refused("a module inside was exchanged, or has hooks")
        return feed_forward(x, *up(), *down(), **options())

    return compute


def _gated(parts: _Parts, gate: Given) -> Callable[[Tensor], Tensor]:
    _, up, down, options, unchanged, _ = parts
    stacked = (None, None)

    def compute(x: Tensor) -> Tensor:
        if not unchanged():
            raise Refused("a module inside was exchanged, or has hooks")
        w_gate, b_gate = gate()
        w_up, b_up = stacked if up is None else up()
        w_down, b_down = down()
        return gated_feed_forward(
            x, w_gate, w_up, w_down, b_gate=b_gate, b_up=b_up, b_down=b_down, **options()
        )

    return compute
