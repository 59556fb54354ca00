"""linear_cross_entropy: its kernels, which end tiles of logits, and its launches.

Logits live in tiles and nowhere else. Forward keeps the largest logit and the sum of exponentials of each
token in each tile; backward makes the logits again, some classes at a time, and multiplies their gradients.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.triton._activation import tanh
from fastattn.triton._compile import Compilation
from fastattn.triton._gradients import allocate, or_empty
from fastattn.triton._linear import multiply, parameter_gradients, with_bias, write
from fastattn.triton._linear_compile import BY_ROW, compilation
from fastattn.triton._product import CONFIGS, grid, matrix, place, precision_of, product, tile_for
from fastattn.triton._runtime import ceil_div, interpreting, launch, tl, triton
from fastattn.triton._runtime import unsupported as unsupported


class Loss(NamedTuple):
    """What makes a loss of logits. Kernels are compiled anew for what is None."""

    target: Any  # int64 [M]
    class_weight: Any  # float32 [V], or None
    total_weight: Any  # float32 []: the sum of class_weight, or None
    ignore_index: int
    smoothing: float
    z_loss: float
    softcap: Any  # float, or None


@triton.jit
def logits_of(x, weight, bias, of, rows, columns, M, V, K, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of logits as the loss takes them."""
    value = with_bias(product(x, weight, rows, columns, M, V, K, DEPTH, PRECISION), bias, columns, V)
    if of.softcap is not None:
        value = of.softcap * tanh(value / of.softcap)
    return value


@triton.jit
def share_of(of, target, valid, V):
    """(each token's share of its own class, all of them's weight), float32."""
    share = tl.where(valid & (target != of.ignore_index), 1.0, 0.0)
    total = V * 1.0
    if of.class_weight is not None:
        known = valid & (target >= 0) & (target < V)
        share *= tl.load(of.class_weight + target, known, other=0.0)
        total = tl.load(of.total_weight)
    return share, total


