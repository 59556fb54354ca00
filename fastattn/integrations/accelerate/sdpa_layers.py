"""Layers that call torch's SDPA: they, and what contains them, run inside an override by function."""

import types
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import nn

from fastattn.integrations.override import SdpaOverride


class LayerOverride(SdpaOverride):
    """Takes only the calls made inside the chosen layers, and counts them by layer."""

    def __init__(self) -> None:
        super().__init__("function")
        self.inside: list[str] = []  # the layers being run, the innermost last
        self.runs: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = {}

    def takes_calls(self) -> bool:
        return bool(self.inside)

    def count(self, refusal: Exception | None) -> None:
        super().count(refusal)
        if refusal is None:
            self.served[self.inside[-1]] += 1
        else:
            self.reasons.setdefault(self.inside[-1], Counter())[str(refusal)] += 1

    def note(self, name: str) -> str:
        if name in self.reasons:
            return "; ".join(f"{n} to torch: {reason}" for reason, n in self.reasons[name].items())
        if self.runs[name] and not self.served[name]:
            return f"ran {self.runs[name]} times without calling SDPA (as need_weights=True does)"
        return ""


class _Wrap(NamedTuple):
    override: LayerOverride
    layer: str | None  # the name, where the module is a chosen layer and not only on the way to one
    forward: Callable[..., Any] | None  # where the instance had a forward of its own


wrapped: weakref.WeakKeyDictionary[nn.Module, _Wrap] = weakref.WeakKeyDictionary()


def wrap_path(
    model: nn.Module,
    name: str,
    override: LayerOverride,
    undo: list[Callable[[], None]],
    is_layer: bool = True,
) -> None:
    """Wraps a layer and all modules that contain it; adds to `undo` what takes that back.

    So the override is on wherever the model is entered. The layer alone would not do: torch.nn's
    encoders decide above it for their fast path.
    """
    path = name.split(".") if name else []
    for depth in range(len(path) + 1):
        module = model.get_submodule(".".join(path[:depth]))
        layer = name if is_layer and depth == len(path) else None
        if module not in wrapped:
            wrapped[module] = _Wrap(override, layer, module.__dict__.get("forward"))
            undo.append(partial(_unwrap, module))
            module.__dict__["forward"] = types.MethodType(_forward_of(type(module)), module)
        elif layer is not None:
            wrapped[module] = wrapped[module]._replace(layer=layer)


def _unwrap(module: nn.Module) -> None:
    wrap = wrapped.pop(module)
    module.__dict__.pop("forward", None)
    if wrap.forward is not None:
        module.__dict__["forward"] = wrap.forward


def _forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    """What stands as `forward` in the __dict__ of a wrapped module, as a bound method.

    It finds all else by the module it is bound to: a copy.deepcopy of the module has a method bound
    to the copy, of which nothing is known here. It looks like the class's own forward, because
    transformers reads the signature, and pickle the name. The override cannot be part of a compiled
    graph, but what it surrounds can.
    """

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        wrap = wrapped.get(self)
        if wrap is None:
            return kind.forward(self, *args, **kwargs)
        original = wrap.forward or types.MethodType(kind.forward, self)
        override, layer = wrap.override, wrap.layer
        with override:
            if layer is None:
                return original(*args, **kwargs)
            override.runs[layer] += 1
            override.inside.append(layer)
            try:
                return original(*args, **kwargs)
            finally:
                override.inside.pop()

    return torch.compiler.disable(forward, recursive=False)  # type: ignore[no-any-return]
