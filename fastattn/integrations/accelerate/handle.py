"""The handle of one accelerated model: what was done, the report of it, and how it is taken back."""

import weakref
from collections.abc import Callable

from torch import nn

from fastattn.integrations.accelerate.attention import (
    AttentionLayer,
    config_of,
    interface_calls,
    is_switched,
    switch_interface,
)
from fastattn.integrations.accelerate.report import LayerReport, Report
from fastattn.integrations.accelerate.sdpa_layers import LayerOverride, wrap_path
from fastattn.nn.multihead_attention import MultiheadAttention


class Handle:
    """What `accelerate` did to one model. As a context manager it removes that at the end."""

    def __init__(self, model: nn.Module, layers: list[AttentionLayer]) -> None:
        self._model = model
        self._layers = layers
        self._override = LayerOverride()
        self._undo: list[Callable[[], None]] = []
        self._counts_before = {layer.name: interface_calls(layer) for layer in layers}
        try:
            if any(layer.way == "interface" and layer.chosen for layer in layers):
                self._undo.append(switch_interface(model, layers))
            for layer in layers:
                if layer.way == "sdpa" and layer.chosen:
                    wrap_path(model, layer.name, self._override, self._undo)
        except BaseException:
            self.remove()
            raise
        accelerated.add(model)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "in place" if self._model in accelerated else "removed"
        return f"<fastattn.accelerate({type(self._model).__name__}), {state}; see report()>"

    def remove(self) -> None:
        """Takes everything back: the model computes what it did before, bit for bit.

        Doing it again changes nothing.
        """
        while self._undo:
            self._undo.pop()()
        accelerated.discard(self._model)

    def report(self) -> Report:
        """Layer by layer: whether fastattn serves it, why not, and how many calls it served."""
        return Report(self._report(layer) for layer in self._layers)

    def _report(self, layer: AttentionLayer) -> LayerReport:
        calls = self._override.served[layer.name]
        if layer.way == "interface":
            calls = interface_calls(layer) - self._counts_before[layer.name]
        note = ""
        if layer.way == "none":
            note = "computes attention itself, without transformers' interface or torch's SDPA"
            if isinstance(layer.module, MultiheadAttention):
                note = "is fastattn's own"
        elif not layer.chosen:
            note = "left out by filter_fn"
        elif self._model not in accelerated:
            note = "removed"
        elif layer.way == "interface" and not is_switched(layer):
            note = f"its config says attn_implementation={config_of(layer)._attn_implementation!r}"
        served = not note
        if served and layer.way == "sdpa":
            note = self._override.note(layer.name)
        return LayerReport(layer.name, type(layer.module).__name__, served, calls, note)


# Roots that are accelerated now.
accelerated: weakref.WeakSet[nn.Module] = weakref.WeakSet()
