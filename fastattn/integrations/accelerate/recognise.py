"""Which layers of a model fastattn can serve: one pass over its modules, from the outside in."""

from collections.abc import Callable, Iterator

from torch import nn

from fastattn.integrations.accelerate.linear import linear_layer
from fastattn.integrations.accelerate.loss import loss_layer
from fastattn.integrations.accelerate.mlp import mlp_layer
from fastattn.integrations.accelerate.norm import norm_layer
from fastattn.integrations.accelerate.replacement import Layer
from fastattn.integrations.accelerate.rotary import rotary_layer

Filter = Callable[[nn.Module, str], bool]


def layers_of(model: nn.Module, rotates: set[nn.Module], chosen: Filter, loss: bool) -> Iterator[Layer]:
    """Every layer but attention, those that are left alone too.

    Args:
        rotates: the attention layers, which may apply a rotary embedding.
        chosen: what it declines is left alone; then its parts are layers of their own.
    """
    covered: set[nn.Module] = set()  # run by the op of a layer around them, or by none
    for name, module in model.named_modules():
        if module in covered:
            continue
        if type(module).__module__.split(".")[0] == "fastattn":
            covered.update(module.modules())
            continue
        if isinstance(module, nn.MultiheadAttention):
            covered.update(module.children())  # it reads their weights, and calls none
        for layer in _readings(name, module, module in rotates, loss):
            if layer.replace is not None and not chosen(module, name):
                layer.replace, layer.why_not = None, "left out by filter_fn"
            elif layer.replace is not None:
                covered.update(layer.covers)
            yield layer


def _readings(name: str, module: nn.Module, rotates: bool, loss: bool) -> Iterator[Layer]:
    found = [loss_layer(name, module, loss)]
    if rotates:
        found.append(rotary_layer(name, module))
    found.append(mlp_layer(name, module) or norm_layer(name, module) or linear_layer(name, module))
    yield from (layer for layer in found if layer is not None)
