"""Attention layers: how each one can be reached, and the switch of transformers' interface."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from torch import nn

# How a layer can be reached: transformers' attention interface, torch's SDPA, or not at all.
Way = Literal["interface", "sdpa", "none"]


class AttentionLayer(NamedTuple):
    name: str
    module: nn.Module
    way: Way
    chosen: bool  # by filter_fn


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Way]]:
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


def config_of(layer: AttentionLayer) -> Any:
    return layer.module.config


def is_switched(layer: AttentionLayer) -> bool:
    from fastattn.integrations import transformers as ours

    return bool(config_of(layer)._attn_implementation == ours.NAME)


def interface_calls(layer: AttentionLayer) -> int:
    if layer.way != "interface":
        return 0
    from fastattn.integrations import transformers as ours

    return ours.calls[id(layer.module)]


def switch_interface(model: nn.Module, layers: list[AttentionLayer]) -> Callable[[], None]:
    """Sets attn_implementation in the configs of the chosen layers; returns what sets it back."""
    from transformers import PreTrainedModel

    from fastattn.integrations import transformers as ours

    ours.register()
    configs: dict[int, bool] = {}
    for layer in layers:
        if layer.way == "interface":
            first = configs.setdefault(id(config_of(layer)), layer.chosen)
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
