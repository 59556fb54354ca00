"""The rotary kernel, which turns pairs by the angles of their token, and its launch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._numbers import narrow, widen
from fastattn.triton._runtime import ceil_div, config, launch, power_of_2, tl, triton
from fastattn.triton._runtime import unsupported as unsupported

# Numbers in a tile.
CONFIGS = {"sm80": 4096, "sm89": 4096, "sm90": 4096, "cpu": 16384}


@triton.jit
def rotary_fwd_kernel(
    x,  # [B, S, H, D], last stride 1
    cos,  # [P, half], or [B, S, half]; last stride 1
    sin,  # like cos
    positions,  # [B, S], or None: 0 ... S - 1
    out,  # [B, S, H, D], row by row
    x_b,
    x_s,
    x_h,
    cos_b,  # 0 for a table over positions
    cos_s,
    sin_b,
    sin_s,
    positions_b,
    positions_s,
    M,  # B S H
    S,
    H,
    D,
    P,  # rows that positions may name
    half,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,  # at least half
    REST: tl.constexpr,  # at least D - 2 half; 0: nothing is passed on
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < M
    token, h = rows // H, rows % H
    b, s = token // S, token % S
    angle = s
    if positions is not None:
        angle = tl.load(positions + b * positions_b + s * positions_s, valid, other=0).to(tl.int64)
    pairs = tl.arange(0, PAIRS)
    # An angle that is not there turns its token into NaN: a GPU can raise no error.
    known = (valid & (angle >= 0) & (angle < P))[:, None] & (pairs < half)[None, :]
    nan = float("nan")
    c = widen(tl.load(cos + (b * cos_b + angle * cos_s)[:, None] + pairs[None, :], known, other=nan))
    d = widen(tl.load(sin + (b * sin_b + angle * sin_s)[:, None] + pairs[None, :], known, other=nan))
    if INVERSE:
        d = -d
    at_x = x + (b * x_b + s * x_s + h * x_h)[:, None]
    at_out = out + (rows * D)[:, None]
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        mask = valid[:, None] & (both < 2 * half)
        value = widen(tl.load(at_x + both, mask, other=0.0))
        first, second = tl.split(value.reshape(ROWS, PAIRS, 2))
        turned = tl.join(first * c - second * d, second * c + first * d).reshape(ROWS, 2 * PAIRS)
        tl.store(at_out + both, narrow(turned, out.dtype.element_ty), mask)
    else:
        at = pairs[None, :]
        mask = valid[:, None] & (at < half)
        first = widen(tl.load(at_x + at, mask, other=0.0))
        second = widen(tl.load(at_x + half + at, mask, other=0.0))
        tl.store(at_out + at, narrow(first * c - second * d, out.dtype.element_ty), mask)
        tl.store(at_out + half + at, narrow(second * c + first * d, out.dtype.element_ty), mask)
    if REST > 0:
        at = 2 * half + tl.arange(0, REST)[None, :]
        mask = valid[:, None] & (at < D)
        tl.store(at_out + at, tl.load(at_x + at, mask, other=0.0), mask)


def rotary_fwd(call: Any) -> Tensor:
    """out [B, S, H, D]; backward is the same with the call's `inverse` turned over."""
    x, cos, sin, positions, interleaved, inverse = call
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    batch, seqlen, nheads, head_dim = x.shape
    half = cos.shape[-1]
    tile = _tile(config(CONFIGS, x.device), head_dim, half)
    tables = [(0, table.stride(0)) if table.ndim == 2 else table.stride()[:2] for table in (cos, sin)]
    rows = batch * seqlen * nheads
    launch(
        rotary_fwd_kernel, (ceil_div(rows, tile["ROWS"]),), x, cos, sin, positions, out, *x.stride()[:3],
        *tables[0], *tables[1], *((0, 0) if positions is None else positions.stride()),
        rows, seqlen, nheads, head_dim, cos.shape[-2], half,
        INTERLEAVED=interleaved, INVERSE=inverse, **tile, num_warps=4,
    )  # fmt: skip
    return out


def _tile(size: int, head_dim: int, half: int) -> dict[str, int]:
    pairs = power_of_2(half)
    rest = head_dim - 2 * half
    return {
        "ROWS": max(size // power_of_2(head_dim), 1), "PAIRS": pairs, "REST": power_of_2(rest) if rest else 0,
    }  # fmt: skip


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists: whole heads and parts of them, pairs in both orders."""
    strides = ("x_b", "x_s", "x_h", "cos_s", "sin_s", "D", "half")
    for head_dim, half in ((64, 32), (128, 64), (128, 32), (256, 128)):
        for interleaved in (False, True):
            arguments = {
                **dict.fromkeys(("x", "out"), "*bf16"),
                **dict.fromkeys(("cos", "sin"), "*fp32"),
                "positions": "*i64",
                **dict.fromkeys(strides, "i32:16"),
                **dict.fromkeys(("cos_b", "sin_b", "positions_b", "M", "S", "H", "P"), "i32"),
                "positions_s": 1,
                "INTERLEAVED": interleaved,
                "INVERSE": False,
                **_tile(CONFIGS[architecture], head_dim, half),
            }
            order = "interleaved" if interleaved else "halves"
            yield Compilation(f"D {head_dim}, R {2 * half}, {order}", rotary_fwd_kernel, arguments, 4)
