"""The compiled core (csrc/bindings.cpp)."""

from typing import Any

from torch import Tensor

def isa() -> str: ...
def isa_tiers() -> list[str]: ...
def set_isa(name: str) -> None: ...
def fma_peak(bf16: bool, threads: int, seconds: float) -> float: ...
def read_bandwidth(megabytes: int, threads: int, seconds: float) -> float: ...
def read_pass(address: int, bytes: int, threads: int) -> None: ...
def build_info() -> dict[str, Any]: ...
def describe(x: Tensor, by_attributes: bool) -> tuple[int, int, list[int], list[int]]: ...

# A call is the NamedTuple of its op, fastattn/ops/<op>.py.
def attention_fwd(
    call: tuple[Any, ...], out: Tensor, lse: Tensor | None, lse_rest: Tensor | None, threads: int
) -> None: ...
def attention_bwd(
    call: tuple[Any, ...],
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def attention_varlen_fwd(
    call: tuple[Any, ...], out: Tensor, lse: Tensor | None, lse_rest: Tensor | None, threads: int
) -> None: ...
def attention_varlen_bwd(
    call: tuple[Any, ...],
    out: Tensor,
    lse: Tensor,
    lse_rest: Tensor,
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def attention_decode(call: tuple[Any, ...], out: Tensor, lse: Tensor | None, threads: int) -> None: ...
def linear_fwd(call: tuple[Any, ...], out: Tensor, z: Tensor | None, threads: int) -> None: ...
def linear_bwd(
    dout: Tensor,
    z: Tensor | None,
    call: tuple[Any, ...],
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def feed_forward_fwd(call: tuple[Any, ...], out: Tensor, z: Tensor | None, threads: int) -> None: ...
def feed_forward_bwd(
    dout: Tensor,
    z: Tensor | None,
    call: tuple[Any, ...],
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def gated_feed_forward_fwd(call: tuple[Any, ...], out: Tensor, z: Tensor | None, threads: int) -> None: ...
def gated_feed_forward_bwd(
    dout: Tensor,
    z: Tensor | None,
    call: tuple[Any, ...],
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def linear_cross_entropy_fwd(call: tuple[Any, ...], loss: Tensor, lse: Tensor, threads: int) -> None: ...
def linear_cross_entropy_bwd(
    dloss: Tensor,
    lse: Tensor,
    call: tuple[Any, ...],
    gradients: tuple[Tensor | None, ...],
    threads: int,
) -> None: ...
def layer_norm_fwd(
    call: tuple[Any, ...],
    out: Tensor,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    threads: int,
) -> None: ...
def layer_norm_bwd(call: tuple[Any, ...], gradients: tuple[Tensor | None, ...], threads: int) -> None: ...
def rms_norm_fwd(
    call: tuple[Any, ...],
    out: Tensor,
    total: Tensor | None,
    mean: None,
    rstd: Tensor | None,
    threads: int,
) -> None: ...
def rms_norm_bwd(call: tuple[Any, ...], gradients: tuple[Tensor | None, ...], threads: int) -> None: ...
def rotary_fwd(call: tuple[Any, ...], out: Tensor, threads: int) -> None: ...