@triton.jit
def linear_cross_entropy_fwd_kernel(
    largest,  # float32 [parts, M], parts = V / COLUMNS
    sums,  # float32 [parts, M]: of exp(logit - largest)
    weighted,  # float32 [parts, M]: of class_weight * logit; or None
    chosen,  # float32 [M]: the target's logit
    x,  # Matrix [M, K]
    weight,  # Matrix [V, K]
    bias,  # [V], or None
    of,  # Loss
    M,
    N,  # V
    K,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows, columns = place(M, N, ROWS, COLUMNS)
    valid, inside = rows < M, (columns < N)[None, :]
    value = logits_of(x, weight, bias, of, rows, columns, M, N, K, DEPTH, PRECISION)
    at = tl.min(columns, 0) // COLUMNS * M + rows
    top = tl.max(tl.where(inside, value, -float("inf")), 1)
    tl.store(largest + at, top, valid)
    tl.store(sums + at, tl.sum(tl.where(inside, tl.exp(value - top[:, None]), 0.0), 1), valid)
    if weighted is not None:
        even = tl.where(inside, value, 0.0)
        if of.class_weight is not None:
            even *= tl.load(of.class_weight + columns, columns < N, other=0.0)[None, :]
        tl.store(weighted + at, tl.sum(even, 1), valid)
    target = tl.load(of.target + rows, valid, other=-1)
    here = (columns[None, :] == target[:, None]) & inside
    mine = (target >= tl.min(columns, 0)) & (target <= tl.max(columns, 0)) & (target < N)
    tl.store(chosen + rows, tl.sum(tl.where(here, value, 0.0), 1), valid & mine)


@triton.jit
def linear_cross_entropy_join_kernel(
    loss,  # float32 [M]
    lse,  # float64 [M]
    largest,
    sums,
    weighted,
    chosen,
    of,  # Loss
    M,
    N,
    parts,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = rows < M
    top = tl.load(largest + rows, valid, other=0.0)
    total = tl.load(sums + rows, valid, other=1.0)
    even = tl.zeros((ROWS,), tl.float64)
    if weighted is not None:
        even += tl.load(weighted + rows, valid, other=0.0)
    at = rows
    for _ in range(1, parts):
        at += M
        more = tl.load(largest + at, valid, other=0.0)
        higher = tl.maximum(top, more)
        total = total * tl.exp(top - higher) + tl.load(sums + at, valid, other=0.0) * tl.exp(more - higher)
        top = higher
        if weighted is not None:
            even += tl.load(weighted + at, valid, other=0.0)
    whole = top.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(lse + rows, whole, valid)
    target = tl.load(of.target + rows, valid, other=0)
    share, all_weights = share_of(of, target, valid, N)
    counts = valid & (target != of.ignore_index)
    # A class that is not there makes NaN: a GPU can raise no error.
    known = counts & (target >= 0) & (target < N)
    result = (1.0 - of.smoothing) * share * (whole - tl.load(chosen + rows, known, other=float("nan")))
    if weighted is not None:
        result += of.smoothing / N * (whole * all_weights - even)
    result += of.z_loss * whole * whole
    tl.store(loss + rows, tl.where(counts, result, 0.0).to(tl.float32), valid)


@triton.jit
def linear_cross_entropy_bwd_kernel(
    dlogits,  # [M, N], of the classes from `first` on
    dloss,  # float32 [M]
    lse,  # float64 [M]
    x,  # Matrix [M, K]
    weight,  # Matrix [N, K], those classes'
    bias,  # [N], or None
    of,  # Loss, whose class_weight is of all classes
    first,
    V,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows, columns = place(M, N, ROWS, COLUMNS)
    valid, inside = rows < M, columns < N
    value = logits_of(x, weight, bias, of, rows, columns, M, N, K, DEPTH, PRECISION)
    whole = tl.load(lse + rows, valid, other=0.0)
    high = whole.to(tl.float32)
    rest = (whole - high.to(tl.float64)).to(tl.float32)
    target = tl.load(of.target + rows, valid, other=0)
    share, all_weights = share_of(of, target, valid, V)
    upstream = tl.load(dloss + rows, valid & (target != of.ignore_index), other=0.0)
    even = upstream * of.smoothing / V
    mine = upstream * (1.0 - of.smoothing) * share
    softmax = tl.exp(value - high[:, None] - rest[:, None])
    slope = softmax * (mine + even * all_weights + 2.0 * of.z_loss * high * upstream)[:, None]
    weights = tl.full((COLUMNS,), 1.0, tl.float32)
    if of.class_weight is not None:
        weights = tl.load(of.class_weight + first + columns, inside, other=0.0)
    slope -= even[:, None] * weights[None, :]
    slope -= tl.where((columns + first)[None, :] == target[:, None], mine[:, None], 0.0)
    if of.softcap is not None:
        part = value / of.softcap
        slope *= 1.0 - part * part
    write(dlogits, N, slope, rows, columns, valid[:, None] & inside[None, :])


def linear_cross_entropy_fwd(call: Any) -> tuple[Tensor, Tensor]:
    """[M]: the loss of each token, before the reduction, in float32, and its lse in float64."""
    x, weight = call.x, call.weight
    rows, classes = x.shape[0], weight.shape[0]
    loss = x.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(loss, dtype=torch.float64)
    if rows == 0:
        return loss, lse
    tile = tile_for(x, rows, "middle")
    parts = ceil_div(classes, tile.columns)
    largest, sums = x.new_empty(2, parts, rows, dtype=torch.float32)
    weighted = torch.empty_like(sums) if call.label_smoothing > 0.0 else None
    chosen = torch.empty_like(loss)
    of = _loss_of(call)
    launch(
        linear_cross_entropy_fwd_kernel, grid(tile, rows, classes), largest, sums, weighted, chosen,
        matrix(x), matrix(weight), call.bias, of, rows, classes, x.shape[1], PRECISION=precision_of(x.dtype),
        **tile.options(),
    )  # fmt: skip
    launch(
        linear_cross_entropy_join_kernel, (ceil_div(rows, _JOIN),), loss, lse, largest, sums, weighted,
        chosen, of, rows, classes, parts, ROWS=_JOIN, num_warps=4,
    )  # fmt: skip
    return loss, lse


_JOIN = 128  # tokens of a program


def linear_cross_entropy_bwd(
    dloss: Tensor, lse: Tensor, call: Any, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor, ...]:
    """dx [M, K], dweight [V, K] with weight's strides and dbias [V]; empty where they are not needed."""
    gradients = allocate((call.x, call.weight, call.bias), (need_dx, need_dweight, need_dbias))
    dx, dweight, dbias = gradients
    x, classes = call.x, call.weight.shape[0]
    each = _classes_at_once(x.shape[1], classes)
    sums = torch.empty_like(dx, dtype=torch.float32) if dx is not None and each < classes else dx
    of, dloss = _loss_of(call), dloss.contiguous()
    for first in range(0, classes, each):
        part = slice(first, min(first + each, classes))
        weight, bias = call.weight[part], None if call.bias is None else call.bias[part]
        dlogits = x.new_empty(x.shape[0], weight.shape[0])
        if x.shape[0]:
            tile = tile_for(x, x.shape[0], "ends")
            launch(
                linear_cross_entropy_bwd_kernel, grid(tile, *dlogits.shape), dlogits, dloss, lse, matrix(x),
                matrix(weight), bias, of, first, classes, *dlogits.shape, x.shape[1],
                PRECISION=precision_of(x.dtype), **tile.options(),
            )  # fmt: skip
        if dx is not None and sums is not None:
            to = dx if part.stop == classes else sums
            multiply(dlogits, weight.t(), to, residual=sums if first else None)
        dweight_part, dbias_part = (None if y is None else y[part] for y in (dweight, dbias))
        parameter_gradients(dlogits, x, dweight_part, dbias_part)
    return or_empty(gradients, x)


def _classes_at_once(features: int, classes: int) -> int:
    """So many that their gradients take about twice the room of x; a multiple of a tile."""
    each = 64 if interpreting else max(2 * features // 128 * 128, 4096)
    return min(classes, each)


def _loss_of(call: Any) -> Loss:
    weights = call.class_weight
    total = None if weights is None else weights.sum()
    softcap = call.softcap if call.softcap > 0.0 else None
    return Loss(call.target, weights, total, call.ignore_index, call.label_smoothing, call.z_loss, softcap)


def compilations(architecture: str) -> Iterator[Compilation]:
    """What docs/triton.md lists: the plain loss, and with all options."""
    tiles = CONFIGS[architecture]
    plain = Loss("*i64", None, None, "i32", "fp32", "fp32", None)  # type: ignore[arg-type]
    rich = Loss("*i64", "*fp32", "*fp32", "i32", "fp32", "fp32", "fp32")  # type: ignore[arg-type]
    saved = {**dict.fromkeys(("largest", "sums", "chosen", "dloss", "loss"), "*fp32"), "lse": "*fp64"}
    for name, of, weighted in (("plain", plain, None), ("everything", rich, "*fp32")):
        given = saved | {"x": BY_ROW, "of": of, "weighted": weighted, "bias": "*bf16" if weighted else None}
        given |= {"dlogits": "*bf16", "first": "i32:16", "V": "i32:16", "parts": "i32"}
        for size, forward, backward in (
            ("wide", tiles.middle, tiles.ends),
            ("few rows", tiles.few, tiles.few),
        ):
            yield compilation(f"{size}, {name}", linear_cross_entropy_fwd_kernel, forward, given)
            yield compilation(f"{size}, {name}", linear_cross_entropy_bwd_kernel, backward, given)
        join = tiles.few._replace(rows=_JOIN, stages=2)
        yield compilation(name, linear_cross_entropy_join_kernel, join, given, matrix=False)
