"""The dropout mask of fastattn/dropout.py, for tiles of a kernel."""

from typing import Any

import torch
from torch import Tensor

from fastattn import dropout
from fastattn.triton._runtime import tl, triton


def threshold(p: float) -> int:
    """`dropout.threshold` moved into the range of an int32, as `keep_tile` takes it."""
    return dropout.threshold(p) - 2**31


def seed_on(seed: Tensor, device: torch.device) -> Tensor:
    """The seed where kernels can read it. A fill waits for nothing and can be recorded in a CUDA graph."""
    if seed.device == device:
        return seed
    return torch.full((), int(seed), dtype=torch.int64, device=device)


@triton.jit
def words(seed, plane, row, quad):
    """The words of columns 4 quad ... 4 quad + 3, as four tiles of uint32.

    seed is an int64; plane, row and quad are tiles of integers that fit each other.
    """
    zero = (quad + row + plane).to(tl.uint32) * 0
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2 = zero + quad.to(tl.uint32), zero + row.to(tl.uint32), zero + plane.to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, zero, zero + low, zero + high)


@triton.jit
def keep_tile(seed, threshold, plane, rows, first_column, COLUMNS: tl.constexpr):
    """True where a position of a tile survives: int1 [R, COLUMNS].

    Args:
        seed: int64, loaded.
        threshold: of `threshold(p)`.
        plane: an integer, or [R, 1].
        rows: [R, 1], of the mask.
        first_column: of the tile; a multiple of 4, as COLUMNS is.
    """
    quads = (first_column // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    a, b, c, d = words(seed, rows * 0 + plane, rows, quads)
    tile = tl.join(tl.join(a, c), tl.join(b, d))  # [R, COLUMNS / 4, 2, 2], in the order of columns
    tile = tile.reshape(tile.shape[0], COLUMNS)
    return (tile ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


# Kernels take the threshold unspecialised: another share is no other kernel.
UNSPECIALISED: dict[str, Any] = {"do_not_specialize": ["threshold"]}
