"""Activations and their derivatives on float32 tiles, by the names of a Call."""

from fastattn.triton._runtime import tl, triton


@triton.jit
def tanh(x):
    # Near 0 the difference of two numbers near 1 would be left with few bits.
    square = x * x
    series = x * (1.0 + square * (-0.333333333 + square * 0.133333333))
    return tl.where(square < 0.01, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def _normal_below(x):
    """The normal distribution's share below x."""
    return 0.5 + 0.5 * tl.erf(0.70710678118 * x)


@triton.jit
def _tanh_share(x):
    """(1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return tl.sigmoid(x * (1.59576912 + 0.0713548163 * x * x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """activation(x); NaN stays NaN."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        x = tl.where(x < 0.0, 0.0, x * x)
    elif ACTIVATION == "gelu":
        x = x * _normal_below(x)
    elif ACTIVATION == "gelu_tanh":
        x = x * _tanh_share(x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(ACTIVATION == "none")
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at x."""
    if ACTIVATION == "relu":
        x = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        x = tl.where(x > 0.0, 2.0 * x, 0.0)
    elif ACTIVATION == "gelu":
        x = _normal_below(x) + x * 0.398942280 * tl.exp2(-0.721347520 * x * x)
    elif ACTIVATION == "gelu_tanh":
        share = _tanh_share(x)
        inner = x * (1.59576912 + 0.2140644489 * x * x)
        x = share * (1.0 + inner * (1.0 - share))
    elif ACTIVATION == "silu":
        share = tl.sigmoid(x)
        x = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == "sigmoid":
        share = tl.sigmoid(x)
        x = share * (1.0 - share)
    elif ACTIVATION == "tanh":
        tangent = tanh(x)
        x = 1.0 - tangent * tangent
    else:
        tl.static_assert(ACTIVATION == "none")
        x = x * 0.0 + 1.0
    return x
