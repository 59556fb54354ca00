"""The matrix product that all feed-forward ops are made of: a tile of a b^T, and which tile a program has.

What is done with a tile before it is stored is the affair of the kernels that call `product`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.triton._numbers import dot
from fastattn.triton._runtime import ceil_div, config, tl, triton


class Matrix(NamedTuple):
    """[rows, columns] with the strides of both, one of which is 1."""

    data: Any
    row: int
    column: int


class Tile(NamedTuple):
    """Of a product's output; `depth` numbers of each row and column are multiplied at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {
            "ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


class Tiles(NamedTuple):
    """One for each kind of product; those of `exact` are of float32 without tensor cores."""

    wide: Tile  # of a product alone
    middle: Tile  # where an activation or a sum follows
    few: Tile  # up to 16 rows
    gated: Tile  # two weights at once
    gated_few: Tile
    ends: Tile  # after which much is to do: dropout, slopes
    exact: Tile
    exact_few: Tile


CONFIGS = {
    "sm80": Tiles(
        wide=Tile(128, 256, 32, 8, 3),
        middle=Tile(128, 128, 32, 8, 4),
        few=Tile(16, 64, 128, 4, 4),
        gated=Tile(128, 64, 32, 8, 4),
        gated_few=Tile(16, 64, 64, 4, 4),
        ends=Tile(128, 64, 64, 8, 3),
        exact=Tile(64, 64, 16, 8, 2),
        exact_few=Tile(16, 64, 32, 4, 2),
    ),
    "sm89": Tiles(
        wide=Tile(128, 128, 32, 8, 3),
        middle=Tile(128, 64, 32, 8, 3),
        few=Tile(16, 64, 64, 4, 4),
        gated=Tile(128, 64, 32, 8, 3),
        gated_few=Tile(16, 64, 64, 4, 3),
        ends=Tile(128, 64, 32, 8, 3),
        exact=Tile(64, 64, 16, 8, 2),
        exact_few=Tile(16, 64, 32, 4, 2),
    ),
    "sm90": Tiles(
        wide=Tile(128, 256, 64, 8, 3),
        middle=Tile(128, 128, 64, 8, 4),
        few=Tile(16, 64, 128, 4, 4),
        gated=Tile(128, 64, 64, 8, 4),
        gated_few=Tile(16, 64, 64, 4, 4),
        ends=Tile(128, 64, 64, 8, 4),
        exact=Tile(64, 64, 16, 8, 2),
        exact_few=Tile(16, 64, 32, 4, 2),
    ),
    "cpu": Tiles(
        wide=Tile(128, 128, 128, 4, 1),
        middle=Tile(128, 128, 128, 4, 1),
        few=Tile(16, 128, 128, 4, 1),
        gated=Tile(128, 128, 128, 4, 1),
        gated_few=Tile(16, 128, 128, 4, 1),
        ends=Tile(64, 64, 64, 4, 1),
        exact=Tile(64, 64, 64, 4, 1),
        exact_few=Tile(16, 128, 128, 4, 1),
    ),
}

_FEW = 16  # rows that one tile of `few` holds


@triton.jit
def place(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program's rows and columns. Programs that run together share rows and columns in the cache."""
    GROUP: tl.constexpr = 8
    program = tl.program_id(0)
    across = tl.cdiv(N, COLUMNS)
    down = tl.cdiv(M, ROWS)
    group = program // (GROUP * across)
    height = min(down - group * GROUP, GROUP)
    within = program % (GROUP * across)
    first_row = (group * GROUP + within % height).to(tl.int64) * ROWS
    first_column = (within // height).to(tl.int64) * COLUMNS
    return first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)


@triton.jit
def product(
    a,  # Matrix [M, K]
    b,  # Matrix [N, K]
    rows,
    columns,
    M,
    N,
    K,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tile of a b^T with these rows and columns; float32, and 0 where nothing is."""
    at = tl.arange(0, DEPTH)
    steps = tl.full((), DEPTH, tl.int64)  # a stride may be 1, which is no number to the compiler
    wide = at.to(tl.int64)
    at_a = a.data + rows[:, None] * a.row + wide[None, :] * a.column
    at_b = b.data + wide[:, None] * b.column + columns[None, :] * b.row
    in_a, in_b = (rows < M)[:, None], (columns < N)[None, :]
    sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, K, DEPTH):
        inside = at < K - first
        left = tl.load(at_a, in_a & inside[None, :], other=0.0)
        right = tl.load(at_b, in_b & inside[:, None], other=0.0)
        sums = dot(left, right, sums, PRECISION)
        at_a += steps * a.column
        at_b += steps * b.column
    return sums


@triton.jit
def both_products(
    a, b, c, rows, columns, M, N, K, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T and a c^T as `product` makes them, from one reading of a."""
    at = tl.arange(0, DEPTH)
    steps = tl.full((), DEPTH, tl.int64)
    wide = at.to(tl.int64)
    at_a = a.data + rows[:, None] * a.row + wide[None, :] * a.column
    at_b = b.data + wide[:, None] * b.column + columns[None, :] * b.row
    at_c = c.data + wide[:, None] * c.column + columns[None, :] * c.row
    in_a, in_b = (rows < M)[:, None], (columns < N)[None, :]
    b_sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    c_sums = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, K, DEPTH):
        inside = at < K - first
        left = tl.load(at_a, in_a & inside[None, :], other=0.0)
        right = in_b & inside[:, None]
        b_sums = dot(left, tl.load(at_b, right, other=0.0), b_sums, PRECISION)
        c_sums = dot(left, tl.load(at_c, right, other=0.0), c_sums, PRECISION)
        at_a += steps * a.column
        at_b += steps * b.column
        at_c += steps * c.column
    return b_sums, c_sums


def matrix(x: Tensor) -> Matrix:
    """x as kernels take it."""
    return Matrix(x, *x.stride())


def tile_for(x: Tensor, rows: int, kind: str = "wide") -> Tile:
    """The tile of a product of x's type with so many rows; kind: wide, middle, gated or ends."""
    return _tile(config(CONFIGS, x.device), _exact(x.dtype), rows <= _FEW, kind)


@cache
def _tile(tiles: Tiles, exact: bool, few: bool, kind: str) -> Tile:
    if exact:
        return tiles.exact_few if few else tiles.exact
    if few:
        return tiles.gated_few if kind == "gated" else tiles.few
    return getattr(tiles, kind)  # type: ignore[no-any-return]


def _exact(dtype: torch.dtype) -> bool:
    return precision_of(dtype) == "ieee" and dtype is torch.float32


def precision_of(dtype: torch.dtype) -> str:
    """What products of float32 are made in: in tf32 where torch's own may be."""
    tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def grid(tile: Tile, rows: int, columns: int) -> tuple[int]:
    return (ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns),)
