"""The kernels of layer_norm and rms_norm, and their launches.

A row that fits a tile is read once. A longer one is read in pieces: once for each sum, once for the result;
all but the first of these reads find it in the second-level cache.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.triton._compile import Compilation
from fastattn.triton._numbers import narrow, widen
from fastattn.triton._runtime import ceil_div, config, launch, power_of_2, tl, triton
from fastattn.triton._sums import sum_rows


class NormConfig(NamedTuple):
    tile: int  # numbers in a tile of short rows
    longest: int  # numbers of the longest row that is one tile
    longest_bwd: int  # the same in backward, which holds more of each
    programs: int  # of backward: each adds up the gradients of the weight over its own rows
    lane: int  # numbers a thread holds of a tile


CONFIGS = {
    "sm80": NormConfig(4096, 16384, 8192, 432, 16),
    "sm89": NormConfig(4096, 16384, 8192, 512, 16),
    "sm90": NormConfig(4096, 16384, 8192, 528, 16),
    "cpu": NormConfig(4096, 256, 128, 3, 16),
}


class Tile(NamedTuple):
    """How a call is cut: one program has `rows` of it at a time, `columns` at a time."""

    rows: int
    columns: int
    num_warps: int


@cache
def tile_of(table: NormConfig, columns: int, longest: int) -> Tile:
    """It follows from a row's length alone: a row's result does not depend on its batch."""
    width = power_of_2(columns) if columns <= longest else longest // 4
    rows = max(table.tile // width, 1)
    return Tile(rows, width, min(max(rows * width // (32 * table.lane), 4), 32))


@triton.jit
def _total(x, residual, row, residual_row, mask):
    """x, or x + residual as it is stored; float32 [R, C]."""
    value = widen(tl.load(x + row, mask, other=0.0))
    if residual is not None:
        value += widen(tl.load(residual + residual_row, mask, other=0.0))
        value = widen(narrow(value, x.dtype.element_ty))
    return value


@triton.jit
def _finish(value, mean, rstd, weight, bias, weight_offset, columns, inside):
    """What is normalised, times the weight and plus the bias; [R, C]."""
    value = (value - mean) * rstd
    if weight is not None:
        value *= widen(tl.load(weight + columns, inside, other=0.0))[None, :] + weight_offset
    if bias is not None:
        value += widen(tl.load(bias + columns, inside, other=0.0))[None, :]
    return value


@triton.jit
def norm_fwd_kernel(
    x,  # [M, N]
    residual,  # like x, or None
    weight,  # [N], or None
    bias,  # [N], or None
    out,  # [M, N], contiguous
    total,  # like out, with a residual
    means,  # float32 [M], or None
    rstds,  # float32 [M], or None
    x_stride,
    residual_stride,
    M,
    N,
    eps,
    weight_offset,
    CENTRE: tl.constexpr,  # subtract the mean, as layer_norm does
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,  # COLUMNS >= N
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    valid = (rows < M)[:, None]
    x_row, residual_row, out_row = rows * x_stride, rows * residual_stride, rows * N
    x_row, residual_row, out_row = x_row[:, None], residual_row[:, None], out_row[:, None]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    mean = tl.zeros([ROWS, 1], tl.float32)
    value = sums
    if WHOLE:
        mask = valid & (columns < N)[None, :]
        value = _total(x, residual, x_row + columns[None, :], residual_row + columns[None, :], mask)
        if CENTRE:
            mean = tl.sum(value, 1)[:, None] / N
        difference = tl.where((columns < N)[None, :], value - mean, 0.0)
        sums = difference * difference
    else:
        if CENTRE:
            for first in range(0, N, COLUMNS):
                at = first + columns[None, :]
                sums += _total(x, residual, x_row + at, residual_row + at, valid & (at < N))
            mean = tl.sum(sums, 1)[:, None] / N
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, N, COLUMNS):
            at = first + columns[None, :]
            value = _total(x, residual, x_row + at, residual_row + at, valid & (at < N))
            difference = tl.where(at < N, value - mean, 0.0)
            sums += difference * difference
    rstd = 1.0 / tl.sqrt(tl.sum(sums, 1)[:, None] / N + eps)
    if rstds is not None:
        tl.store(rstds + rows[:, None], rstd, valid)
        if CENTRE:
            tl.store(means + rows[:, None], mean, valid)
    for first in range(0, COLUMNS if WHOLE else N, COLUMNS):
        at = first + columns
        mask = valid & (at < N)[None, :]
        if not WHOLE:
            value = _total(x, residual, x_row + at[None, :], residual_row + at[None, :], mask)
        if residual is not None:
            tl.store(total + out_row + at[None, :], narrow(value, total.dtype.element_ty), mask)
        result = _finish(value, mean, rstd, weight, bias, weight_offset, at, at < N)
        tl.store(out + out_row + at[None, :], narrow(result, out.dtype.element_ty), mask)


@triton.jit
def _slopes(x, dout, mean, rstd, weight, weight_offset, x_at, dout_at, columns, inside, mask):
    """(the normalised values, dout, dout times the weight); float32 [R, C], 0 outside."""
    value = tl.where(mask, (widen(tl.load(x + x_at, mask, other=0.0)) - mean) * rstd, 0.0)
    upstream = widen(tl.load(dout + dout_at, mask, other=0.0))
    slope = upstream
    if weight is not None:
        slope *= widen(tl.load(weight + columns, inside, other=0.0))[None, :] + weight_offset
    return value, upstream, slope


@triton.jit
def _add_to(sums, more, columns, inside):
    """sums [N] in memory += more [R, C] over its rows; a barrier must follow before the next."""
    tl.store(sums + columns, tl.load(sums + columns, inside) + tl.sum(more, 0), inside)


@triton.jit
def norm_bwd_kernel(
    x,  # [M, N], what was normalised
    dout,  # [M, N]
    dtotal,  # [M, N], or None
    weight,  # [N], or None
    means,  # float32 [M]; layer_norm
    rstds,  # float32 [M]
    dx,  # [M, N], contiguous
    dweight,  # float32 [programs, N], or None: the sums over each program's rows
    dbias,  # like dweight
    x_stride,
    dout_stride,
    dtotal_stride,
    M,
    N,
    rows_each,  # of a program; a multiple of ROWS
    weight_offset,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    weight_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias_sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    if not WHOLE:
        for first in range(0, N, COLUMNS):
            at = first + columns
            if dweight is not None:
                tl.store(dweight + program * N + at, tl.sum(weight_sums, 0), at < N)
            if dbias is not None:
                tl.store(dbias + program * N + at, tl.sum(bias_sums, 0), at < N)
    for begin in range(0, rows_each, ROWS):
        if not WHOLE:
            tl.debug_barrier()  # another thread may have stored what this one adds to
        rows = (program * rows_each + begin + tl.arange(0, ROWS))[:, None]
        valid = rows < M
        rstd = tl.load(rstds + rows, valid, other=0.0)
        mean = tl.zeros([ROWS, 1], tl.float32)
        if CENTRE:
            mean = tl.load(means + rows, valid, other=0.0)
        product, slopes = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        value, upstream, slope = product, product, product
        for first in range(0, COLUMNS if WHOLE else N, COLUMNS):
            at = first + columns
            mask = valid & (at < N)[None, :]
            value, upstream, slope = _slopes(
                x, dout, mean, rstd, weight, weight_offset,
                rows * x_stride + at[None, :], rows * dout_stride + at[None, :], at, at < N, mask,
            )  # fmt: skip
            product += value * slope
            slopes += slope
        along = tl.sum(product, 1)[:, None] / N
        centre = tl.zeros([ROWS, 1], tl.float32)
        if CENTRE:
            centre = tl.sum(slopes, 1)[:, None] / N
        for first in range(0, COLUMNS if WHOLE else N, COLUMNS):
            at = first + columns
            mask = valid & (at < N)[None, :]
            if not WHOLE:
                value, upstream, slope = _slopes(
                    x, dout, mean, rstd, weight, weight_offset,
                    rows * x_stride + at[None, :], rows * dout_stride + at[None, :], at, at < N, mask,
                )  # fmt: skip
            result = rstd * (slope - centre - value * along)
            if dtotal is not None:
                result += widen(tl.load(dtotal + rows * dtotal_stride + at[None, :], mask, other=0.0))
            tl.store(dx + rows * N + at[None, :], narrow(result, dx.dtype.element_ty), mask)
            if WHOLE:
                weight_sums += value * upstream
                bias_sums += upstream
            else:
                if dweight is not None:
                    _add_to(dweight + program * N, value * upstream, at, at < N)
                if dbias is not None:
                    _add_to(dbias + program * N, upstream, at, at < N)
    if WHOLE:
        if dweight is not None:
            tl.store(dweight + program * N + columns, tl.sum(weight_sums, 0), columns < N)
        if dbias is not None:
            tl.store(dbias + program * N + columns, tl.sum(bias_sums, 0), columns < N)


def norm_fwd(
    call: Any, bias: Tensor | None, outputs: tuple[Tensor | None, ...], centre: bool, weight_offset: float
) -> None:
    """Fills out, total, mean and rstd, those of them that are there."""
    x, weight, residual, eps = call.x, call.weight, call.residual, call.eps
    rows, columns = rows_of(x)
    if rows == 0:
        return
    table = config(CONFIGS, x.device)
    tile = tile_of(table, columns, table.longest)
    launch(
        norm_fwd_kernel, (ceil_div(rows, tile.rows),), x, residual, weight, bias, *outputs,
        row_stride(x), 0 if residual is None else row_stride(residual), rows, columns, eps, weight_offset,
        CENTRE=centre, ROWS=tile.rows, COLUMNS=tile.columns, WHOLE=tile.columns >= columns,
        num_warps=tile.num_warps,
    )  # fmt: skip


def norm_bwd(
    dout: Tensor,
    dtotal: Tensor | None,
    call: Any,
    statistics: tuple[Tensor | None, Tensor],
    need: tuple[bool, bool],
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight and dbias [N], empty where they are not needed."""
    x, weight = call.x, call.weight
    dout, dtotal = readable(dout), None if dtotal is None else readable(dtotal)
    rows, columns = rows_of(x)
    table = config(CONFIGS, x.device)
    tile = tile_of(table, columns, table.longest_bwd)
    blocks = ceil_div(rows, tile.rows)
    blocks_each = ceil_div(blocks, table.programs)
    programs = ceil_div(blocks, blocks_each) if blocks else 0
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = [x.new_empty(programs, columns, dtype=torch.float32) if needed else None for needed in need]
    if programs:
        launch(
            norm_bwd_kernel, (programs,), x, dout, dtotal, weight, *statistics, dx, *parts,
            row_stride(x), row_stride(dout), 0 if dtotal is None else row_stride(dtotal), rows, columns,
            blocks_each * tile.rows, weight_offset, CENTRE=statistics[0] is not None,
            ROWS=tile.rows, COLUMNS=tile.columns, WHOLE=tile.columns >= columns, num_warps=tile.num_warps,
        )  # fmt: skip
    likes = (weight, getattr(call, "bias", None))
    dweight, dbias = (
        x.new_empty(0) if part is None else sum_rows(part, torch.empty_like(like))
        for part, like in zip(parts, likes, strict=True)
    )
    return dx, dweight, dbias


