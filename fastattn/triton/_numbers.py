"""Types of numbers inside kernels, and what keeps them right in the interpreter.

Triton's interpreter holds bfloat16 as bit patterns: arithmetic on them is wrong, and its cast does not round.
So kernels widen what they load, and narrow what they store.
"""

from fastattn.triton._runtime import INTERPRET, tl, triton


@triton.jit
def widen(x):
    """x in float32."""
    if INTERPRET and x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x, which is float32, rounded to the nearest number of a type."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        x = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b in float32; PRECISION, "ieee" or "tf32", is what products of float32 are made in."""
    if INTERPRET:
        a, b = widen(a), widen(b)
    return tl.dot(a, b, sums, input_precision=PRECISION)
