"""Which of the fused activations a callable is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.ops._activation import check_activation

Activation = str | Callable[[Tensor], Tensor]

_FUNCTIONS = (
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
    (F.sigmoid, "sigmoid"),
    (torch.sigmoid, "sigmoid"),
    (F.tanh, "tanh"),
    (torch.tanh, "tanh"),
)
_MODULES = ((nn.ReLU, "relu"), (nn.SiLU, "silu"), (nn.Sigmoid, "sigmoid"), (nn.Tanh, "tanh"))


def fused_name(activation: Activation) -> str | None:
    """The name under which the ops know it; None for what only PyTorch can compute.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(activation, str):
        return check_activation(activation)
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    for kind, name in _MODULES:
        if type(activation) is kind:
            return name
    for function, name in _FUNCTIONS:
        if activation is function:
            return name
    return None
