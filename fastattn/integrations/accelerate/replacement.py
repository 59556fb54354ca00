"""The mechanism: a method of one module, replaced on that instance alone, and put back."""

import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastattn import dispatch
from fastattn.integrations.accelerate.report import LayerReport, Part


class Refused(NotImplementedError):
    """This call is not for fastattn: the module's own method computes it."""


# What a call raises that fastattn does not take; a parameter that was taken away is a KeyError.
REFUSALS = (NotImplementedError, TypeError, ValueError, KeyError)


@dataclass(eq=False)
class Layer:
    """One layer that was recognised, and what became of it."""

    name: str
    part: Part
    module: nn.Module
    ops: str  # what fastattn runs for it; "" where it can't
    why_not: str = ""
    covers: tuple[nn.Module, ...] = ()  # the modules inside that do not run any more
    replace: Callable[["Layer"], Callable[[], None]] | None = None  # does it; returns what undoes it
    active: bool = False
    calls: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def report(self) -> LayerReport:
        ops = self.ops if self.active else ""
        note = "; ".join(f"{n} to torch: {reason}" for reason, n in self.refused.items())
        note = note if self.active else self.why_not or "removed"
        return LayerReport(self.name, self.part, type(self.module).__name__, ops, self.calls, note)


# Modules with a method that is ours now.
served_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# The functions that `put` has put. A copy of a module takes them along, and runs its own method.
_ours: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def has_own(module: nn.Module, method: str = "forward") -> bool:
    """Whether somebody else has replaced the method on this instance.

    Not so in copies of a module that was served: they have a function of ours, or, where pickle made
    them, their class's own.
    """
    found = module.__dict__.get(method)
    function = getattr(found, "__func__", None)
    return found is not None and function not in _ours and function is not getattr(type(module), method)


def replaced(compute: Callable[..., Any], method: str = "forward") -> Callable[[Layer], Callable[[], None]]:
    """Has `compute`, which gets the positional arguments, run for a layer's method as long as it is active.

    Where it refuses, and for whoever else comes by the function, such as copies of the module, the
    method of the class runs. Pickle and transformers see that one's name and signature.
    """

    def replace(layer: Layer) -> Callable[[], None]:
        module = layer.module
        original = getattr(type(module), method)

        @wraps(original)
        def served(self: nn.Module, *args: Any, **named: Any) -> Any:
            if self is not module or not layer.active:
                return original(self, *args, **named)
            if is_compiling():
                # A graph keeps what is decided here, and can neither try nor count.
                served_here = not named and takes(*args)
                return compute(*args) if served_here else original(self, *args, **named)
            try:
                if named:
                    raise Refused(f"called with {', '.join(named)} by name")
                out = compute(*args)
            except REFUSALS as refusal:
                layer.refused[str(refusal)] += 1
            else:
                layer.calls += 1
                return out
            return original(self, *args, **named)

        return put(layer, method, served)

    return replace


def put(layer: Layer, method: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Makes the function a method of the layer's module; returns what takes it back."""
    module = layer.module
    before = module.__dict__.get(method)
    ours = types.MethodType(function, module)
    module.__dict__[method] = ours
    _ours.add(function)
    served_modules.add(module)
    layer.active = True

    def undo() -> None:
        layer.active = False
        served_modules.discard(module)
        if module.__dict__.get(method) is not ours:
            return  # whoever replaced it since holds ours, which passes on from now on
        del module.__dict__[method]
        if before is not None:
            module.__dict__[method] = before

    return undo


def takes(*args: Any) -> bool:
    """Whether kernels exist for tensors of this kind, which a graph can't find out by trying."""
    x = args[0] if args else None
    if not isinstance(x, Tensor):
        return False
    if dispatch.DEFAULT == dispatch.REFERENCE:
        return True
    return x.device.type in dispatch.ORDER and x.dtype is not torch.float64
