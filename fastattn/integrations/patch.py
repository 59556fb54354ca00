"""accelerate(model): fastattn in a model that someone else wrote, until it is taken out again."""

import inspect
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastattn.integrations.override import SdpaOverride
from fastattn.nn.multihead_attention import MultiheadAttention

_ALLOWED = (
    "allowed are transformers models and modules whose attention is torch.nn.MultiheadAttention or "
    "a call of torch.nn.functional.scaled_dot_product_attention"
)


class LayerReport(NamedTuple):
    """What became of one attention layer."""

    name: str
    kind: str  # its class
    served: bool  # whether its attention is sent to fastattn
    calls: int  # how many fastattn computed since `accelerate`, outside of compiled graphs
    note: str  # why it is not served, or not always


class Report(list[LayerReport]):
    """One `LayerReport` per attention layer. Prints as a table."""

    def __str__(self) -> str:
        names = max(len("layer"), *(len(x.name) for x in self))
        kinds = max(len("class"), *(len(x.kind) for x in self))
        lines = [f"{'layer':{names}}  {'class':{kinds}}  served  calls  note"]
        for name, kind, served, calls, note in self:
            yes = "yes" if served else "no"
            lines.append(f"{name:{names}}  {kind:{kinds}}  {yes:6}  {calls:5}  {note}".rstrip())
        total = sum(x.calls for x in self)
        count = sum(x.served for x in self)
        lines.append(f"{count} of {len(self)} attention layers served, {total} calls")
        return "\n".join(lines)

    __repr__ = __str__


# How a layer can be reached: transformers' attention interface, torch's SDPA, or not at all.
_Way = Literal["interface", "sdpa", "none"]


class _Layer(NamedTuple):
    name: str
    module: nn.Module
    way: _Way
    chosen: bool  # by filter_fn


