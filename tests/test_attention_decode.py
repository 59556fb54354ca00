"""Attention over a cache: the error rule over layouts, types and options, and what is left alone."""

import pytest
import torch

from fastattn import attention, attention_decode, dispatch
from fastattn.testing.check_decode import (
    DECODE_OPTION_SETS,
    check_decode,
    decode_inputs,
    decode_option_set,
    twins,
)
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import qkv

TYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_TYPES = (*TYPES, torch.int8)

# Keys of each sequence, then H, Hk, Sq, D, Dv.
SHAPES = {
    "one": ([1], 1, 1, 1, 1, 1),
    "ragged": ([300, 0, 7, 1025], 4, 4, 1, 64, 64),
    "gqa": ([130, 33], 6, 2, 1, 64, 80),
    "mqa": ([100, 1, 513], 16, 1, 1, 40, 24),
    "verify": ([70, 3, 300], 4, 2, 5, 32, 32),
    "prefill": ([0, 40, 150], 4, 2, 40, 64, 64),
    "wide": ([67, 10], 2, 1, 1, 500, 511),
    "no_keys": ([0, 0], 4, 2, 3, 8, 8),
    "no_queries": ([5, 9], 4, 2, 0, 8, 8),
    "no_sequences": ([], 4, 2, 1, 8, 8),
    "no_heads": ([5, 9], 0, 0, 1, 8, 8),
}


@pytest.fixture(autouse=True)
def _backend_has_the_op(skip_if_refused):
    skip_if_refused(attention_decode, **decode_inputs([1], 1, 1, 1, 1))


@pytest.fixture
def check(backend):
    """`check_decode` on this backend."""

    def run(call, **options):
        check_decode(backend=backend, **call, **options)

    return run


layouts = pytest.mark.parametrize("page_size", [None, 16], ids=["dense", "paged"])


@layouts
@pytest.mark.parametrize("new", [None, 1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shapes(check, dtype, shape, new, page_size):
    call = decode_inputs(*SHAPES[shape], new=new, page_size=page_size, dtype=dtype)
    check(call)
    check(call, causal=True)


@layouts
@pytest.mark.parametrize("cache_dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_cache_types(check, dtype, cache_dtype, page_size):
    for seqlen_q, head_dim in ((1, 64), (4, 33), (20, 48)):
        check(decode_inputs([150, 0, 40], 4, 2, seqlen_q, head_dim, 24, new=2, page_size=page_size,
                            dtype=dtype, cache_dtype=cache_dtype, rotary_dim=16), causal=True)  # fmt: skip


@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("option", DECODE_OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check, dtype, option, cache_dtype):
    for seqlen_q, page_size in ((1, 7), (4, None), (37, 32)):
        call = decode_inputs([90, 3, 0, 150], 6, 3, seqlen_q, 40, 24, new=seqlen_q, page_size=page_size,
                             dtype=dtype, cache_dtype=cache_dtype)  # fmt: skip
        check(call, **decode_option_set(option, call["q"]))


@pytest.mark.parametrize("page_size", [1, 2, 3, 15, 16, 17, 64, 128, 256, 1000])
def test_page_sizes(check, page_size):
    for new in (None, 1, 33):
        call = decode_inputs([300, 16, 0, 63], 4, 2, 2, 32, new=new, page_size=page_size)
        check(call, causal=True)


@layouts
@pytest.mark.parametrize("num_splits", [1, 2, 3, 16, 1000])
def test_num_splits(check, num_splits, page_size):
    for seqlen_q in (1, 9):
        call = decode_inputs([1500, 2, 0, 300], 4, 2, seqlen_q, 64, page_size=page_size)
        check(call, num_splits=num_splits)
        check(call, num_splits=num_splits, window_size=(50, 3), sinks=torch.ones(4))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("rotary_dim", [2, 10, 32, 34])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rotary(check, dtype, rotary_dim, interleaved):
    for new in (None, 0, 1, 6):
        call = decode_inputs([90, 3, 0], 4, 2, 5, 34, new=new, dtype=dtype, rotary_dim=rotary_dim)
        for options in ({}, {"causal": True}, {"window_size": (9, 4)}):
            check(call, **options, interleaved=interleaved)
    low = call | {name: call[name].to(dtype) for name in ("cos", "sin")}
    check(low, interleaved=interleaved)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, -1)}], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_rotary_is_a_product_of_complex_numbers(backend, interleaved, options):
    """By another road than the reference's: what is attended is what was turned by hand."""
    call = decode_inputs([9, 4], 4, 2, 3, 16, new=3, rotary_dim=12)
    angles = torch.atan2(call["sin"], call["cos"]).double()

    def turned(x, step):
        positions = call["cache_seqlens"][:, None] + step * torch.arange(3)
        pairs = x[..., :12].double().unflatten(-1, (6, 2) if interleaved else (2, 6))
        first, second = pairs.unbind(-1 if interleaved else -2)
        z = torch.complex(first, second) * torch.exp(1j * angles[positions])[:, :, None]
        pairs = torch.stack([z.real, z.imag], dim=-1 if interleaved else -2)
        return torch.cat([pairs.flatten(-2), x[..., 12:]], dim=-1).to(x.dtype)

    plain = twins({name: x for name, x in call.items() if name not in ("cos", "sin")})
    plain["q"], plain["k"] = turned(plain["q"], bool(options)), turned(plain["k"], True)
    call = twins(call)
    out = attention_decode(**call, **options, interleaved=interleaved, backend=backend)
    expected = attention_decode(**plain, **options, backend=backend)
    assert_close(out, expected, expected)
    for b, length in enumerate(call["cache_seqlens"].tolist()):
        written = slice(length, length + 3)
        expected = plain["k_cache"][b, written]
        assert_close(call["k_cache"][b, written], expected, expected)


