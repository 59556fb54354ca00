"""The parts that layers are made of, told exactly: linears, activations, dropouts, and what hooks them."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _globals

from fastattn.integrations.accelerate.formula import match
from fastattn.integrations.accelerate.replacement import has_own
from fastattn.ops._activation import ACTIVATIONS, activate

_CONV1D = "lambda self, x: torch.addmm(self.BIAS, x.view(-1, x.size(-1)), self.WEIGHT).view(x.size()[:-1] + (self.SIZE,))"  # noqa: E501
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


Rate = Callable[[], float]


class Unfit(Exception):
    """A module is not what it would have to be; says why."""


class Linear(NamedTuple):
    """A plain linear layer's parameters, live: what is assigned to the module later is here too."""

    parameters: Mapping[str, Tensor | None]  # "weight" and "bias"
    transposed: bool  # the weight is [in, out], as in transformers' Conv1D


def linear_of(module: nn.Module) -> Linear:
    """torch.nn.Linear itself, or transformers' Conv1D, with ordinary parameters.

    Raises:
        Unfit: it is something else.
    """
    transposed = is_conv1d(module)
    if not transposed and type(module) is not nn.Linear:
        raise Unfit(f"is a {type(module).__name__}, which has a forward of its own")
    if has_own(module):
        raise Unfit("its forward was replaced already")
    for name in ("weight", "bias"):
        check_parameter(module, name)
    return Linear(module._parameters, transposed)


def is_conv1d(module: nn.Module) -> bool:
    """Whether its class is transformers' Conv1D, or one with the same forward: its weight is [in, out]."""
    attributes = {"BIAS": "bias", "WEIGHT": "weight", "SIZE": "nf"}
    return match(type(module).forward, _CONV1D) == attributes


def check_parameter(module: nn.Module, name: str) -> None:
    if name not in module._parameters:
        raise Unfit(f"its {name} is no parameter, but computed or stored otherwise")
    parameter = module._parameters[name]
    if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
        raise Unfit(f"its {name} is a {type(parameter).__name__}")


def activation_of(activation: object) -> str:
    """The name of an activation among those of the ops, told by its values.

    Raises:
        Unfit: it has other values than each of them, or is not torch's or transformers'.
    """
    is_module = isinstance(activation, nn.Module)
    name = type(activation).__name__ if is_module else getattr(activation, "__name__", str(activation))
    home = getattr(type(activation) if is_module else activation, "__module__", None) or ""
    if home.split(".")[0] not in ("torch", "transformers") or not callable(activation):
        raise Unfit(f"its activation {name} is not known")
    if isinstance(activation, nn.Module) and (has_own(activation) or any(activation.parameters())):
        raise Unfit(f"its activation {name} is not known")
    near = torch.linspace(-8.0, 8.0, 257, dtype=torch.float64)
    x = torch.cat([near, 100.0 * near])  # far out, where some are clipped
    with torch.no_grad():
        values = activation.forward(x) if isinstance(activation, nn.Module) else activation(x.clone())
        for known in ACTIVATIONS:
            if torch.allclose(values, activate(known, x)):
                return known
    raise Unfit(f"no op has its activation {name}")


def rate_of(dropout: object) -> Rate:
    """What a dropout drops, asked at each call: its p may be changed, and counts in training alone.

    Raises:
        Unfit: it is no dropout.
    """
    if isinstance(dropout, nn.Module) and has_own(dropout):
        raise Unfit("the forward of its dropout was replaced already")
    if type(dropout) is nn.Identity:
        return lambda: 0.0
    if not isinstance(dropout, nn.Dropout) or type(dropout) is not nn.Dropout:
        raise Unfit(f"has a {type(dropout).__name__} where a dropout is expected")
    return lambda: dropout.p if dropout.training else 0.0


def inside(module: nn.Module, names: Iterable[str]) -> Callable[[], bool]:
    """Whether a module's children still are what they were, and nobody watches them.

    Where one op runs for several modules, their hooks would not be called, and a child that was
    exchanged since, as PEFT does, would not be asked.

    Raises:
        Unfit: somebody watches them now.
    """
    own = module._modules
    children = [
        (name, child, child.__dict__, child.__dict__.get("forward"))
        for name in names
        if (child := own.get(name)) is not None
    ]
    hooks = [child.__dict__[kind] for _, child, *_ in children for kind in _HOOKS]
    hooks += [getattr(_globals, f"_global{kind}") for kind in _HOOKS]

    def unchanged() -> bool:
        if any(hooks):
            return False
        for name, child, namespace, forward in children:
            if own[name] is not child or namespace.get("forward") is not forward:
                return False
        return True

    for name, child, *_ in children:
        if any(child.__dict__[kind] for kind in _HOOKS):
            raise Unfit(f"{name} has hooks")
    return unchanged
