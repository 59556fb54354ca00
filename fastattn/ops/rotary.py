"""rotary: the contract, its plain-PyTorch reference, its op and its gradient, which is the op itself."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.ops._checks import TYPES, check_last_stride, check_tensor
from fastattn.ops._gradient import differentiable


class Call(NamedTuple):
    """One checked call, in the order of the op's schema. Backends get this and nothing else."""

    x: Tensor  # [B, S, H, D], last stride 1
    cos: Tensor  # [P, R / 2], or [B, S, R / 2], a row for each token; last stride 1
    sin: Tensor  # like cos
    positions: Tensor | None  # int32 or int64 [B, S], rows of cos and sin; None: 0 ... S - 1
    interleaved: bool
    inverse: bool  # by minus the angle, as backward does


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotary position embedding: turns pairs of a head's values by the angles of their token's position.

    The first R values of a head are turned, the rest is passed on. A pair (a, b) with angle t becomes
    (a cos t - b sin t, b cos t + a sin t).

    Shapes:
        x [B, S, H, D] -> [B, S, H, D]; any strides whose last is 1. cos and sin are tables over positions,
        [P, R / 2], or hold the angles of each token, [B, S, R / 2] or [1, S, R / 2]; 2 <= R <= D.
    Types:
        x is float32, bfloat16 or float16 (float64: reference only), and so is the result; cos and sin are
        in x's type or float32. All arithmetic is in float32. Autocast changes nothing.
    Args:
        cos: cosines of the angles; not differentiable.
        sin: sines of the angles; in cos's shape and type.
        positions: int32 or int64, [B, S] or [S]: each token's row of the tables. Default: 0 ... S - 1.
        interleaved: pairs are (0, 1), (2, 3), ...; else value i goes with value i + R / 2.
        backend: a backend's name, or "reference". Default: the first that supports the call.
    Errors:
        Against the reference in float64, at most twice PyTorch's in the same type (testing/compare.py).
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed. Under
            tracing, what positions hold is looked at when the op runs. On a GPU nobody looks: tokens
            with positions outside the tables become NaN.
        NotImplementedError: no backend takes the call; gives each one's reason.
    Backends:
        cpu (AVX-512-BF16, AVX-512, AVX2, generic), triton (CUDA); see `fastattn.explain`.
    Source:
        Su et al. 2021, arXiv:2104.09864.
    """
    if backend is None:
        backend = dispatch.DEFAULT
    call = check(x, cos, sin, positions=positions, interleaved=interleaved)
    if backend == dispatch.REFERENCE:
        return rotary_reference(call)
    if (x.requires_grad and torch.is_grad_enabled()) or dispatch.in_forward_mode():
        return differentiable(_Rotary, call, backend)  # type: ignore[no-any-return]
    if dispatch.must_trace() or type(x) is not Tensor:
        return _OP(*call, backend)  # type: ignore[no-any-return]
    module = dispatch.choose("rotary", backend, x.device, call)
    return module.rotary_fwd(call)  # type: ignore[no-any-return]


def check(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Call:
    """Raises on a bad argument of `rotary`, or returns the call in its normal form.

    Good input passes one condition; the rest finds out what is wrong.
    """
    if not (
        isinstance(x, Tensor)
        and isinstance(cos, Tensor)
        and isinstance(sin, Tensor)
        and len(sizes := x.shape) == 4
        and x.dtype in TYPES
        and (x.stride(3) == 1 or sizes[3] == 1)
        and 2 <= len(angles := cos.shape) <= 3
        and angles == sin.shape
        and 0 < 2 * angles[-1] <= sizes[3]
        and (angles[0] >= sizes[1] or positions is not None if len(angles) == 2 else _fits(angles, sizes))
        and cos.dtype is sin.dtype
        and (cos.dtype is x.dtype or cos.dtype is torch.float32)
        and x.device == cos.device == sin.device
        and (cos.stride(-1) == sin.stride(-1) == 1 or angles[-1] == 1)
        and not ((cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled())
    ):
        raise _error(x, cos, sin, positions)
    if len(angles) == 3 and angles[0] != sizes[0]:
        cos, sin = (table.expand(sizes[0], -1, -1) for table in (cos, sin))
    if positions is not None:
        positions = _check_positions(positions, x, cos)
    return Call(x, cos, sin, positions, bool(interleaved), False)


def _fits(angles: torch.Size, sizes: torch.Size) -> bool:
    return angles[0] in (1, sizes[0]) and angles[1] == sizes[1]


def _error(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Exception:
    check_tensor("x", x)
    if x.ndim != 4:
        return ValueError(f"x must have 4 dimensions [B, S, H, D], got shape {list(x.shape)}")
    if x.dtype not in TYPES:
        return TypeError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    check_last_stride("x", x)
    for name, table in (("cos", cos), ("sin", sin)):
        if (error := _table_error(name, table, x, positions)) is not None:
            return error
    return ValueError(
        "cos and sin must share shape and type, "
        f"got {list(cos.shape)} {cos.dtype} and {list(sin.shape)} {sin.dtype}"
    )


def _table_error(name: str, table: Tensor, x: Tensor, positions: Tensor | None) -> Exception | None:
    check_tensor(name, table)
    batch, seqlen, _, head_dim = x.shape
    if table.dtype is not x.dtype and table.dtype is not torch.float32:
        return TypeError(f"{name} must be float32 or in x's type {x.dtype}, got {table.dtype}")
    if table.device != x.device:
        return ValueError(f"{name} must be on x's device {x.device}, got {table.device}")
    rank = table.ndim
    if not 2 <= rank <= 3 or not 0 < 2 * table.shape[-1] <= head_dim:
        return ValueError(
            f"{name} must have shape [positions, R / 2] or [B, S, R / 2] with R in 2 ... D = {head_dim}, "
            f"got {list(table.shape)}"
        )
    if rank == 3 and not _fits(table.shape, x.shape):
        return ValueError(
            f"{name} with a row for each token must have shape [B, S, R / 2] = [{batch}, {seqlen}, R / 2] "
            f"or [1, {seqlen}, R / 2], got {list(table.shape)}"
        )
    if rank == 2 and positions is None and table.shape[0] < seqlen:
        return ValueError(f"{name} must hold {seqlen} positions or more, got {table.shape[0]}")
    if table.requires_grad and torch.is_grad_enabled():
        return ValueError(f"{name} must not require a gradient")
    check_last_stride(name, table)
    return None


def _check_positions(positions: Tensor, x: Tensor, cos: Tensor) -> Tensor:
    """The positions as [B, S]; what they hold too, where somebody can read it now."""
    check_tensor("positions", positions)
    batch, seqlen = x.shape[:2]
    if cos.ndim == 3:
        raise ValueError("positions are rows of tables [P, R / 2]; cos and sin have a row for each token")
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positions must be int32 or int64, got {positions.dtype}")
    if positions.device != x.device:
        raise ValueError(f"positions must be on x's device {x.device}, got {positions.device}")
    if positions.shape not in ((batch, seqlen), (seqlen,)):
        raise ValueError(
            f"positions must have shape [B, S] = [{batch}, {seqlen}] or [S] = [{seqlen}], "
            f"got {list(positions.shape)}"
        )
    if positions.device.type == "cpu" and not dispatch.must_trace():
        _check_range(positions, cos)
    return positions if positions.ndim == 2 else positions.expand(batch, seqlen)


_FEW = 64  # numbers that Python looks at faster than torch


def _check_range(positions: Tensor, cos: Tensor) -> None:
    count = cos.shape[0]
    if positions.numel() == 0:
        return
    if positions.numel() <= _FEW:
        numbers = positions.flatten().tolist()
        low, high = min(numbers), max(numbers)
    else:
        low, high = (int(x) for x in torch.aminmax(positions))
    if low < 0:
        raise ValueError(f"positions must be at least 0, got {low}")
    if high >= count:
        raise ValueError(f"cos and sin must hold {high + 1} positions or more, as positions ask, got {count}")


def rotary_reference(call: Call) -> Tensor:
    """The definition, in plain PyTorch: float32 inside, or float64 where x is; differentiable."""
    cos, sin = call.cos, call.sin
    if call.positions is not None:
        cos, sin = cos[call.positions.long()], sin[call.positions.long()]
    elif cos.ndim == 2:
        cos, sin = cos[None, : call.x.shape[1]], sin[None, : call.x.shape[1]]
    return turn(call.x, cos, -sin if call.inverse else sin, call.interleaved)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, S, H, D] turned by the angles of its tokens: cos and sin [B, S, R / 2] or [1, S, R / 2]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    c, s = (table[:, :, None].to(wide.dtype) for table in (cos, sin))
    half = cos.shape[-1]
    turned, rest = wide.split([2 * half, wide.shape[3] - 2 * half], dim=-1)
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * c - b * s, b * c + a * s], dim=-1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


_LIB = torch.library.Library("fastattn", "FRAGMENT")
_LIB.define(
    "rotary_fwd(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse, "
    "str backend) -> Tensor"
)


def _fwd(*args: Any) -> Tensor:
    call = Call(*args[:-1])
    if call.positions is not None and call.positions.device.type == "cpu":
        _check_range(call.positions, call.cos)
    module = dispatch.choose("rotary", args[-1], call.x.device, call)
    return module.rotary_fwd(call)  # type: ignore[no-any-return]


def _fwd_fake(*args: Any) -> Tensor:
    x: Tensor = args[0]
    return x.new_empty(x.shape)


_LIB.impl("rotary_fwd", _fwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::rotary_fwd", _fwd_fake, lib=_LIB)
_OP = torch.ops.fastattn.rotary_fwd.default


class _Rotary(torch.autograd.Function):
    """Stands outside the op and is used only when a gradient is needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _OP(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, positions, *ctx.scalars = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        # A rotation is linear: its gradient is the rotation back, which has a gradient in turn.
        cos, sin, positions = ctx.saved_tensors
        interleaved, inverse, backend = ctx.scalars
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        call = Call(dout, cos, sin, positions, interleaved, not inverse)
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        dx = differentiable(_Rotary, call, backend) if again else _OP(*call, backend)
        return (dx, *[None] * 6)
