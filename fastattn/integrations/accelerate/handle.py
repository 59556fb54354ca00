"""The handle of one accelerated model: what was done, the report of it, and how it is taken back."""

import weakref
from collections.abc import Callable, Iterator

from torch import nn

from fastattn.integrations.accelerate.attention import (
    AttentionLayer,
    config_of,
    interface_calls,
    is_switched,
    switch_interface,
)
from fastattn.integrations.accelerate.packing import pack_weights
from fastattn.integrations.accelerate.replacement import Layer
from fastattn.integrations.accelerate.report import LayerReport, Report
from fastattn.integrations.accelerate.sdpa_layers import LayerOverride, wrap_path
from fastattn.nn.multihead_attention import MultiheadAttention


class Handle:
    """What `accelerate` did to one model. As a context manager it removes that at the end."""

    def __init__(
        self, model: nn.Module, attention: list[AttentionLayer], layers: list[Layer], pack: bool
    ) -> None:
        self._model = model
        self._attention = attention
        self._layers = layers
        self._override = LayerOverride()
        self._undo: list[Callable[[], None]] = []
        self._counts_before = {layer.name: interface_calls(layer) for layer in attention}
        try:
            self._install()
            if pack:
                self._undo.append(pack_weights(model, self._served_modules()))
        except BaseException:
            self.remove()
            raise
        accelerated.add(model)

    def _install(self) -> None:
        if any(layer.way == "interface" and layer.chosen for layer in self._attention):
            self._undo.append(switch_interface(self._model, self._attention))
        # The loss last: it goes around the linear layer that makes the logits.
        for layer in sorted(self._layers, key=lambda layer: layer.part == "loss"):
            if layer.replace is not None:
                self._undo.append(layer.replace(layer))
        for attention in self._attention:
            if attention.way == "sdpa" and attention.chosen:
                wrap_path(self._model, attention.name, self._override, self._undo)
        for name, module in self._model.named_modules():
            if isinstance(module, nn.TransformerEncoderLayer) and self._serves_inside(module):
                # Inside the override torch's fast path is off, which would call none of its parts.
                wrap_path(self._model, name, self._override, self._undo, is_layer=False)

    def _served_modules(self) -> Iterator[nn.Module]:
        """Those whose parameters are ours to read."""
        for layer in self._layers:
            if layer.active:
                yield from (layer.module, *layer.covers)

    def _serves_inside(self, module: nn.Module) -> bool:
        parts = set(module.modules())
        return any(layer.active and layer.module in parts for layer in self._layers)

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
        place = {name: place for place, (name, _) in enumerate(self._model.named_modules())}
        rows = [self._attention_report(layer) for layer in self._attention]
        rows += [layer.report() for layer in self._layers]
        return Report(sorted(rows, key=lambda row: place.get(row.name, len(place))))

    def _attention_report(self, layer: AttentionLayer) -> LayerReport:
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
        ops = "attention" if served else ""
        return LayerReport(layer.name, "attention", type(layer.module).__name__, ops, calls, note)


# Roots that are accelerated now.
accelerated: weakref.WeakSet[nn.Module] = weakref.WeakSet()
