"""The rotary embedding that attention layers of transformers apply by a function of their file.

A layer finds that function among the globals of its file, which all models of its kind share. So the one
layer gets its own forward: the same code, with a copy of the globals in which the function is ours.
"""

import inspect
import types
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, cast

from torch import Tensor, nn
from torch.compiler import is_compiling

from fastattn.integrations.accelerate.formula import match
from fastattn.integrations.accelerate.replacement import REFUSALS, Layer, Refused, has_own, put
from fastattn.ops.rotary import rotary

_HALVES = {
    "rotate_half": "lambda x: torch.cat((-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]), dim=-1)"
}
_COS, _SIN = "cos.unsqueeze(unsqueeze_dim)", "sin.unsqueeze(unsqueeze_dim)"
_TURNED = f"({{0}} * {_COS} + rotate_half({{0}}) * {_SIN})"
_FIRST, _REST = f"{{0}}[..., :{_COS}.shape[-1]]", f"{{0}}[..., {_COS}.shape[-1]:]"


def _both(q: str, k: str) -> str:
    return f"lambda q, k, cos, sin, unsqueeze_dim: ({q.format('q')}, {k.format('k')})"


_PARTLY = f"torch.cat([{_TURNED.format(_FIRST)}, {_REST}], dim=-1)"
_FLOAT = _TURNED.format("{0}.float()")
# In the type of x times cos: Llama's, and that of models which turn the first values of a head.
_WIDENING = (_both(_TURNED, _TURNED), _both(_PARTLY, _PARTLY))
# In the type of x: OLMo's and ModernBERT's.
_KEEPING = (
    _both(f"{_TURNED}.to(q.dtype)", f"{_TURNED}.to(k.dtype)"),
    _both(f"{_FLOAT}.to(q.dtype)", f"{_FLOAT}.to(q.dtype)"),
)


def rotary_layer(name: str, module: nn.Module) -> Layer | None:
    """The rotary embedding of this attention layer, whether it can be served or not; None: it has none."""
    forward: Any = type(module).forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    found = [] if code is None else [x for x in code.co_names if x.startswith("apply_rotary_pos")]
    if not found:
        return None
    function: Any = inspect.unwrap(forward).__globals__.get(found[0])
    widens = any(match(function, pattern, _HALVES) is not None for pattern in _WIDENING)
    keeps = any(match(function, pattern, _HALVES) is not None for pattern in _KEEPING)
    why_not = ""
    if hasattr(forward, "__wrapped__"):
        why_not = "the forward of its layer is decorated"
    elif len(found) > 1 or not (widens or keeps):
        why_not = f"{' and '.join(found)} is none of the formulas known"
    elif has_own(module):
        why_not = "the forward of its layer was replaced already"
    if why_not:
        return Layer(name, "rotary", module, "", why_not)

    def replace(layer: Layer) -> Callable[[], None]:
        ours = _turning(layer, function, widens)
        return put(layer, "forward", _with_globals(forward, {found[0]: ours}))

    return Layer(name, "rotary", module, "rotary", replace=replace)


def _turning(layer: Layer, original: Callable[..., Any], widens: bool) -> Callable[..., Any]:
    @wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        # A compiler fuses this by itself, and cannot look at the angles.
        if not layer.active or is_compiling():
            return original(q, k, cos, sin, unsqueeze_dim)
        try:
            if unsqueeze_dim != 1:
                raise Refused(f"unsqueeze_dim={unsqueeze_dim}")
            if q.dtype is not k.dtype or (widens and q.dtype is not cos.dtype):
                raise Refused(f"q is {q.dtype}, k is {k.dtype}, cos is {cos.dtype}")
            half_cos, half_sin = _half(cos), _half(sin)
            turned = _turn(q, half_cos, half_sin), _turn(k, half_cos, half_sin)
        except REFUSALS as refusal:
            layer.refused[str(refusal)] += 1
        else:
            layer.calls += 1
            return turned
        return original(q, k, cos, sin, unsqueeze_dim)

    return apply


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, D], and so is the result; what a layer hands over is [B, S, H, D] in memory."""
    return rotary(x.transpose(1, 2), cos, sin).transpose(1, 2)


def _half(angles: Tensor) -> Tensor:
    """[B, S, R / 2] of cos or sin [B, S, R], whose halves are alike where the embedding is the usual one.

    Looked at once per forward pass: the layers of a model get the same tensor, and find the half with it.
    """
    version = 0 if angles.is_inference() else angles._version
    half, made_from = getattr(angles, "_fastattn_half", (None, 0))
    if half is None or made_from != version:
        half, other = angles.chunk(2, dim=-1)
        if not half.equal(other):
            raise Refused("the two halves of its angles differ")
        # A copy, because a view would keep alive what it hangs on.
        half = half.contiguous()
        angles._fastattn_half = half, version  # type: ignore[attr-defined]
    return cast(Tensor, half)


def _with_globals(function: Any, globals_: Mapping[str, Any]) -> Callable[..., Any]:
    """The same code among other globals.

    These have no __name__: torch.compile would look for them in the module of that name.
    """
    scope = {**function.__globals__, **globals_}
    del scope["__name__"]
    copy = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return wraps(function)(copy)
