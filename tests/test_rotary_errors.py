"""Bad input of rotary raises and names the argument, one test each."""

import pytest
import torch

from fastattn import explain, rotary


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def positions(*numbers):
    return torch.tensor(numbers)


GOOD = {"x": x(2, 3, 4, 8), "cos": x(9, 4), "sin": x(9, 4)}
TOKENS = {"cos": x(2, 3, 4), "sin": x(2, 3, 4)}


def both(*shape, **options):
    return {"cos": x(*shape, **options), "sin": x(*shape, **options)}


BAD = {
    "x_rank": ({"x": x(2, 3, 8)}, ValueError, r"x must have 4 dim.*\[B, S, H, D\], got shape \[2, 3, 8\]"),
    "x_list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x_integers": ({"x": x(2, 3, 4, 8).int()}, TypeError, "x must be float32.*torch.int32"),
    "x_stride": ({"x": x(2, 3, 4, 16)[..., ::2]}, ValueError, r"last stride of x.*x.contiguous\(\)"),
    "cos_none": ({"cos": None}, TypeError, "cos must be a tensor, got NoneType"),
    "sin_list": ({"sin": [0.0]}, TypeError, "sin must be a tensor, got list"),
    "cos_half": ({"cos": x(9, 4).half()}, TypeError, "cos must be float32 or in x's type"),
    "sin_integers": ({"sin": x(9, 4).long()}, TypeError, "sin must be float32.*torch.int64"),
    "types_differ": (
        {"x": x(2, 3, 4, 8).half(), "cos": x(9, 4).half()}, ValueError, "must share shape and type"
    ),
    "cos_rank": (both(4), ValueError, r"cos must have shape \[positions, R / 2\].*got \[4\]"),
    "cos_too_wide": (both(9, 5), ValueError, r"R in 2 \.\.\. D = 8, got \[9, 5\]"),
    "cos_empty": (both(9, 0), ValueError, r"cos must have shape.*got \[9, 0\]"),
    "shapes_differ": ({"sin": x(9, 3)}, ValueError, r"cos and sin must share shape.*\[9, 4\].*\[9, 3\]"),
    "cos_device": (both(9, 4, device="meta"), ValueError, "cos must be on x's device cpu, got meta"),
    "cos_stride": ({"cos": x(9, 8)[:, ::2]}, ValueError, "last stride of cos"),
    "sin_stride": ({"sin": x(4, 9).t()}, ValueError, "last stride of sin"),
    "cos_short": (both(2, 4), ValueError, "cos must hold 3 positions or more, got 2"),
    "sin_short": ({"sin": x(2, 4)}, ValueError, "sin must hold 3 positions or more, got 2"),
    "tokens_batch": (both(3, 3, 4), ValueError, r"\[B, S, R / 2\] = \[2, 3, R / 2\].*got \[3, 3, 4\]"),
    "tokens_length": (both(1, 4, 4), ValueError, r"or \[1, 3, R / 2\], got \[1, 4, 4\]"),
    "cos_learned": ({"cos": x(9, 4).requires_grad_()}, ValueError, "cos must not require a gradient"),
    "sin_learned": ({"sin": x(9, 4).requires_grad_()}, ValueError, "sin must not require a gradient"),
    "positions_list": ({"positions": [0, 1, 2]}, TypeError, "positions must be a tensor, got list"),
    "positions_float": ({"positions": x(2, 3)}, TypeError, "positions must be int32 or int64"),
    "positions_bool": ({"positions": x(3).bool()}, TypeError, "positions must be int32 or int64"),
    "positions_shape": ({"positions": positions(1, 2)}, ValueError, r"\[2, 3\] or \[S\] = \[3\], got \[2\]"),
    "positions_rank": ({"positions": x(1, 2, 3).long()}, ValueError, "positions must have shape"),
    "positions_one_batch": ({"positions": x(1, 3).long()}, ValueError, r"positions.*got \[1, 3\]"),
    "positions_device": (
        {"positions": x(3, device="meta").long()}, ValueError, "positions must be on x's device"
    ),
    "positions_negative": ({"positions": positions(0, -1, 2)}, ValueError, "at least 0, got -1"),
    "positions_too_large": (
        {"positions": positions(0, 9, 2)}, ValueError, "cos and sin must hold 10 positions.*got 9"
    ),
    "positions_with_tokens": (
        TOKENS | {"positions": positions(0, 1, 2)}, ValueError, "positions are rows of tables"
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        rotary(**GOOD | change)


@pytest.mark.parametrize("name", [name for name in BAD if name != "backend"])
def test_explain_refuses_the_same(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        explain(rotary, **GOOD | change)


@pytest.mark.parametrize("where", [5, 99, 199])
def test_one_bad_position_among_many(where):
    given = {"x": x(1, 200, 1, 8), "cos": x(300, 4), "sin": x(300, 4), "positions": torch.arange(200)}
    given["positions"][where] = 300
    with pytest.raises(ValueError, match="must hold 301 positions or more, as positions ask, got 300"):
        rotary(**given)
    given["positions"][where] = -7
    with pytest.raises(ValueError, match="at least 0, got -7"):
        rotary(**given)


def test_bad_positions_of_traced_code_are_refused_when_it_runs():
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="must hold 10 positions"):
        compiled(**GOOD, positions=positions(0, 9, 2))


def test_float64_has_no_kernel():
    wide = {name: t.double() for name, t in GOOD.items()}
    with pytest.raises(NotImplementedError, match=r"fastattn.rotary: no backend.*float64"):
        rotary(**wide)
    assert rotary(**wide, backend="reference").dtype is torch.float64


@pytest.mark.parametrize(
    "change",
    [
        {"positions": positions(8, 8, 0)},
        {"positions": torch.zeros(2, 3, dtype=torch.int32)},
        TOKENS,
        both(1, 3, 1),
        both(3, 4),
        {"x": x(2, 3, 4, 9)},
        {"x": x(2, 3, 1, 8).expand(2, 3, 4, 8)},
        {"interleaved": 1},
    ],
    ids=str,
)
def test_unusual_but_good_input(change):
    assert rotary(**GOOD | change).shape[:3] == (2, 3, 4)


def test_angles_may_require_a_gradient_where_nobody_asks():
    with torch.no_grad():
        rotary(**GOOD | {"cos": x(9, 4).requires_grad_()})
