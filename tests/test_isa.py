"""Each tier of the CPU kernels that this machine can run, against the error rule."""

import pytest
import torch

from fastattn import rotary
from fastattn.testing.check import OPTION_SETS, check_attention, option_set
from fastattn.testing.check_linear import EVERY_OPTION, check_linear, inputs, with_options
from fastattn.testing.check_op import (
    NORM_OPTION_SETS,
    ROTARY_OPTION_SETS,
    check_op,
    norm_inputs,
    rotary_inputs,
)
from fastattn.testing.inputs import qkv

_C = pytest.importorskip("fastattn._C", reason="the compiled core is missing")

TYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, H, Hk, Sq, Sk, D, Dv
SHAPES = {
    "blocks": (2, 4, 2, 163, 290, 64, 64),
    "odd": (1, 3, 1, 61, 77, 33, 129),
    "one_query": (2, 6, 2, 1, 2100, 64, 64),
    "few_queries": (1, 4, 4, 7, 1029, 128, 80),
    "widest": (1, 1, 1, 40, 50, 512, 511),
}

# The ops around a product: few rows, several panels of rows, a sum of more than one chunk.
PRODUCT_SIZES = {
    "linear": [(3, 41, 37), (70, 33, 131), (9, 1100, 30)],
    "feed_forward": [(3, 41, 37, 19), (70, 33, 131, 40), (9, 30, 1100, 17)],
    "gated_feed_forward": [(3, 41, 37, 19), (70, 33, 131, 40), (9, 30, 1100, 17)],
}
PRODUCT_OPTIONS = [(op, option) for op, option in EVERY_OPTION if op in PRODUCT_SIZES]


@pytest.fixture(params=_C.isa_tiers())
def tier(request):
    """Runs the test on one tier, then goes back to the one before."""
    before = _C.isa()
    _C.set_isa(request.param)
    assert _C.isa() == request.param
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_shapes(dtype, shape):
    check_attention(*qkv(*SHAPES[shape], dtype=dtype), backend="cpu", causal=shape == "blocks")


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_options(dtype, option):
    q, k, v = qkv(2, 4, 2, 77, 150, 40, 24, dtype=dtype)
    check_attention(q, k, v, backend="cpu", **option_set(option, q, k))


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_options_of_decoding(dtype, option):
    q, k, v = qkv(1, 4, 2, 3, 1100, 40, 24, dtype=dtype)
    check_attention(q, k, v, backend="cpu", gradients=False, **option_set(option, q, k))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_every_length_and_head_dim_of_a_tile(dtype):
    for size in range(1, 50):
        check_attention(*qkv(1, 1, 1, size, 50 - size, size, 70 - size, dtype=dtype), backend="cpu")


@pytest.mark.parametrize(("op", "option"), PRODUCT_OPTIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_products(dtype, op, option):
    for sizes in PRODUCT_SIZES[op]:
        check_linear(op, with_options(op, option, inputs(op, sizes, dtype=dtype)), backend="cpu")


@pytest.mark.parametrize("op", PRODUCT_SIZES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_every_remainder_of_a_product(dtype, op):
    """Of the rows and lanes of its tiles, and of what is added up at once."""
    for size in range(1, 36):
        sizes = (size, 36 - size, 1 + size * 5 % 37, 1 + size * 7 % 31)[: len(PRODUCT_SIZES[op][0])]
        check_linear(op, inputs(op, sizes, dtype=dtype), backend="cpu")


@pytest.mark.parametrize(
    ("op", "option"), NORM_OPTION_SETS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.usefixtures("tier")
def test_norms(op, option, dtype):
    for shape in ((5, 1), (37, 83), (70, 256)):
        check_op(op, norm_inputs(op, option, *shape, dtype=dtype), backend="cpu")


@pytest.mark.parametrize("option", ROTARY_OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.usefixtures("tier")
def test_rotary(option, dtype, interleaved):
    for *shape, rotary_dim in ((2, 7, 3, 64, 64), (1, 9, 2, 83, 46)):
        given = rotary_inputs(option, *shape, rotary_dim=rotary_dim, dtype=dtype, interleaved=interleaved)
        check_op(rotary, given, backend="cpu")


def test_generic_runs_everywhere():
    assert "generic" in _C.isa_tiers()
    assert _C.isa() in _C.isa_tiers()


def test_set_isa_refuses_an_unknown_tier():
    before = _C.isa()
    with pytest.raises(ValueError, match="sse9") as error:
        _C.set_isa("sse9")
    assert all(tier in str(error.value) for tier in _C.isa_tiers())
    assert _C.isa() == before


_RUN = """
import torch, fastattn
from fastattn import _C
x = torch.ones(1, 2, 2, 4)
fastattn.attention(x, x, x, backend="cpu")
print(_C.isa())
"""


@pytest.mark.parametrize("name", _C.isa_tiers())
def test_environment_chooses_the_tier(run_python, name):
    done = run_python(_RUN, FASTATTN_CPU_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_an_unknown_tier_in_the_environment_is_an_error(run_python):
    done = run_python(_RUN, FASTATTN_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "FASTATTN_CPU_ISA" in done.stderr and "sse9" in done.stderr
    assert all(tier in done.stderr for tier in _C.isa_tiers())
