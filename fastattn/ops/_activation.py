"""The activations of the feed-forward ops, by the names that they take."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = "none"  # how a Call says that there is no activation

_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ACTIVATIONS = tuple(_FORMS)


def check_activation(activation: str | None) -> str:
    """The activation's name in a Call."""
    if activation is None:
        return NONE
    if not isinstance(activation, str) or activation not in _FORMS:
        raise ValueError(f"activation must be None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def activate(activation: str, z: Tensor) -> Tensor:
    """In plain PyTorch, with its gradient."""
    return z if activation == NONE else _FORMS[activation](z)
