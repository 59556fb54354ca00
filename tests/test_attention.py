"""Attention against the error rule: out, lse and every gradient, over shapes, types and options."""

import itertools

import pytest
import torch

from fastattn import attention
from fastattn.testing.check import OPTION_SETS, option_set, refusal, results
from fastattn.testing.inputs import qkv

TYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, H, Hk, Sq, Sk, D, Dv
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "odd": (2, 3, 3, 37, 53, 17, 29),
    "gqa": (2, 6, 2, 65, 130, 64, 64),
    "mqa": (1, 8, 1, 33, 100, 80, 40),
    "self": (1, 2, 2, 320, 320, 64, 64),
    "more_queries": (1, 2, 2, 300, 40, 64, 64),
    "blocks": (1, 2, 1, 700, 1500, 64, 64),
    "long": (1, 1, 1, 130, 3000, 32, 32),
    "one_query": (2, 4, 4, 1, 5000, 64, 64),
    "few_queries": (1, 6, 2, 5, 3001, 128, 128),
    "eight_queries": (3, 8, 1, 8, 1025, 96, 96),
    "widest": (1, 2, 1, 70, 130, 512, 512),
    "wide_odd": (1, 2, 2, 67, 131, 511, 257),
    "wide_v": (2, 2, 2, 40, 70, 8, 500),
    "narrow_v": (2, 2, 2, 40, 70, 500, 3),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shapes(check, dtype, shape, causal):
    check(*qkv(*SHAPES[shape], dtype=dtype), causal=causal)


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check, dtype, option):
    q, k, v = qkv(2, 6, 3, 150, 210, 40, 24, dtype=dtype)
    check(q, k, v, **option_set(option, q, k))


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options_with_more_queries_than_keys(check, dtype, option):
    q, k, v = qkv(1, 2, 1, 203, 90, 64, 64, dtype=dtype)
    check(q, k, v, **option_set(option, q, k))


# Decoding, which needs no gradients, may run on a kernel of its own.
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options_with_few_queries(check, dtype, seqlen_q, option, gradients):
    q, k, v = qkv(2, 4, 2, seqlen_q, 1500, 64, 64, dtype=dtype)
    check(q, k, v, gradients=gradients, **option_set(option, q, k))


_TILES = {"causal": True}, {"window_size": (100, 0)}, {"window_size": (70, 300)}, {"window_size": (0, 513)}


@pytest.mark.parametrize("options", _TILES, ids=str)
@pytest.mark.parametrize("seqlens", [(700, 700), (512, 1024), (640, 257)], ids=str)
def test_windows_over_many_blocks(check, seqlens, options):
    check(*qkv(1, 2, 1, *seqlens, 32, 32), **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_head_dim(check, dtype):
    step = 7 if dtype is torch.float16 else 1  # PyTorch, which we compare to, is slow in float16
    for head_dim in range(1, 513, step):
        given = qkv(1, 2, 1, 3, 5, head_dim, 513 - head_dim, dtype=dtype)
        check(*given)
        check(*given, gradients=False)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_short_lengths(check, dtype):
    """Every remainder of the tiles' 14 rows, 16 lanes and 32 columns."""
    for seqlen_q, seqlen_k in itertools.chain(
        ((length, 40) for length in range(1, 30)), ((3, length) for length in range(1, 66))
    ):
        check(*qkv(1, 1, 1, seqlen_q, seqlen_k, 16, 16, dtype=dtype), causal=True)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.5, "seed": 1}], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 1, 5, 7, 8, 8),
        (2, 0, 0, 5, 7, 8, 8),
        (2, 0, 3, 5, 7, 8, 8),
        (2, 2, 1, 0, 7, 8, 8),
        (2, 2, 1, 5, 0, 8, 8),
        (2, 2, 1, 0, 0, 8, 8),
    ],
    ids=str,
)
def test_empty_tensors(check, shape, options):
    q, k, v = qkv(*shape)
    check(q, k, v, **options)
    check(q, k, v, **options, **option_set("bias", q, k))
    check(q, k, v, **options, **option_set("sinks", q, k))


