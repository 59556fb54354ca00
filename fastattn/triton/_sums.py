"""Sums over the rows of a matrix: gradients of biases and of what norms multiply by. No atomics."""

from typing import Any

import torch
from torch import Tensor

from fastattn.triton._numbers import narrow, widen
from fastattn.triton._runtime import ceil_div, launch, tl, triton

# Rows of one program, rows and columns that it reads at a time. They fix the order of the sums.
_ROWS_EACH, _ROWS, _COLUMNS = 1024, 32, 64


@triton.jit
def sum_rows_kernel(
    x,  # [M, N]
    out,  # [parts, N]: the sums of each rows_each rows
    x_stride,
    M,
    N,
    rows_each,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    inside = (columns < N)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, rows_each, ROWS):
        rows = (part * rows_each + begin + tl.arange(0, ROWS))[:, None]
        sums += widen(tl.load(x + rows * x_stride + columns[None, :], (rows < M) & inside, other=0.0))
    tl.store(out + part * N + columns, narrow(tl.sum(sums, 0), out.dtype.element_ty), columns < N)


def sum_rows(x: Tensor, out: Tensor) -> Tensor:
    """out [N] = the sums of x [M, N], whose last stride is 1, in float32; 0 where there are no rows."""
    rows, columns = x.shape
    if (parts := ceil_div(rows, _ROWS_EACH)) > 1:
        sums = x.new_empty(parts, columns, dtype=torch.float32)
        _launch(x, sums, parts)
        return sum_rows(sums, out)
    _launch(x, out, 1)
    return out


def _launch(x: Tensor, out: Tensor, parts: int) -> None:
    rows, columns = x.shape
    rows_each = min(_ROWS_EACH, ceil_div(rows, _ROWS) * _ROWS)
    grid = (ceil_div(columns, _COLUMNS), parts)
    options: dict[str, Any] = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": 4}
    launch(sum_rows_kernel, grid, x, out, x.stride(0), rows, columns, rows_each, **options)
