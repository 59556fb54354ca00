"""Linear layers, with what follows them in the same module: activation, dropout, residual, norm."""

from typing import Any

from torch import Tensor, nn

from fastattn.integrations.accelerate.formula import match
from fastattn.integrations.accelerate.norm import layer_norm_of
from fastattn.integrations.accelerate.replacement import Layer, Refused, has_own, replaced
from fastattn.integrations.accelerate.structure import (
    Unfit,
    activation_of,
    inside,
    linear_of,
    rate_of,
)
from fastattn.integrations.accelerate.weights import given_by
from fastattn.ops.linear import linear

# The longest first. y is a residual; some get one and leave it to others to add it.
_PATTERNS = (
    "lambda self, x, y: self.NORM(self.DROPOUT(self.LINEAR(x)) + y)",
    "lambda self, x, y: self.DROPOUT(self.LINEAR(x)) + y",
    "lambda self, x, y: self.DROPOUT(self.LINEAR(x))",
    "lambda self, x: self.NORM(self.ACTIVATION(self.LINEAR(x)))",
    "lambda self, x: self.ACTIVATION(self.LINEAR(x))",
    "lambda self, x: self.DROPOUT(self.LINEAR(x))",
)


def linear_layer(name: str, module: nn.Module) -> Layer | None:
    """The linear layer that this module is, whether it can be served or not; None: it is none."""
    for pattern in _PATTERNS:
        attributes = match(type(module).forward, pattern)
        if attributes is not None and not has_own(module):
            try:
                return _with_what_follows(name, module, pattern, attributes)
            except Unfit:
                continue  # its linear is a layer of its own
    try:
        given = given_by(linear_of(module))
    except Unfit as reason:
        return Layer(name, "linear", module, "", str(reason)) if _is_linear(module) else None
    return Layer(name, "linear", module, "linear", replace=replaced(lambda x: linear(x, *given())))


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of some kind, such as a quantised one."""
    named = type(module).__name__.endswith(("Linear", "Conv1D"))
    return isinstance(module, nn.Linear) or (named and not any(module.children()))


def _with_what_follows(name: str, module: nn.Module, pattern: str, attributes: dict[str, str]) -> Layer:
    """Raises Unfit where an attribute is not what its role asks for."""
    parts = {role: getattr(module, attribute) for role, attribute in attributes.items()}
    given = given_by(linear_of(parts["LINEAR"]))
    activation = activation_of(parts["ACTIVATION"]) if "ACTIVATION" in parts else None
    rate = rate_of(parts["DROPOUT"]) if "DROPOUT" in parts else lambda: 0.0
    norm = layer_norm_of(parts["NORM"]) if "NORM" in parts else None
    unchanged = inside(module, attributes.values())
    adds = "+ y" in pattern

    def compute(x: Tensor, y: Tensor | None = None) -> Any:
        if not unchanged():
            raise Refused("a module inside was exchanged, or has hooks")
        weight, bias = given()
        residual = y if adds else None
        out = linear(x, weight, bias, activation=activation, residual=residual, dropout_p=rate())
        return out if norm is None else norm(out)

    covers = (parts["LINEAR"],) if norm is None else (parts["LINEAR"], parts["NORM"])
    ops = "linear" if norm is None else "linear, layer_norm"
    return Layer(name, "linear", module, ops, covers=covers, replace=replaced(compute))
