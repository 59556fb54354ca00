"""accelerate(model): fastattn in a model that someone else wrote, until it is taken out again."""

import torch
from torch import nn

from fastattn.integrations.accelerate.attention import AttentionLayer, attention_layers
from fastattn.integrations.accelerate.handle import Handle, accelerated
from fastattn.integrations.accelerate.recognise import Filter, layers_of
from fastattn.integrations.accelerate.replacement import served_modules
from fastattn.integrations.accelerate.sdpa_layers import wrapped


def accelerate(
    model: nn.Module, *, filter_fn: Filter | None = None, pack: bool = False, loss: bool = False
) -> Handle:
    """Has fastattn compute the layers of this one model that it knows, in place.

    Attention on transformers' interface gets `attn_implementation="fastattn"`; attention that calls
    torch's SDPA, torch.nn.MultiheadAttention among it, runs inside an `sdpa_override` by function.
    Feed-forward, linear, norm and rotary layers get a forward of their own on the instance, where
    their class is found to compute what an op computes; docs/integrations.md says how. Parameters,
    state_dict keys, classes and what `save_pretrained` writes stay as they are.

    Args:
        model: in training or not, on any device; compile it afterwards.
        filter_fn: called with (layer, name) for each layer; False leaves it out. A feed-forward layer
            that is left out has its linear layers asked for one by one.
        pack: `fastattn.pack` the weights of the layers that are served, until `remove()`. No copy is kept.
        loss: causal language models compute their loss without their logits where labels are given;
            the logits that they return are None then.
    Returns:
        A handle with `report()` and `remove()`, which is also a context manager.
    Raises:
        TypeError: `model` is no module, has no layer of a kind that is known, or is compiled already.
        ValueError: it is accelerated already, or filter_fn splits attention layers that transformers
            switches together because they share one config.

    Example:
        >>> with fastattn.accelerate(model) as handle:
        ...     model.generate(**inputs)
        ...     print(handle.report())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise TypeError(f"model is a {type(model).__name__}; accelerate it first, then compile it")
    if any(part in known for part in model.modules() for known in (accelerated, wrapped, served_modules)):
        raise ValueError("model, or a part of it, is accelerated already; its handle can remove() it")

    def chosen(module: nn.Module, name: str) -> bool:
        return filter_fn is None or bool(filter_fn(module, name))

    attention = [
        AttentionLayer(name, module, way, chosen(module, name))
        for name, module, way in attention_layers(model)
    ]
    rotates = {layer.module for layer in attention if layer.way == "interface"}
    layers = list(layers_of(model, rotates, chosen, loss))
    if not attention and not layers:
        raise TypeError(
            f"found nothing to serve in {type(model).__name__}; known are attention, feed-forward, "
            "linear and norm layers"
        )
    return Handle(model, attention, layers, pack)