def rows_of(x: Tensor) -> tuple[int, int]:
    """How many rows x [..., N] has, and N."""
    columns = x.shape[-1]
    return x.numel() // columns, columns


def row_stride(x: Tensor) -> int:
    """Of a tensor that is contiguous, or [M, N] with a last stride of 1."""
    return x.stride(0) if x.ndim == 2 else x.shape[-1]


def readable(x: Tensor) -> Tensor:
    """x [..., N] itself where `row_stride` knows it; else a copy."""
    if x.is_contiguous() or (x.ndim == 2 and x.stride(1) == 1):
        return x
    return x.contiguous()


def norm_compilations(architecture: str, centre: bool) -> Iterator[Compilation]:
    """Both kernels with all their arguments: short rows, long ones, the longest in a tile, and in pieces."""
    table = CONFIGS[architecture]
    for columns in (128, 4096, table.longest_bwd, table.longest, 2 * table.longest):
        tile = tile_of(table, columns, table.longest)
        arguments = {
            **_shared_arguments(centre, tile, columns),
            **dict.fromkeys(("x", "residual", "out", "total"), "*bf16"),
            "bias": "*bf16" if centre else None,
            "residual_stride": "i32:16",
            "eps": "fp32",
        }
        yield Compilation(f"N {columns}", norm_fwd_kernel, arguments, tile.num_warps)
        tile = tile_of(table, columns, table.longest_bwd)
        arguments = {
            **_shared_arguments(centre, tile, columns),
            **dict.fromkeys(("x", "dout", "dtotal", "dx"), "*bf16"),
            "dweight": "*fp32",
            "dbias": "*fp32" if centre else None,
            **dict.fromkeys(("dout_stride", "dtotal_stride", "rows_each"), "i32:16"),
        }
        yield Compilation(f"N {columns}", norm_bwd_kernel, arguments, tile.num_warps)


def _shared_arguments(centre: bool, tile: Tile, columns: int) -> dict[str, Any]:
    return {
        "weight": "*bf16",
        "means": "*fp32" if centre else None,
        "rstds": "*fp32",
        **dict.fromkeys(("x_stride", "N"), "i32:16"),
        "M": "i32",
        "weight_offset": "fp32",
        "CENTRE": centre,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WHOLE": tile.columns >= columns,
    }
