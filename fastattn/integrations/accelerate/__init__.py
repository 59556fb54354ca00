"""accelerate(model): fastattn in a model that someone else wrote, until it is taken out again."""

from collections.abc import Callable

import torch
from torch import nn

from fastattn.integrations.accelerate.attention import AttentionLayer, attention_layers
from fastattn.integrations.accelerate.handle import Handle, accelerated
from fastattn.integrations.accelerate.sdpa_layers import wrapped

_ALLOWED = (
    "allowed are transformers models and modules whose attention is torch.nn.MultiheadAttention or "
    "a call of torch.nn.functional.scaled_dot_product_attention"
)


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
    if any(module in accelerated or module in wrapped for module in model.modules()):
        raise ValueError("model, or a part of it, is accelerated already; its handle can remove() it")
    layers = [
        AttentionLayer(name, module, way, filter_fn is None or bool(filter_fn(module, name)))
        for name, module, way in attention_layers(model)
    ]
    if not layers:
        raise TypeError(f"found no attention in {type(model).__name__}; {_ALLOWED}")
    return Handle(model, layers)
