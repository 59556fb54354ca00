"""What docs/triton.md lists of linear, feed_forward and gated_feed_forward."""

from collections.abc import Iterator
from typing import Any

from fastattn.triton._compile import Compilation
from fastattn.triton._linear import (
    Dropout,
    gated_fwd_kernel,
    hidden_bwd_kernel,
    linear_fwd_kernel,
    output_bwd_kernel,
)
from fastattn.triton._product import CONFIGS, Matrix, Tile

DROPOUT = Dropout("*i64", "i32", "fp32", 1)  # type: ignore[arg-type]
_NO_DROPOUT = Dropout(None, "i32", "fp32", 1)  # type: ignore[arg-type]
BY_ROW = Matrix("*bf16", "i32:16", 1)  # type: ignore[arg-type]
BY_COLUMN = Matrix("*bf16", 1, "i32:16")  # type: ignore[arg-type]
_STRIDES = ("out_stride", "residual_stride", "dout_stride", "N", "K")


def linear_compilations(architecture: str) -> Iterator[Compilation]:
    """Forward with all that may follow, the two products of backward, and what comes before these."""
    tiles = CONFIGS[architecture]
    full = {"bias": "*bf16", "residual": "*bf16", "z": "*bf16", "drop": DROPOUT, "ACTIVATION": "gelu"}
    plain = {name: given for name, given in full.items() if name != "drop"}
    yield compilation("wide, bias", linear_fwd_kernel, tiles.wide, {"bias": "*bf16"})
    yield compilation("wide, dx", linear_fwd_kernel, tiles.wide, {"weight": BY_COLUMN})
    yield compilation(
        "middle, dweight", linear_fwd_kernel, tiles.middle, {"a": BY_COLUMN, "weight": BY_COLUMN}
    )
    yield compilation("middle, no dropout", linear_fwd_kernel, tiles.middle, plain)
    yield compilation("ends, everything", linear_fwd_kernel, tiles.ends, full)
    yield compilation("few rows, everything", linear_fwd_kernel, tiles.few, full)
    yield compilation("few rows, dx", linear_fwd_kernel, tiles.few, {"weight": BY_COLUMN})
    elementwise = Tile(32, 128, 16, 4, 1)
    yield compilation("everything", output_bwd_kernel, elementwise, full, matrix=False)


def hidden_compilations(architecture: str, gated: bool) -> Iterator[Compilation]:
    """Forward and backward of what is hidden; the rest is as for linear."""
    tiles = CONFIGS[architecture]
    full = {"drop": DROPOUT, "z": "*bf16", "hidden": "*bf16", "GATED": gated}
    plain = {name: given for name, given in full.items() if name != "drop"}
    for option, given in (("no dropout", plain), ("everything", full)):
        if gated:
            for name, tile in (("wide", tiles.gated), ("few rows", tiles.gated_few)):
                biases = dict.fromkeys(("gate_bias", "up_bias"), "*bf16")
                saved = {"ACTIVATION": "silu"}
                yield compilation(f"{name}, {option}", gated_fwd_kernel, tile, given | biases | saved)
        activation = {"ACTIVATION": "silu" if gated else "gelu"}
        for name, tile in (("wide", tiles.ends), ("few rows", tiles.few)):
            backward = given | {"weight": BY_COLUMN, "dout": BY_ROW} | activation
            yield compilation(f"{name}, {option}", hidden_bwd_kernel, tile, backward)


def compilation(
    name: str, kernel: Any, tile: Tile, given: dict[str, Any], matrix: bool = True
) -> Compilation:
    """A kernel in bfloat16; what is not given is absent."""
    common = {
        **dict.fromkeys(("out", "dz"), "*bf16"),
        "dout": BY_ROW if matrix else "*bf16",
        **dict.fromkeys(("a", "weight", "gate_weight", "up_weight"), BY_ROW),
        **dict.fromkeys(_STRIDES, "i32:16"),
        "M": "i32", "drop": _NO_DROPOUT, "ACTIVATION": "none", "PRECISION": "ieee",
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth,
    }  # fmt: skip
    every = common | given
    wanted = {parameter.name: every.get(parameter.name) for parameter in kernel.params}
    return Compilation(name, kernel, wanted, tile.warps, tile.stages, matrix)
