"""Norms: torch's own, and the RMS norms that models write out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastattn.integrations.accelerate.formula import match
from fastattn.integrations.accelerate.replacement import Layer, Refused, has_own, replaced
from fastattn.integrations.accelerate.structure import Unfit, check_parameter
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.rms_norm import rms_norm

Compute = Callable[[Tensor], Tensor]

_FLOAT = "x.to(torch.float32)"
_NORMALISED = "({0} * torch.rsqrt({1}.pow(2).mean(-1, keepdim=True) + self.EPS))"
_LLAMA = _NORMALISED.format(_FLOAT, _FLOAT)
_T5 = _NORMALISED.format("x", _FLOAT)
_HELPER = "lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.EPS)"


class _Form(NamedTuple):
    """One way in which models write an RMS norm."""

    methods: Mapping[str, str]  # name: pattern
    weight_offset: float = 0.0
    widens: bool = False  # with a weight of a wider type, the result is of that type
    switch: str = ""  # an attribute that must be true; where it is not, there is no weight


_FORMS = (
    # Llama's, T5's, OLMo's, Nemotron's, Gemma's, Gemma 4's, and the one without a weight.
    _Form({"forward": f"lambda self, x: self.WEIGHT * {_LLAMA}.to(x.dtype)"}, widens=True),
    _Form(
        {
            "forward": f"lambda self, x: self.WEIGHT * ({_T5}.to(self.WEIGHT.dtype) "
            f"if self.WEIGHT.dtype in [torch.float16, torch.bfloat16] else {_T5})"
        },
        widens=True,
    ),
    _Form({"forward": f"lambda self, x: (self.WEIGHT * {_LLAMA}).to(x.dtype)"}),
    _Form({"forward": f"lambda self, x: (self.WEIGHT.to(torch.float32) * {_LLAMA}).to(x.dtype)"}),
    _Form(
        {
            "forward": "lambda self, x: (self._norm(x.float()) * (1.0 + self.WEIGHT.float())).type_as(x)",
            "_norm": _HELPER,
        },
        weight_offset=1.0,
    ),
    _Form(
        {
            "forward": "lambda self, x: (self._norm(x.float()) * self.WEIGHT.float() "
            "if self.with_scale else self._norm(x.float())).type_as(x)",
            "_norm": "lambda self, x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + self.EPS, -0.5)",
        },
        switch="with_scale",
    ),
    _Form({"forward": "lambda self, x: self._norm(x.float()).type_as(x)", "_norm": _HELPER}),
)


def norm_layer(name: str, module: nn.Module) -> Layer | None:
    """The norm that this module is, whether it can be served or not; None: it is none."""
    kind = type(module)
    try:
        if kind is nn.LayerNorm:
            return Layer(name, "norm", module, "layer_norm", replace=replaced(layer_norm_of(module)))
        compute = _torch_rms_norm(module) if kind is nn.RMSNorm else _rms_norm_of(module)
    except Unfit as reason:
        return Layer(name, "norm", module, "", str(reason)) if _is_norm(module) else None
    return Layer(name, "norm", module, "rms_norm", replace=replaced(compute))


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and not any(module.children())


def layer_norm_of(module: nn.Module) -> Compute:
    """Raises Unfit where it is not torch.nn.LayerNorm over the last dimension, as it is."""
    if not isinstance(module, nn.LayerNorm) or type(module) is not nn.LayerNorm:
        raise Unfit(f"is a {type(module).__name__}, which has a forward of its own")
    _check(module, module.normalized_shape, "weight", "bias")
    parameters = module._parameters

    def compute(x: Tensor) -> Tensor:
        if not x.is_cpu and torch.is_autocast_enabled(x.device.type):
            raise Refused("under autocast torch's result is in float32")
        return cast(Tensor, layer_norm(x, parameters["weight"], parameters["bias"], eps=module.eps))

    return compute


def _torch_rms_norm(module: Any) -> Compute:
    _check(module, module.normalized_shape, "weight")
    if module.eps is None:
        raise Unfit("its eps is None, which depends on the type of x")
    return _compute(module._parameters, "weight", module.__dict__, "eps", 0.0, widens=True)


def _rms_norm_of(module: nn.Module) -> Compute:
    """Raises Unfit where the class does not compute an RMS norm in a form that is known."""
    for form in _FORMS:
        found = [match(getattr(type(module), name, None), text) for name, text in form.methods.items()]
        attributes: dict[str, str] = {}
        for part in found:
            attributes.update(part or {})
        if None in found or "EPS" not in attributes:
            continue
        weight, eps = attributes.get("WEIGHT"), attributes["EPS"]
        if form.switch and not getattr(module, form.switch):
            weight = None
        _check(module, (0,), *(() if weight is None else (weight,)))
        if not isinstance(getattr(module, eps), float):
            raise Unfit(f"its {eps} is no number")
        return _compute(module._parameters, weight, module.__dict__, eps, form.weight_offset, form.widens)
    raise Unfit("its forward is none of the formulas known")


def _check(module: nn.Module, shape: tuple[int, ...], *parameters: str) -> None:
    if has_own(module):
        raise Unfit("its forward was replaced already")
    if len(shape) != 1:
        raise Unfit(f"it normalises over {len(shape)} dimensions")
    for name in parameters:
        check_parameter(module, name)


def _compute(
    parameters: dict[str, Any],
    weight_name: str | None,
    namespace: dict[str, Any],
    eps: str,
    weight_offset: float,
    widens: bool,
) -> Compute:
    if weight_name is None:
        return lambda x: cast(Tensor, rms_norm(x, eps=namespace[eps]))

    def compute(x: Tensor) -> Tensor:
        weight = parameters[weight_name]
        if widens and weight is not None and weight.dtype is not x.dtype:
            raise Refused(f"its weight is {weight.dtype} and x is {x.dtype}")
        return cast(Tensor, rms_norm(x, weight, eps=namespace[eps], weight_offset=weight_offset))

    return compute
