"""One matrix product and what follows it: kernels of linear and the feed-forward ops, and their launches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.triton._activation import activated, slope
from fastattn.triton._numbers import narrow, widen
from fastattn.triton._philox import keep_tile, seed_on, threshold
from fastattn.triton._product import both_products, grid, matrix, place, precision_of, product, tile_for
from fastattn.triton._runtime import ceil_div, launch, tl, triton
from fastattn.triton._sums import sum_rows


class Dropout(NamedTuple):
    """What is dropped of an output; seed None: nothing."""

    seed: Any  # int64 []
    threshold: int
    scale: float
    plane: int


def dropout(p: float, seed: Tensor | None, plane: int, x: Tensor) -> Dropout:
    """A call's dropout, its seed where the kernel can read it."""
    if p == 0.0:
        return Dropout(None, 0, 1.0, plane)
    assert seed is not None
    return Dropout(seed_on(seed, x.device), threshold(p), 1.0 / (1.0 - p), plane)


NO_DROPOUT = Dropout(None, 0, 1.0, 0)


@triton.jit
def kept(value, drop, rows, columns):
    """value without what is dropped of it; the columns begin at a multiple of 4."""
    if drop.seed is not None:
        seed, first = tl.load(drop.seed), tl.min(columns, 0)
        keep = keep_tile(seed, drop.threshold, drop.plane, rows[:, None], first, columns.shape[0])
        value = tl.where(keep, value * drop.scale, 0.0)
    return value


@triton.jit
def read(x, stride, rows, columns, mask):
    """A tile of a matrix whose columns stand one after the other, as float32."""
    return widen(tl.load(x + rows[:, None] * stride + columns[None, :], mask, other=0.0))


@triton.jit
def write(x, stride, value, rows, columns, mask):
    tl.store(x + rows[:, None] * stride + columns[None, :], narrow(value, x.dtype.element_ty), mask)


@triton.jit
def with_bias(value, bias, columns, N):
    if bias is not None:
        value += widen(tl.load(bias + columns, columns < N, other=0.0))[None, :]
    return value