def accelerate(model: nn.Module, *, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> "Handle":
    """Sends the attention of this one model to fastattn, in place.

    Layers on transformers' attention interface get `attn_implementation="fastattn"`. Layers that
    call torch's SDPA, torch.nn.MultiheadAttention among them, run inside an `sdpa_override` by
    function. Parameters, state_dict keys, classes and what `save_pretrained` writes stay as they are.

    Args:
        model: in training or not, on any device; compile it afterwards.
        filter_fn: called with (layer, name) for each attention layer; False leaves it out.
    Returns:
        A handle with `report()` and `remove()`, which is also a context manager.
    Raises:
        TypeError: `model` is no module, has no attention layer, or is compiled already.
        ValueError: it is accelerated already, or filter_fn splits layers that transformers switches
            together because they share one config.

    Example:
        >>> with fastattn.accelerate(model) as handle:
        ...     model.generate(**inputs)
        ...     print(handle.report())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; {_ALLOWED}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError(f"model is a {type(model).__name__}; accelerate it first, then compile it")
    if any(module in _accelerated or module in _wrapped for module in model.modules()):
        raise ValueError("model, or a part of it, is accelerated already; its handle can remove() it")
    layers = [
        _Layer(name, module, way, filter_fn is None or bool(filter_fn(module, name)))
        for name, module, way in _attention_layers(model)
    ]
    if not layers:
        raise TypeError(f"found no attention in {type(model).__name__}; {_ALLOWED}")
    return Handle(model, layers)


class Handle:
    """What `accelerate` did to one model. As a context manager it removes that at the end."""

    def __init__(self, model: nn.Module, layers: list[_Layer]) -> None:
        self._model = model
        self._layers = layers
        self._override = _LayerOverride()
        self._undo: list[Callable[[], None]] = []
        self._counts_before = {layer.name: _interface_calls(layer) for layer in layers}
        try:
            if any(layer.way == "interface" and layer.chosen for layer in layers):
                self._undo.append(_switch_interface(model, layers))
            for layer in layers:
                if layer.way == "sdpa" and layer.chosen:
                    _wrap_path(model, layer.name, self._override, self._undo)
        except BaseException:
            self.remove()
            raise
        _accelerated.add(model)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "in place" if self._model in _accelerated else "removed"
        return f"<fastattn.accelerate({type(self._model).__name__}), {state}; see report()>"

    def remove(self) -> None:
        """Takes everything back: the model computes what it did before, bit for bit.

        Doing it again changes nothing.
        """
        while self._undo:
            self._undo.pop()()
        _accelerated.discard(self._model)

    def report(self) -> Report:
        """Layer by layer: whether fastattn serves it, why not, and how many calls it served."""
        return Report(self._report(layer) for layer in self._layers)

    def _report(self, layer: _Layer) -> LayerReport:
        calls = self._override.served[layer.name]
        if layer.way == "interface":
            calls = _interface_calls(layer) - self._counts_before[layer.name]
        note = ""
        if layer.way == "none":
            note = "computes attention itself, without transformers' interface or torch's SDPA"
            if isinstance(layer.module, MultiheadAttention):
                note = "is fastattn's own"
        elif not layer.chosen:
            note = "left out by filter_fn"
        elif self._model not in _accelerated:
            note = "removed"
        elif layer.way == "interface" and not _is_switched(layer):
            note = f"its config says attn_implementation={_config(layer)._attn_implementation!r}"
        served = not note
        if served and layer.way == "sdpa":
            note = self._override.note(layer.name)
        return LayerReport(layer.name, type(layer.module).__name__, served, calls, note)


# Roots that are accelerated now.
_accelerated: weakref.WeakSet[nn.Module] = weakref.WeakSet()


# ---- which layers there are ----


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Way]]:
    """The modules that compute attention themselves, told by the names that their code uses."""
    used: dict[type, set[str]] = {nn.MultiheadAttention: {"scaled_dot_product_attention"}}
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in used:
            used[kind] = _names_used(kind)
        if "ALL_ATTENTION_FUNCTIONS" in used[kind]:
            yield name, module, "interface"
        elif "scaled_dot_product_attention" in used[kind]:
            yield name, module, "sdpa"
        elif "Attention" in kind.__name__ and not any(
            "Attention" in type(part).__name__ for part in module.modules() if part is not module
        ):
            yield name, module, "none"


def _names_used(kind: type) -> set[str]:
    names: set[str] = set()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if base.__module__ == "transformers.modeling_utils":
            continue  # PreTrainedModel knows all the names, and computes no attention
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is not None:
                names.update(code.co_names)
    return names


# ---- layers on transformers' interface ----


def _config(layer: _Layer) -> Any:
    return layer.module.config


def _is_switched(layer: _Layer) -> bool:
    from fastattn.integrations import transformers as ours

    return bool(_config(layer)._attn_implementation == ours.NAME)


def _interface_calls(layer: _Layer) -> int:
    if layer.way != "interface":
        return 0
    from fastattn.integrations import transformers as ours

    return ours.calls[id(layer.module)]


def _switch_interface(model: nn.Module, layers: list[_Layer]) -> Callable[[], None]:
    """Sets attn_implementation in the configs of the chosen layers; returns what sets it back."""
    from transformers import PreTrainedModel

    from fastattn.integrations import transformers as ours

    ours.register()
    configs: dict[int, bool] = {}
    for layer in layers:
        if layer.way == "interface":
            first = configs.setdefault(id(_config(layer)), layer.chosen)
            if first != layer.chosen:
                raise ValueError(
                    f"filter_fn answers {layer.chosen} for {layer.name!r} and {first} for a layer "
                    "before it that shares its config; transformers switches them together"
                )
    before = [(config, config._attn_implementation_internal) for config in _configs(model)]

    def undo() -> None:
        for config, implementation in before:
            # Whatever the user has chosen since then stays.
            if config._attn_implementation_internal == ours.NAME:
                config._attn_implementation_internal = implementation

    try:
        for part in model.modules():
            # Parents come first and do this for their parts; not all of them for all (T5's in 5.17).
            if not isinstance(part, PreTrainedModel) or part.config._attn_implementation == ours.NAME:
                continue
            inside = set(part.modules())
            if any(x.way == "interface" and x.chosen and x.module in inside for x in layers):
                part.set_attn_implementation(ours.NAME)
    except BaseException:
        undo()
        raise
    for config, implementation in before:
        if not configs.get(id(config), True):
            config._attn_implementation_internal = implementation
    return undo


def _configs(model: nn.Module) -> list[Any]:
    """Every config of the model, those inside others too, once each."""
    from transformers import PreTrainedConfig

    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in config.sub_configs]
    return list(found.values())


# ---- layers that call torch's SDPA ----


class _LayerOverride(SdpaOverride):
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
    override: _LayerOverride
    layer: str | None  # the name, where the module is a chosen layer and not only on the way to one
    forward: Callable[..., Any] | None  # where the instance had a forward of its own


_wrapped: weakref.WeakKeyDictionary[nn.Module, _Wrap] = weakref.WeakKeyDictionary()


def _wrap_path(model: nn.Module, name: str, override: _LayerOverride, undo: list[Callable[[], None]]) -> None:
    """Wraps a layer and all modules that contain it; adds to `undo` what takes that back.

    So the override is on wherever the model is entered. The layer alone would not do: torch.nn's
    encoders decide above it for their fast path.
    """
    path = name.split(".") if name else []
    for depth in range(len(path) + 1):
        module = model.get_submodule(".".join(path[:depth]))
        layer = name if depth == len(path) else None
        if module not in _wrapped:
            _wrapped[module] = _Wrap(override, layer, module.__dict__.get("forward"))
            undo.append(partial(_unwrap, module))
            module.__dict__["forward"] = types.MethodType(_forward_of(type(module)), module)
        elif layer is not None:
            _wrapped[module] = _wrapped[module]._replace(layer=layer)


def _unwrap(module: nn.Module) -> None:
    wrap = _wrapped.pop(module)
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
        wrap = _wrapped.get(self)
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