@layouts
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gives_what_attention_gives(backend, dtype, page_size):
    call = twins(decode_inputs([70, 1, 33], 4, 2, 6, 32, new=6, page_size=page_size, dtype=dtype))
    out, lse = attention_decode(**call, causal=True, return_lse=True, backend=backend)
    for b, length in enumerate(call["cache_seqlens"].tolist()):
        keys, values = (
            torch.cat([tokens_of(call, name, b, length), call[name[0]][b]])[None]
            for name in ("k_cache", "v_cache")
        )
        given = call["q"][b : b + 1], keys, values
        expected = attention(*given, causal=True, return_lse=True, backend=backend)
        truth = attention(
            *(x.double() for x in given), causal=True, return_lse=True, backend=dispatch.REFERENCE
        )
        for x, y, z in zip((out, lse), expected, truth, strict=True):
            assert_close(x[b : b + 1], y, z, dtype=dtype)


def tokens_of(call, name, b, length):
    """The first tokens of a sequence, one by one."""
    if "block_table" not in call:
        return call[name][b, :length]
    size = call[name].shape[1]
    tokens = [call[name][call["block_table"][b, t // size], t % size] for t in range(length)]
    return torch.stack(tokens)


@layouts
def test_token_by_token_is_causal_attention(backend, page_size):
    q, k, v = qkv(2, 4, 2, 40, 40, 32)
    truth = attention(q.double(), k.double(), v.double(), causal=True, backend=dispatch.REFERENCE)
    base = attention(q, k, v, causal=True, backend=dispatch.REFERENCE)
    call = decode_inputs([0, 0], 4, 2, 1, 32, new=40, page_size=page_size)
    outs = []
    for at, tokens in ((0, 17), *((at, 1) for at in range(17, 40))):
        rows = slice(at, at + tokens)
        call |= {"q": q[:, rows], "k": k[:, rows], "v": v[:, rows], "cache_seqlens": at}
        outs.append(attention_decode(**call, causal=True, backend=backend))
    assert_close(torch.cat(outs, dim=1), base, truth)


def test_cache_seqlens_as_a_number_or_not_at_all(backend):
    call = twins(decode_inputs([20, 20], 4, 2, 1, 16))
    for name in ("k_cache", "v_cache"):
        call[name] = call[name][:, :20]
    expected = attention_decode(**call, backend=backend)
    for cache_seqlens in (20, None):
        assert torch.equal(
            attention_decode(**call | {"cache_seqlens": cache_seqlens}, backend=backend), expected
        )


def test_rows_of_the_cache(check):
    for new in (None, 3):
        call = decode_inputs([70, 0, 33], 4, 2, 3, 32, new=new, select=True)
        assert call["k_cache"].shape[0] == 5
        check(call, causal=True)
        check(call, cache_leftpad=torch.tensor([9, 0, 70], dtype=torch.int32))


def test_leftpad(check):
    call = decode_inputs([70, 5, 33, 9], 4, 2, 3, 32, new=3)
    for leftpad in ([0, 0, 0, 0], [69, 2, 36, 1000], [1, 8, 7, 10]):
        for options in ("plain", "window_causal", "alibi", "sinks"):
            check(call, cache_leftpad=torch.tensor(leftpad, dtype=torch.int32),
                  **decode_option_set(options, call["q"]))  # fmt: skip


def test_leftpad_hides_keys(backend):
    """NaN in the hidden keys does not show."""
    call = twins(decode_inputs([30, 30], 4, 2, 2, 16))
    leftpad = torch.tensor([7, 30], dtype=torch.int32)
    call["k_cache"][0, :7] = call["v_cache"][0, :7] = torch.nan
    call["k_cache"][1], call["v_cache"][1] = torch.nan, torch.nan
    out, lse = attention_decode(**call, cache_leftpad=leftpad, return_lse=True, backend=backend)
    assert out[0].isfinite().all() and lse[0].isfinite().all()
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


def test_no_keys_give_zero_or_the_sink(backend):
    call = decode_inputs([0, 0], 4, 2, 2, 16)
    sinks = torch.tensor([0.5, -2.0, 0.0, 3.0])
    out, lse = attention_decode(**call, return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out, lse = attention_decode(**call, sinks=sinks, return_lse=True, backend=backend)
    expected = sinks[:, None].expand(2, 4, 2)
    assert (out == 0).all()
    assert_close(lse, expected, expected)


def test_sequences_may_share_what_nobody_writes(backend):
    call = decode_inputs([32, 32], 4, 2, 1, 16, page_size=8)
    call["block_table"][1, :4] = call["block_table"][0, :4]
    call["q"][1] = call["q"][0]
    out = attention_decode(**call, backend=backend)
    assert torch.equal(out[0], out[1])
    call = decode_inputs([32, 32], 4, 2, 1, 16, select=True) | {"q": call["q"]}
    call["cache_batch_idx"][1] = call["cache_batch_idx"][0]
    out = attention_decode(**call, backend=backend)
    assert torch.equal(out[0], out[1])


def test_all_is_appended_before_any_key_is_read(backend):
    """Sequence 1 reads the page that sequence 0 writes to."""
    call = decode_inputs([15, 15, 300], 4, 2, 1, 16, new=1, page_size=16)
    call = twins(call | {"cache_seqlens": torch.tensor([15, 16, 300], dtype=torch.int32)})
    call["block_table"][1, :2] = torch.tensor([call["block_table"][0, 0], call["block_table"][1, 0]])
    expected = twins(call)
    out = attention_decode(**call, backend=backend)
    base = attention_decode(**expected, backend=dispatch.REFERENCE)
    truth = attention_decode(
        **{name: x.double() if x.is_floating_point() else x for name, x in expected.items()},
        backend=dispatch.REFERENCE,
    )
    assert_close(out, base, truth)


@layouts
def test_int8_is_the_nearest_of_127_steps(backend, page_size):
    call = decode_inputs([3, 0], 2, 2, 1, 8, new=2, page_size=page_size, cache_dtype=torch.int8)
    k = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.499])
    call["k"] = torch.stack([k, k / 127])[:, None].expand(2, 2, 2, 8).contiguous()
    call["v"] = torch.zeros(2, 2, 2, 8)
    call = twins(call)
    attention_decode(**call, backend=backend)
    for b, length in enumerate((3, 0)):
        for name, scales in (("k", (1.0, 1 / 127)), ("v", (0.0, 0.0))):
            values = tokens_of(call, f"{name}_cache", b, length + 2)[length:]
            found = tokens_of(call, f"{name}_scale", b, length + 2)[length:]
            assert torch.equal(found, torch.tensor([[scale] * 2 for scale in scales]))
            steps = torch.tensor([127, -127, 0, 2, 2, 0, -2, 0], dtype=torch.int8) * (name == "k")
            assert torch.equal(values[0], steps.expand(2, 8))
            assert (values[1, :, :2].abs() == (127 if name == "k" else 0)).all()


def test_returns_lse_only_when_asked(backend):
    call = decode_inputs([5, 9], 2, 1, 3, 8)
    out = attention_decode(**call, backend=backend)
    with_lse, lse = attention_decode(**call, return_lse=True, backend=backend)
    assert torch.equal(out, with_lse)
    assert out.shape == (2, 3, 2, 8) and out.is_contiguous()
    assert lse.shape == (2, 2, 3) and lse.dtype is torch.float32