@triton.jit
def linear_fwd_kernel(
    out,  # [M, N], last stride 1 like z and the residual
    z,  # [M, N], or None: what the activation is applied to
    a,  # Matrix [M, K]
    weight,  # Matrix [N, K]
    bias,  # [N], or None
    residual,  # [M, N], or None
    out_stride,
    residual_stride,
    drop,  # Dropout
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows, columns = place(M, N, ROWS, COLUMNS)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    value = with_bias(product(a, weight, rows, columns, M, N, K, DEPTH, PRECISION), bias, columns, N)
    if z is not None:
        write(z, N, value, rows, columns, mask)
    value = kept(activated(value, ACTIVATION), drop, rows, columns)
    if residual is not None:
        value += read(residual, residual_stride, rows, columns, mask)
    write(out, out_stride, value, rows, columns, mask)


@triton.jit
def gated_fwd_kernel(
    out,  # [M, N]: activation(gate) * up
    z,  # [M, 2 N], or None: gate and up
    a,  # Matrix [M, K]
    gate_weight,  # Matrix [N, K]
    up_weight,  # Matrix [N, K]
    gate_bias,  # [N], or None
    up_bias,  # [N], or None
    drop,  # Dropout
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows, columns = place(M, N, ROWS, COLUMNS)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    gate, up = both_products(a, gate_weight, up_weight, rows, columns, M, N, K, DEPTH, PRECISION)
    gate = with_bias(gate, gate_bias, columns, N)
    up = with_bias(up, up_bias, columns, N)
    if z is not None:
        write(z, 2 * N, gate, rows, columns, mask)
        write(z + N, 2 * N, up, rows, columns, mask)
    write(out, N, kept(activated(gate, ACTIVATION) * up, drop, rows, columns), rows, columns, mask)


@triton.jit
def hidden_bwd_kernel(
    dz,  # [M, N], or [M, 2 N] where one half gates the other
    hidden,  # [M, N], or None: what forward multiplied by the weight
    z,  # like dz
    dout,  # Matrix [M, K]
    weight,  # Matrix [N, K]
    drop,  # Dropout of what is hidden
    M,
    N,
    K,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows, columns = place(M, N, ROWS, COLUMNS)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    value = kept(product(dout, weight, rows, columns, M, N, K, DEPTH, PRECISION), drop, rows, columns)
    stride = N
    if GATED:
        stride = 2 * N
    pre = read(z, stride, rows, columns, mask)
    result = activated(pre, ACTIVATION)
    if GATED:
        up = read(z + N, stride, rows, columns, mask)
        write(dz + N, stride, value * result, rows, columns, mask)
        value *= up
        result *= up
    write(dz, stride, value * slope(pre, ACTIVATION), rows, columns, mask)
    if hidden is not None:
        write(hidden, N, kept(result, drop, rows, columns), rows, columns, mask)


@triton.jit
def output_bwd_kernel(
    dz,  # [M, N]
    z,  # [M, N], or None: there was no activation
    dout,  # [M, N], last stride 1
    dout_stride,
    drop,  # Dropout
    M,
    N,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = place(M, N, ROWS, COLUMNS)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    value = kept(read(dout, dout_stride, rows, columns, mask), drop, rows, columns)
    if z is not None:
        value *= slope(read(z, N, rows, columns, mask), ACTIVATION)
    write(dz, N, value, rows, columns, mask)


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    z: Tensor | None = None,
    drop: Dropout = NO_DROPOUT,
    activation: str = "none",
) -> None:
    """out [M, N] = residual + dropout(activation(a b^T + bias)), a [M, K], b [N, K] of any strides.

    out's last stride is 1; alone, without what follows the product, it may be the other one.
    """
    if out.shape[1] > 1 and out.stride(1) != 1:
        a, b, out = b, a, out.t()
    rows, columns = out.shape
    if out.numel() == 0:
        return
    alone = residual is None and z is None and activation == "none" and a.stride(1) == 1
    tile = tile_for(a, rows, "ends" if drop.seed is not None else "wide" if alone else "middle")
    launch(
        linear_fwd_kernel, grid(tile, rows, columns), out, z, matrix(a), matrix(b), bias, residual,
        out.stride(0), 0 if residual is None else residual.stride(0), drop, rows, columns, a.shape[1],
        ACTIVATION=activation, PRECISION=precision_of(a.dtype), **tile.options(),
    )  # fmt: skip


def multiply_gated(
    a: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    out: Tensor,
    z: Tensor | None,
    drop: Dropout,
    activation: str,
) -> None:
    """out [M, N], contiguous, = dropout(activation(gate) * up); z [M, 2 N] = gate and up."""
    rows, columns = out.shape
    if out.numel() == 0:
        return
    tile = tile_for(a, rows, "gated")
    launch(
        gated_fwd_kernel, grid(tile, rows, columns), out, z, matrix(a), *map(matrix, weights), *biases, drop,
        rows, columns, a.shape[1], ACTIVATION=activation, PRECISION=precision_of(a.dtype), **tile.options(),
    )  # fmt: skip


def hidden_bwd(
    dout: Tensor, weight: Tensor, z: Tensor, drop: Dropout, activation: str, need_hidden: bool
) -> tuple[Tensor, Tensor | None]:
    """dz like z, which is [M, F] or, gated, [M, 2 F], from dout [M, N] and weight [N, F]; hidden [M, F]."""
    rows, columns = dout.shape[0], weight.shape[1]
    dz = torch.empty_like(z)
    hidden = z.new_empty(rows, columns) if need_hidden else None
    if rows == 0:
        return dz, hidden
    tile = tile_for(dout, rows, "ends")
    launch(
        hidden_bwd_kernel, grid(tile, rows, columns), dz, hidden, z, matrix(dout), matrix(weight.t()), drop,
        rows, columns, dout.shape[1], GATED=z.shape[1] > columns, ACTIVATION=activation,
        PRECISION=precision_of(dout.dtype), **tile.options(),
    )  # fmt: skip
    return dz, hidden


_OUTPUT_ROWS, _OUTPUT_COLUMNS = 32, 128


def output_bwd(dout: Tensor, z: Tensor | None, drop: Dropout, activation: str) -> Tensor:
    """The gradient of a product [M, N] from that of what followed it; last stride 1."""
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    if (z is None and drop.seed is None) or dout.numel() == 0:
        return dout
    rows, columns = dout.shape
    dz = dout.new_empty(rows, columns)
    blocks = ceil_div(rows, _OUTPUT_ROWS) * ceil_div(columns, _OUTPUT_COLUMNS)
    launch(
        output_bwd_kernel, (blocks,), dz, z, dout, dout.stride(0), drop, rows, columns,
        ACTIVATION=activation, ROWS=_OUTPUT_ROWS, COLUMNS=_OUTPUT_COLUMNS, num_warps=4,
    )  # fmt: skip
    return dz


def parameter_gradients(dz: Tensor, x: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """dweight [N, K] = dz^T x and dbias [N], the sums of dz [M, N]; those that are wanted."""
    if dweight is not None:
        multiply(dz.t(), x.t(), dweight)
    if dbias is not None:
        sum_rows(dz, dbias)