@pytest.mark.parametrize("name", ["causal", "mask_none", "bias_infinite", "dropout"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_that_see_nothing(backend, dtype, name):
    q, k, v = qkv(2, 4, 2, 100, 30, 32, 16, dtype=dtype)
    options = option_set(name, q, k) | ({"causal": True} if name == "dropout" else {})
    if reason := refusal(backend, q, k, v, **options):
        pytest.skip(reason)
    found = results(q=q, k=k, v=v, backend=backend, **options)
    blind = found["lse"] == -torch.inf
    assert blind.any()
    rows = blind.transpose(1, 2)
    assert (found["out"][rows] == 0).all()
    assert (found["dq"][rows] == 0).all()
    if "dbias" in found:
        assert (found["dbias"][blind] == 0).all()
    for name, x in found.items():
        assert not x.isnan().any(), name


def test_a_blind_row_sees_its_sink(backend):
    q, k, v = qkv(1, 2, 2, 3, 5, 8)
    sinks = torch.tensor([0.5, -2.0])
    options = {"sinks": sinks, "mask": torch.zeros(5, dtype=torch.bool)}
    if reason := refusal(backend, q, k, v, **options):
        pytest.skip(reason)
    found = results(q=q, k=k, v=v, backend=backend, **options)
    assert (found["out"] == 0).all()
    assert torch.equal(found["lse"], sinks[None, :, None].expand(1, 2, 3))


@pytest.mark.parametrize("shape", ["self", "long", "few_queries"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
class TestMagnitudes:
    """Scores that a naive exp overflows on, and orders of keys that are hard on an online softmax."""

    @pytest.mark.parametrize("size", [1e-3, 30.0, 1e3, 1e4])
    def test_scores_up_to(self, check, dtype, shape, size):
        q, k, v = qkv(*SHAPES[shape], dtype=dtype)
        largest = torch.einsum("bqhd,bkhd->bhqk", q[:, :, :1].float(), k[:, :, :1].float()).abs().max()
        # At 1e4 the rounding of a float32 score alone moves its weight by 1e-3, in ours and in the base
        # alike, and gradients magnify it: whose is smaller is then a matter of luck.
        check(q, k, v, softmax_scale=float(size / largest), gradients=size < 1e4)

    @pytest.mark.parametrize("step", [5.0, 0.3, 0.01, -0.01, -0.3, -5.0])
    def test_every_key_scores_higher_than_the_last(self, check, dtype, shape, step):
        q, k, v = qkv(*SHAPES[shape], dtype=dtype)
        ramp = step * torch.arange(k.shape[1], dtype=torch.float32)
        check(q, k, v, bias=ramp.clamp(-1e4, 1e4))

    def test_one_key_towers_over_the_others(self, check, dtype, shape):
        q, k, v = qkv(*SHAPES[shape], dtype=dtype)
        for where in (0, k.shape[1] // 2, k.shape[1] - 1):
            bias = torch.zeros(k.shape[1])
            bias[where] = 200.0
            check(q, k, v, bias=bias)

    def test_constant_inputs(self, check, dtype, shape):
        q, k, v = (torch.full_like(x, 0.5) for x in qkv(*SHAPES[shape], dtype=dtype))
        check(q, k, v)

    def test_all_scores_are_very_negative(self, check, dtype, shape):
        q, k, v = qkv(*SHAPES[shape], dtype=dtype)
        check(q, k, v, bias=torch.tensor(-1e4))


def test_returns_lse_only_when_asked(backend):
    q, k, v = qkv(1, 2, 1, 5, 6, 8)
    if reason := refusal(backend, q, k, v):
        pytest.skip(reason)
    out = attention(q, k, v, backend=backend)
    with_lse, lse = attention(q, k, v, return_lse=True, backend=backend)
    assert torch.equal(out, with_lse)
    assert out.shape == (1, 5, 2, 8) and out.is_contiguous()
    assert lse.shape == (1, 2, 5) and lse.dtype is torch.float32
